//! HAProxy on the host. A new process gets the listeners of the old one, which ends with its last connection.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use patchswitch_load::clock::now_ns;
use patchswitch_tests::netlab::{SERVICE, SwitchLab, UPLINK};
use patchswitch_tests::programs::Running;
use patchswitch_tests::traffic::PORT;

use super::{Peer, Side, inner, route_to_both};

#[derive(Debug)]
pub(crate) struct Haproxy {
    /// The youngest one is the last. Ended before the laboratory goes.
    running: Vec<Running>,
    directory: tempfile::TempDir,
    lab: SwitchLab,
}

impl Haproxy {
    pub(crate) fn new() -> Result<Self> {
        let lab = SwitchLab::new("haproxy")?;
        route_to_both(&lab)?;
        // It has a connection of its own for each of its clients', and needs as many ports as they do.
        lab.host.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
        lab.host.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
        lab.host.ip(&format!("addr add {}/32 dev {UPLINK}", SERVICE[0]))?;
        let mut haproxy = Self { running: Vec::new(), directory: tempfile::tempdir()?, lab };
        haproxy.start(Side::A)?;
        Ok(haproxy)
    }

    fn start(&mut self, to: Side) -> Result<()> {
        let path = |name: &str| self.directory.path().join(name).to_string_lossy().into_owned();
        let (file, socket, log) = (path("conf"), path("socket"), path("log"));
        std::fs::write(&file, configuration(&socket, to))?;
        let old = self.running.last().map(|old| old.pid().to_string());
        let mut argv = vec!["haproxy", "-db", "-f", &file];
        if let Some(old) = &old {
            argv.extend(["-x", &socket, "-sf", old]);
        }
        self.running.push(self.lab.host.spawn(&argv, Some(log.as_ref()))?);
        self.wait(to, &socket)?;
        self.running.retain_mut(|one| !one.has_ended());
        Ok(())
    }

    /// Until the one that was started answers on the administrator's socket with the backend that it has.
    fn wait(&mut self, to: Side, socket: &str) -> Result<()> {
        let wanted = inner(to);
        for _ in 0..200 {
            if self.running.last_mut().is_none_or(Running::has_ended) {
                break;
            }
            if ask(socket).is_ok_and(|text| text.contains(wanted)) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        ensure!(false, "HAProxy did not start: {}", self.running.last().context("none")?.output());
        Ok(())
    }
}

fn ask(socket: &str) -> std::io::Result<String> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::os::unix::net::UnixStream::connect(socket)?;
    stream.write_all(b"show servers state\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn configuration(socket: &str, to: Side) -> String {
    let (service, server) = (SERVICE[0], inner(to));
    format!(
        "global\n  stats socket {socket} mode 600 level admin expose-fd listeners\n  nbthread 1\n\
         defaults\n  mode tcp\n  timeout connect 1s\n  timeout client 60s\n  timeout server 60s\n\
         listen web\n  bind {service}:{PORT}\n  bind {service}:{}\n  bind {service}:{}\n  server one {server}\n",
        crate::probe::TCP_PROBE,
        crate::rr::PORT,
    )
}

impl Peer for Haproxy {
    fn lab(&self) -> &SwitchLab {
        &self.lab
    }

    fn switch(&mut self, to: Side) -> Result<u64> {
        let begun = now_ns();
        self.start(to)?;
        Ok(begun)
    }

    fn has_udp(&self) -> bool {
        false
    }
}
