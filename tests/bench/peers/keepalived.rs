//! keepalived in both namespaces: VRRP with its defaults. The master is stopped in order, as for maintenance.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use patchswitch_load::clock::now_ns;
use patchswitch_tests::netlab::{SERVICE, SwitchLab};
use patchswitch_tests::programs::Running;
use rustix::process::Signal;

use super::bridge::{CLIENTS, bridged};
use super::{Peer, Side};

#[derive(Debug)]
pub(crate) struct Keepalived {
    /// Ended before the laboratory goes.
    running: [Option<Running>; 2],
    directory: tempfile::TempDir,
    lab: SwitchLab,
}

impl Keepalived {
    pub(crate) fn new() -> Result<Self> {
        let lab = bridged("vrrp")?;
        let mut keepalived = Self { running: [None, None], directory: tempfile::tempdir()?, lab };
        keepalived.start(Side::A)?;
        keepalived.wait(Side::A)?;
        keepalived.start(Side::B)?;
        Ok(keepalived)
    }

    fn start(&mut self, side: Side) -> Result<()> {
        let path = |kind: &str| {
            let file = self.directory.path().join(format!("{kind}-{}", side.tag()));
            file.to_string_lossy().into_owned()
        };
        let (file, pid, child, log) = (path("conf"), path("pid"), path("vrrp"), path("log"));
        let configuration = format!(
            "vrrp_instance web {{\n  state BACKUP\n  nopreempt\n  interface eth0\n  virtual_router_id 51\n  priority 100\n  \
             virtual_ipaddress {{\n    {service}/24\n  }}\n  virtual_routes {{\n    {CLIENTS} dev eth0 src {service}\n  \
             }}\n}}\n",
            service = SERVICE[0]
        );
        std::fs::write(&file, configuration)?;
        let argv = ["keepalived", "-n", "-l", "-P", "-f", &file, "-p", &pid, "-r", &child];
        self.running[side as usize] = Some(self.ns(side).spawn(&argv, Some(log.as_ref()))?);
        Ok(())
    }

    /// Until a side has the address.
    fn wait(&self, side: Side) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(10);
        while !self.ns(side).ip("-4 -o addr show dev eth0")?.contains(&format!("{}/", SERVICE[0])) {
            if Instant::now() > end {
                let log = self.running[side as usize].as_ref().map(Running::output);
                bail!("keepalived did not take the address: {}", log.unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn stop(&mut self, side: Side) -> Result<()> {
        if let Some(running) = self.running[side as usize].take() {
            running.signal(Signal::TERM)?;
            running.wait(Duration::from_secs(5))?;
        }
        Ok(())
    }
}

impl Drop for Keepalived {
    fn drop(&mut self) {
        for side in [Side::B, Side::A] {
            // Its child would outlive it; the laboratory ends what is left.
            drop(self.stop(side));
        }
    }
}

impl Peer for Keepalived {
    fn lab(&self) -> &SwitchLab {
        &self.lab
    }

    fn switch(&mut self, to: Side) -> Result<u64> {
        let begun = now_ns();
        self.stop(to.other())?;
        self.wait(to)?;
        self.start(to.other())?;
        Ok(begun)
    }

    fn settles_s(&self) -> f64 {
        1.0
    }
}
