//! Datagrams and their echoes.
//!
//! The sockets are **not** connected: on a connected one the kernel throws an answer from a stranger away, and it
//! would look like a loss. Here it is seen for what it is.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use rustix::net::{SendFlags, sendto};
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::{LoadError, Shared};
use crate::clock;
use crate::echo;
use crate::http::shorten;
use crate::record::{ErrorKind, Family, Ticket, Trace};

/// The sockets of one family, used in turn.
#[derive(Debug)]
pub(super) struct Flows {
    shared: Rc<Shared>,
    target: SocketAddr,
    flows: Vec<Flow>,
    /// Replaced, but with answers still to come.
    retired: Vec<Flow>,
    next: usize,
    session: u32,
}

#[derive(Debug)]
struct Flow {
    inner: Rc<Inner>,
    receiver: JoinHandle<()>,
    renew_at: Instant,
}

#[derive(Debug)]
struct Inner {
    socket: UdpSocket,
    target: SocketAddr,
    session: u32,
    opened_ns: u64,
    waiting: RefCell<VecDeque<Ticket>>,
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.receiver.abort();
    }
}

impl Flows {
    /// Opens the sockets. They get different first ages, so that they are not all renewed at once.
    pub(super) fn new(shared: &Rc<Shared>, family: Family) -> Result<Self, LoadError> {
        let settings = &shared.settings;
        let address = settings.target(family).map(|target| target.ip());
        let address = address.ok_or_else(|| LoadError::Targets(settings.targets.clone()))?;
        let target = SocketAddr::new(address, settings.udp_port.unwrap_or(0));
        // Other runs' answers are not ours: the number of the process and the time tell them apart.
        let session = std::process::id() ^ u32::try_from((clock::now_ns() / 1000) & 0xffff_ffff).unwrap_or(0);
        let count = u32::try_from(settings.udp_flows.max(1)).unwrap_or(u32::MAX);
        let open = |index| {
            let renew_at = shared.start + settings.renew * (index + 1) / count;
            Flow::open(shared, target, session, renew_at)
        };
        let flows = (0..count).map(open).collect::<std::io::Result<_>>();
        let flows = flows.map_err(|source| LoadError::Io { action: "open a datagram socket", source })?;
        Ok(Self { shared: Rc::clone(shared), target, flows, retired: Vec::new(), next: 0, session })
    }

    /// Sends one.
    pub(super) fn send(&mut self, ticket: Ticket) {
        let index = self.next % self.flows.len();
        self.next += 1;
        self.renew(index);
        let Some(flow) = self.flows.get(index) else { return };
        let bytes = echo::question(self.session, ticket.number);
        // Noted before it is sent, for the answer may be there before the call is back.
        flow.inner.waiting.borrow_mut().push_back(ticket);
        // By the kernel's own call: the runtime does not know yet that a fresh socket can be written to. A queue that
        // is full is waited for by nobody: an open loop counts it as failed.
        if let Err(error) = sendto(&flow.inner.socket, &bytes, SendFlags::DONTWAIT, &self.target) {
            flow.inner.waiting.borrow_mut().pop_back();
            let error = std::io::Error::from(error).into();
            self.shared.recorder.borrow_mut().fail(ticket, flow.inner.trace(), error);
        }
    }

    fn renew(&mut self, index: usize) {
        let now = Instant::now();
        let Some(flow) = self.flows.get_mut(index).filter(|flow| now >= flow.renew_at) else { return };
        let renew_at = now + self.shared.settings.renew.max(Duration::from_millis(10));
        // Without a fresh socket the old one goes on.
        if let Ok(fresh) = Flow::open(&self.shared, self.target, self.session, renew_at) {
            self.retired.push(std::mem::replace(flow, fresh));
        }
    }

    /// Gives up what was not answered in time, and closes retired sockets that wait for nothing.
    pub(super) fn sweep(&mut self) {
        let limit = u64::try_from(self.shared.settings.time_out.as_nanos()).unwrap_or(u64::MAX);
        let now = clock::now_ns();
        for flow in self.flows.iter().chain(&self.retired) {
            let late = |ticket: &Ticket| ticket.due_ns.saturating_add(limit) <= now;
            loop {
                let mut waiting = flow.inner.waiting.borrow_mut();
                let Some(ticket) = waiting.pop_front_if(|ticket| late(ticket)) else { break };
                self.shared.recorder.borrow_mut().fail(ticket, flow.inner.trace(), ErrorKind::TimeOut);
            }
        }
        self.retired.retain(|flow| !flow.inner.waiting.borrow().is_empty());
    }
}

impl Flow {
    fn open(
        shared: &Rc<Shared>,
        target: SocketAddr,
        session: u32,
        renew_at: Instant,
    ) -> std::io::Result<Self> {
        let any: IpAddr = match target.ip() {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = std::net::UdpSocket::bind((any, 0))?;
        socket.set_nonblocking(true)?;
        let socket = UdpSocket::from_std(socket)?;
        let opened_ns = clock::now_ns();
        let inner = Rc::new(Inner { socket, target, session, opened_ns, waiting: RefCell::default() });
        let receiver = tokio::task::spawn_local(Rc::clone(&inner).receive(Rc::clone(shared)));
        Ok(Self { inner, receiver, renew_at })
    }
}

impl Inner {
    fn trace(&self) -> Trace {
        Trace { opened_ns: Some(self.opened_ns), local: self.socket.local_addr().ok(), instance: None }
    }

    async fn receive(self: Rc<Self>, shared: Rc<Shared>) {
        let mut bytes = [0; echo::DATAGRAM_MAX];
        loop {
            // An error here is a past datagram's; its time-out tells.
            if let Ok((length, source)) = self.socket.recv_from(&mut bytes).await {
                self.take(&shared, &bytes[..length], source);
            }
        }
    }

    fn take(&self, shared: &Shared, bytes: &[u8], source: SocketAddr) {
        let parsed = echo::parse(bytes).filter(|(session, _, _)| *session == self.session);
        let ticket = parsed.and_then(|(_, number, _)| {
            let mut waiting = self.waiting.borrow_mut();
            let index = waiting.iter().position(|ticket| ticket.number == number)?;
            waiting.remove(index)
        });
        let (Some(ticket), Some((_, _, tag))) = (ticket, parsed) else {
            shared.sockets.borrow_mut().udp_stray += 1;
            return;
        };
        let mut recorder = shared.recorder.borrow_mut();
        let instance = recorder.instance(&shorten(&String::from_utf8_lossy(tag)));
        if (source.ip(), source.port()) == (self.target.ip(), self.target.port()) {
            recorder.answer(ticket, instance);
        } else {
            let trace = Trace { instance: Some(instance), ..self.trace() };
            recorder.fail(ticket, trace, ErrorKind::WrongSource(source));
        }
    }
}
