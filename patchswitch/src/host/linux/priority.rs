//! How much of the processor a thread asks for (`setpriority(2)`).
//!
//! Around a switch there is work to do: files are looked at, tables are read, flows are listed. On a host with few
//! processors whoever serves would wait for it, and a client would see the switch that it must not see. So the agent
//! gives way; the programs that it starts do not, for a partition's processes would stay so.

use std::marker::PhantomData;
use std::sync::OnceLock;

use rustix::process::{getpriority_process, setpriority_process};

/// How much nicer: about a tenth of a share (`sched_prio_to_weight`, `kernel/sched/core.c`), so that the work ends in
/// any case.
const NICER: i32 = 10;

/// The nicest there is.
const NICEST: i32 = 19;

/// What the process had before any of its threads gave way.
static USUAL: OnceLock<i32> = OnceLock::new();

/// A priority of the calling thread that ends with this value, when the one before comes back.
///
/// Linux keeps it for a thread, not for a process, so the value stays on the thread that made it. Threads that are made
/// meanwhile inherit it.
#[derive(Debug)]
#[must_use = "it ends with the value"]
pub struct Priority {
    before: Option<i32>,
    _of_this_thread: PhantomData<*const ()>,
}

impl Priority {
    /// Lets everybody else go first. Where the kernel refuses, all stays as it is: this is a courtesy.
    pub fn give_way() -> Self {
        let Ok(now) = getpriority_process(None) else { return Self::unchanged() };
        let usual = *USUAL.get_or_init(|| now);
        Self::change(now, (usual + NICER).min(NICEST))
    }

    /// Goes with everybody else again, as if nobody gave way.
    pub fn usual() -> Self {
        match (USUAL.get(), getpriority_process(None)) {
            (Some(usual), Ok(now)) => Self::change(now, *usual),
            _ => Self::unchanged(),
        }
    }

    fn change(now: i32, to: i32) -> Self {
        let changed = now != to && setpriority_process(None, to).is_ok();
        Self { before: changed.then_some(now), _of_this_thread: PhantomData }
    }

    fn unchanged() -> Self {
        Self { before: None, _of_this_thread: PhantomData }
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        let Some(before) = self.before else { return };
        if let Err(error) = setpriority_process(None, before) {
            // To be less nice again takes a privilege. That it was dropped meanwhile costs time, and nothing else.
            tracing::debug!("the thread keeps its priority: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::linux::programs::{Program, Run};

    fn mine() -> i32 {
        getpriority_process(None).unwrap()
    }

    /// What a program has that is started now.
    fn of_a_program() -> i32 {
        Run::new(Program::Shell).args(["-c", "nice"]).read().unwrap().trim().parse().unwrap()
    }

    #[test]
    fn a_thread_gives_way_with_those_it_makes_and_the_programs_it_starts_do_not() {
        // On a thread of its own: without the privilege to be less nice again it stays nice.
        let on_a_thread = std::thread::spawn(|| {
            let before = mine();
            let way = Priority::give_way();
            let nice = (before + NICER).min(NICEST);
            assert_eq!((mine(), std::thread::spawn(mine).join().unwrap()), (nice, nice));
            let privileged = rustix::process::geteuid().is_root();
            let back = if privileged { before } else { nice };
            assert_eq!((of_a_program(), mine()), (back, nice));
            {
                let _again = Priority::give_way();
                assert_eq!(mine(), nice, "not nicer than nice");
                let _usual = Priority::usual();
                assert_eq!(mine(), back);
            }
            assert_eq!(mine(), nice);
            drop(way);
            assert_eq!(mine(), back);
        });
        on_a_thread.join().unwrap();
    }
}
