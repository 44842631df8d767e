//! Moments of a switch in which a disk goes over, as whoever looks at the kernel sees them come: no clock is in it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use patchswitch::host::linux::dm::Dm;
use patchswitch::names;
use patchswitch_tests::programs::Running;

use super::stage::{SERVICE, Stage, wait_until};

/// How long one of them may take to come.
const LIMIT: Duration = Duration::from_secs(120);

/// How far a switch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    /// New flows wait; who served still does.
    Waiting,
    /// The disk is the other one's.
    Moved,
    /// Its server is being begun.
    Begun,
    /// What waited has gone to it.
    Released,
}

impl Moment {
    pub(super) const ALL: [Self; 4] = [Self::Waiting, Self::Moved, Self::Begun, Self::Released];

    fn has_come(self, to: &str, server: &str) -> bool {
        let waits = || Path::new("/sys/class/net").join(names::hold_link(&SERVICE.parse().unwrap())).exists();
        // Only the one that was cloned has a device of its own as long as it has the disk.
        let moved = || (to == "web-b") == Dm::open().unwrap().info("ps-web-b-data").unwrap().is_some();
        match self {
            Self::Waiting => waits(),
            Self::Moved => moved(),
            Self::Begun => runs(server),
            Self::Released => !waits(),
        }
    }
}

/// Whether a program runs.
fn runs(name: &str) -> bool {
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .any(|process| fs::read_to_string(process.path().join("comm")).is_ok_and(|comm| comm.trim() == name))
}

/// Starts a command, and waits until its switch is so far; fails if it ends before.
#[track_caller]
pub(super) fn start_until(
    stage: &Stage,
    arguments: &[&str],
    (to, server): (&str, &str),
    moment: Moment,
) -> Running {
    let mut running = stage.start(arguments);
    for before in Moment::ALL {
        wait_until(&format!("{before:?}"), LIMIT, || {
            let ended = running.has_ended();
            let come = before.has_come(to, server);
            assert!(come || !ended, "{before:?} never came: {}", running.output());
            come
        });
        if before == moment {
            break;
        }
    }
    running
}
