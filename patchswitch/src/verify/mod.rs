//! Is it healthy? Probes of a partition before the switch and of the service after it.
//!
//! A probe ends with an [`Outcome`], or with [`CannotTell`] when the trouble is on our side: out of descriptors is no
//! reason to throw a good clone away, and no reason to switch to it either. How a partition is reached is the
//! caller's matter ([`Reach`]): before the switch its sockets carry a mark and are bound to the standby's own veth, so
//! that a dead standby does not look healthy because the active one answered (patent steps 709 and 1304).
//!
//! Everything here blocks, within the time it is given; call it from a thread that may.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::config::Probe;
use crate::host::linux::programs::ProgramError;

mod command;
mod connect;
mod gate;
mod http;
mod observe;
#[cfg(test)]
mod tests;

pub use command::{CommandEnd, run_on_host};
pub use connect::plain_socket;
pub use gate::{GateError, Passed, gate};
pub use observe::{Watched, Window, watch};

/// What a probe found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It works.
    Pass,
    /// It does not, and why.
    Fail(String),
}

/// Why a probe found nothing out: something is wrong on this side.
#[derive(Debug, thiserror::Error)]
pub enum CannotTell {
    /// There is no socket to probe with.
    #[error("failed to open a socket for the probe of {address}")]
    Socket {
        /// Where to.
        address: SocketAddr,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The kernel did not even try.
    #[error("failed to reach {address} from here")]
    Unreachable {
        /// Where to.
        address: SocketAddr,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The command could not be run.
    #[error("failed to run the probe's command")]
    Program(#[source] ProgramError),
    /// The shell did not find the command.
    #[error("the probe's command cannot be run (status {0}): is it installed in the partition?")]
    NoCommand(i32),
    /// The caller's way into the partition failed.
    #[error("failed to run the probe's command in the partition")]
    Inside(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// How the probes reach one partition, or the service as clients do.
///
/// Probes of one round run at once, on threads of their own.
#[derive(Clone, Copy)]
pub struct Reach<'a> {
    /// Makes a TCP socket, not yet connected, with whatever options it takes (mark, device).
    pub open: &'a (dyn Fn(SocketAddr) -> std::io::Result<OwnedFd> + Sync),
    /// Runs a shell command inside the partition, at most for the given time.
    pub run: &'a (dyn Fn(&str, Duration) -> Result<CommandEnd, CannotTell> + Sync),
}

/// What is probed.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The addresses of the service.
    pub addresses: &'a [IpAddr],
    /// Its probes.
    pub probes: &'a [Probe],
}

/// What all probes together found out at one time.
#[derive(Debug, Default)]
pub struct Round {
    /// Why it is not healthy.
    pub failures: Vec<String>,
    /// What could not be found out.
    pub unknown: Vec<CannotTell>,
}

impl Round {
    /// Whether every probe passed.
    pub fn passed(&self) -> bool {
        self.failures.is_empty() && self.unknown.is_empty()
    }
}

/// Why a probe stops early; internal to the probes.
enum Stop {
    Fail(String),
    CannotTell(CannotTell),
}

fn outcome(result: Result<(), Stop>) -> Result<Outcome, CannotTell> {
    match result {
        Ok(()) => Ok(Outcome::Pass),
        Err(Stop::Fail(reason)) => Ok(Outcome::Fail(reason)),
        Err(Stop::CannotTell(error)) => Err(error),
    }
}

/// Makes one probe of one address, within the time limit.
///
/// # Errors
/// [`CannotTell`] if the trouble is on this side.
pub fn probe(
    probe: &Probe,
    address: IpAddr,
    reach: Reach<'_>,
    timeout: Duration,
) -> Result<Outcome, CannotTell> {
    let end = Instant::now() + timeout;
    match probe {
        Probe::Tcp { port } => {
            let address = SocketAddr::new(address, port.get());
            outcome(connect::connect(address, reach, end).map(|_connection| ()))
        }
        Probe::Http { port, path, host, status, contains } => {
            let address = SocketAddr::new(address, port.get());
            let wanted =
                http::Wanted { path, host: host.as_deref(), status: *status, contains: contains.as_deref() };
            outcome(http::get(address, &wanted, reach, end))
        }
        Probe::Command { command } => outcome(command::run(command, reach, timeout)),
    }
}

/// Makes every probe once, all at the same time: `tcp` and `http` at every address, a command once.
pub fn round(target: Target<'_>, reach: Reach<'_>, timeout: Duration) -> Round {
    let mut todo = Vec::new();
    for probe in target.probes {
        let addresses = match probe {
            Probe::Command { .. } => target.addresses.get(..1).unwrap_or_default(),
            _ => target.addresses,
        };
        todo.extend(addresses.iter().map(|address| (probe, *address)));
    }
    let mut round = Round::default();
    std::thread::scope(|scope| {
        let probes: Vec<_> = todo
            .into_iter()
            .map(|(one, address)| scope.spawn(move || probe(one, address, reach, timeout)))
            .collect();
        for thread in probes {
            match thread.join() {
                Ok(Ok(Outcome::Pass)) => {}
                Ok(Ok(Outcome::Fail(reason))) => round.failures.push(reason),
                Ok(Err(error)) => round.unknown.push(error),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    round
}
