//! Many TCP connections to a side, idle: what a partition has when it retires.
//!
//! The service's ends wait in the queue of a listener, where they are whole connections but no open files. The clients'
//! ends are files, of which one process may not have as many as are wanted: helpers hold most of them.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use patchswitch_tests::netlab::{CLIENT_LINK, SERVICE};
use patchswitch_tests::programs::Running;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, listen, socket_with};

use crate::peers::{Peer, Side};

/// Where they are accepted.
pub(crate) const PORT: u16 = 81;
/// Of each client address, and of each process.
const OF_EACH: u32 = 15_000;
/// The first port of a client.
const FIRST: u16 = 20_000;
/// What a helper says when it has its connections.
const READY: &str = "ready";

/// The connections.
#[derive(Debug)]
pub(crate) struct Flows {
    /// Those of this process; their other ends are the first in the listener's queue.
    pub(crate) clients: Vec<TcpStream>,
    /// Closed first: that resets all of them, and leaves nothing in TIME_WAIT.
    listener: Option<TcpListener>,
    _helpers: Vec<Running>,
    count: u32,
    _directory: tempfile::TempDir,
}

impl Flows {
    /// Opens them, from as many addresses as it takes.
    pub(crate) fn open(peer: &dyn Peer, to: Side, count: u32) -> Result<Self> {
        let listener = listen_in(peer, to, count)?;
        let directory = tempfile::tempdir()?;
        let own = count.min(OF_EACH);
        let client = &peer.lab().client;
        client.ip(&format!("addr replace {}/24 dev {CLIENT_LINK}", address(0)))?;
        let clients = client.enter(|| dial_all(address(0), own))?;
        let mut flows =
            Self { clients, listener: Some(listener), _helpers: Vec::new(), count, _directory: directory };
        flows.help(peer, count - own)?;
        Ok(flows)
    }

    /// The rest, by helpers.
    fn help(&mut self, peer: &dyn Peer, mut rest: u32) -> Result<()> {
        let client = &peer.lab().client;
        let program = std::env::current_exe()?.to_string_lossy().into_owned();
        for number in 1.. {
            if rest == 0 {
                break;
            }
            let (from, part) = (address(number).to_string(), rest.min(OF_EACH).to_string());
            client.ip(&format!("addr replace {from}/24 dev {CLIENT_LINK}"))?;
            let output = self._directory.path().join(&from);
            self._helpers.push(client.spawn(&[&program, "--hold", &from, &part], Some(&output))?);
            rest -= rest.min(OF_EACH);
        }
        let end = Instant::now() + Duration::from_secs(60);
        for helper in &mut self._helpers {
            while !helper.output().contains(READY) {
                if helper.has_ended() || Instant::now() > end {
                    bail!("the connections could not be opened: {}", helper.output());
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    pub(crate) fn len(&self) -> usize {
        self.count as usize
    }

    /// Sends a byte over so many of them; how many come to the other end that was there all the time.
    pub(crate) fn alive(&self, sample: usize) -> Result<usize> {
        let listener = self.listener.as_ref().context("no listener")?;
        let mut alive = 0;
        for mut client in self.clients.iter().take(sample) {
            let (mut server, from) = listener.accept()?;
            ensure!(client.local_addr()? == from, "{from} came before its turn");
            client.write_all(b"?")?;
            server.set_read_timeout(Some(Duration::from_millis(500)))?;
            alive += usize::from(server.read(&mut [0; 1]).is_ok_and(|length| length == 1));
        }
        Ok(alive)
    }
}

impl Drop for Flows {
    fn drop(&mut self) {
        drop(self.listener.take());
    }
}

fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, 100 + number)
}

fn listen_in(peer: &dyn Peer, to: Side, count: u32) -> Result<TcpListener> {
    let ns = peer.ns(to);
    ns.sysctl("net/core/somaxconn", &(count + 100).to_string())?;
    ns.enter(|| {
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        bind(&socket, &SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)))?;
        listen(&socket, i32::try_from(count + 100)?)?;
        Ok(TcpListener::from(socket))
    })
}

fn dial_all(from: Ipv4Addr, count: u32) -> Result<Vec<TcpStream>> {
    let target = SocketAddr::new(SERVICE[0].parse()?, PORT);
    let dial = |number: u16| {
        let local = SocketAddr::new(from.into(), FIRST + number);
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        bind(&socket, &local).with_context(|| format!("failed to bind {local}"))?;
        connect(&socket, &target).with_context(|| format!("failed to connect {local}"))?;
        Ok(TcpStream::from(socket))
    };
    (0..u16::try_from(count)?).map(dial).collect()
}

/// What a helper does: opens its part, says so, and waits to be ended.
pub(crate) fn hold(from: &str, count: &str) -> Result<()> {
    let held = dial_all(from.parse()?, count.parse()?)?;
    crate::report::say(READY);
    // Longer than any measurement, but not for ever.
    std::thread::sleep(Duration::from_secs(1800));
    drop(held);
    Ok(())
}
