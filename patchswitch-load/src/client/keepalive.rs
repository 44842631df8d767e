//! Kept connections: a queue of requests that are due, and workers that own a connection each.
//!
//! A request waits in the queue while all connections are busy, and its latency counts from the moment it was due.
//! A connection is renewed because of its age only when nothing is under way on it, so that no request races with
//! its end; one that the server closes between two requests is replaced quietly, as every browser does.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::Shared;
use super::connection::Connection;
use crate::clock;
use crate::http;
use crate::record::{ErrorKind, Family, Ticket, Trace};

/// The connections of one family.
#[derive(Debug)]
pub(super) struct Pool {
    queue: Rc<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: RefCell<VecDeque<Ticket>>,
    changed: Notify,
}

impl Queue {
    async fn next(&self) -> Ticket {
        loop {
            if let Some(ticket) = self.waiting.borrow_mut().pop_front() {
                return ticket;
            }
            self.changed.notified().await;
        }
    }
}

impl Pool {
    /// Starts the workers. Their connections get different first ages, so that they are not all renewed at once.
    pub(super) fn start(shared: &Rc<Shared>, family: Family) -> Self {
        let queue = Rc::new(Queue::default());
        let count = u32::try_from(shared.settings.connections.max(1)).unwrap_or(u32::MAX);
        if let Some(target) = shared.settings.target(family) {
            for index in 0..count {
                let renew = shared.settings.renew;
                let worker = Worker {
                    shared: Rc::clone(shared),
                    queue: Rc::clone(&queue),
                    target,
                    host: shared.settings.host(target),
                    connection: None,
                    instance: None,
                    renew_at: shared.start + renew * (index + 1) / count,
                };
                tokio::task::spawn_local(worker.run(renew));
            }
        }
        Self { queue }
    }

    /// Adds a request that is due.
    pub(super) fn push(&self, ticket: Ticket) {
        self.queue.waiting.borrow_mut().push_back(ticket);
        self.queue.changed.notify_one();
    }
}

struct Worker {
    shared: Rc<Shared>,
    queue: Rc<Queue>,
    target: SocketAddr,
    host: String,
    connection: Option<Connection>,
    /// Who answered last on this connection.
    instance: Option<u8>,
    renew_at: Instant,
}

impl Worker {
    async fn run(mut self, renew: Duration) {
        loop {
            let ticket = self.next().await;
            if self.connection.is_none() {
                self.instance = None;
            }
            self.answer(ticket).await;
            if self.connection.is_some() && Instant::now() >= self.renew_at {
                self.connection = None;
                self.shared.sockets.borrow_mut().keepalive_renewed += 1;
            }
            // From the first end on, every connection has its full age.
            if self.connection.is_none() {
                self.renew_at = Instant::now() + renew;
            }
        }
    }

    /// Waits for a request, and meanwhile for the server's closing the connection.
    async fn next(&mut self) -> Ticket {
        loop {
            let Some(connection) = &self.connection else { return self.queue.next().await };
            tokio::select! {
                biased;
                () = connection.ended() => self.forget(),
                ticket = self.queue.next() => {
                    if connection.is_stale() {
                        self.forget();
                    }
                    return ticket;
                }
            }
        }
    }

    fn forget(&mut self) {
        self.connection = None;
        self.shared.sockets.borrow_mut().keepalive_closed_by_server += 1;
    }

    async fn answer(&mut self, ticket: Ticket) {
        let deadline = self.shared.deadline(&ticket);
        let mut opened_ns = self.connection.as_ref().map(|connection| connection.opened_ns);
        let result = match timeout_at(deadline, self.exchange(&ticket, &mut opened_ns)).await {
            Ok(result) => result,
            Err(_) => Err(ErrorKind::TimeOut),
        };
        match result {
            Ok(instance) => self.shared.recorder.borrow_mut().answer(ticket, instance),
            Err(error) => {
                let local = self.connection.as_ref().and_then(Connection::local);
                let trace = Trace { opened_ns, local, instance: self.instance };
                self.shared.recorder.borrow_mut().fail(ticket, trace, error);
                self.connection = None;
            }
        }
    }

    async fn exchange(&mut self, ticket: &Ticket, opened_ns: &mut Option<u64>) -> Result<u8, ErrorKind> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => {
                *opened_ns = Some(clock::now_ns());
                let connection = Connection::open(self.target, None).await?;
                self.shared.sockets.borrow_mut().keepalive_opened += 1;
                none.insert(connection)
            }
        };
        let question = http::question(&self.shared.settings.path, &self.host, ticket.number, false);
        let answered = connection.get(&question).await?;
        let instance = self.shared.instance(&answered);
        self.instance = Some(instance);
        if answered.head.status != 200 {
            return Err(ErrorKind::BadStatus(answered.head.status));
        }
        if answered.head.close {
            self.connection = None;
            self.shared.sockets.borrow_mut().keepalive_told_to_close += 1;
        }
        Ok(instance)
    }
}
