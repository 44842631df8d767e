//! Connections that are opened, left alone, and used for one request when told.

use std::rc::Rc;

use tokio::time::timeout;

use super::Shared;
use super::connection::Connection;
use crate::clock;
use crate::control::{Reply, Response};
use crate::http;
use crate::record::{Class, ErrorKind, Family, Ticket, Trace};
use crate::report::IdleUse;

/// The unused connections. Never opened again by itself: one that was opened after the switch would prove nothing.
#[derive(Debug)]
pub(super) struct Idle {
    shared: Rc<Shared>,
    unused: Rc<std::cell::RefCell<Vec<(Family, Connection)>>>,
}

impl Idle {
    /// None yet, unless the settings want some from the start.
    pub(super) fn new(shared: &Rc<Shared>) -> Self {
        let idle = Self { shared: Rc::clone(shared), unused: Rc::default() };
        if shared.settings.idle {
            idle.open(Reply::nobody());
        }
        idle
    }

    /// Opens one in each family, in place of those that are still unused.
    pub(super) fn open(&self, reply: Reply) {
        self.unused.borrow_mut().clear();
        let (shared, unused) = (Rc::clone(&self.shared), Rc::clone(&self.unused));
        tokio::task::spawn_local(async move {
            let mut response = Response::Done;
            for family in shared.settings.families() {
                match open(&shared, family).await {
                    Ok(connection) => unused.borrow_mut().push((family, connection)),
                    Err(error) => {
                        response = Response::Error(format!("failed to open an idle connection: {error}"));
                    }
                }
            }
            reply.give(response);
        });
    }

    /// Uses each for one request, and answers when all have ended. A family whose connection could not be opened
    /// has a failed use: it was asked for and is not there.
    pub(super) fn use_all(&self, reply: Reply) {
        let (shared, unused) = (Rc::clone(&self.shared), self.unused.take());
        let now = clock::now_ns();
        let issue = |family| shared.issue(Class::Idle, family, now);
        let tickets: Vec<_> = shared.settings.families().into_iter().map(issue).collect();
        tokio::task::spawn_local(async move {
            let mut unused = unused;
            let mut all = true;
            for ticket in tickets {
                let index = unused.iter().position(|(family, _)| *family == ticket.family);
                let connection = index.map(|index| unused.swap_remove(index).1);
                all &= use_one(&shared, ticket, connection).await;
            }
            reply.give(if all {
                Response::Done
            } else {
                Response::error("an idle connection was not answered")
            });
        });
    }
}

async fn open(shared: &Shared, family: Family) -> Result<Connection, ErrorKind> {
    let target = shared.settings.target(family).ok_or(ErrorKind::Unreachable)?;
    match timeout(shared.settings.time_out, Connection::open(target, None)).await {
        Ok(result) => result,
        Err(_) => Err(ErrorKind::TimeOut),
    }
}

async fn use_one(shared: &Shared, ticket: Ticket, connection: Option<Connection>) -> bool {
    let opened_ns = connection.as_ref().map(|connection| connection.opened_ns);
    let mut trace = Trace { opened_ns, ..Trace::default() };
    let result = match connection {
        Some(connection) => exchange(shared, &ticket, connection, &mut trace).await,
        None => Err(ErrorKind::Other("no idle connection is open".into())),
    };
    let ok = result.is_ok();
    let mut recorder = shared.recorder.borrow_mut();
    match result {
        Ok(instance) => recorder.answer(ticket, instance),
        Err(error) => recorder.fail(ticket, trace, error),
    }
    let instance = trace.instance.and_then(|index| recorder.instances.get(usize::from(index)).cloned());
    shared.idle_uses.borrow_mut().push(IdleUse {
        number: ticket.number,
        family: ticket.family,
        opened_ns: opened_ns.unwrap_or(ticket.due_ns),
        used_ns: ticket.due_ns,
        ok,
        instance,
    });
    ok
}

async fn exchange(
    shared: &Shared,
    ticket: &Ticket,
    mut connection: Connection,
    trace: &mut Trace,
) -> Result<u8, ErrorKind> {
    trace.local = connection.local();
    let target = shared.settings.target(ticket.family).ok_or(ErrorKind::Unreachable)?;
    let host = shared.settings.host(target);
    let question = http::question(&shared.settings.path, &host, ticket.number, true);
    let answered = match timeout(shared.settings.time_out, connection.get(&question)).await {
        Ok(answered) => answered?,
        Err(_) => return Err(ErrorKind::TimeOut),
    };
    let instance = shared.instance(&answered);
    trace.instance = Some(instance);
    match answered.head.status {
        200 => Ok(instance),
        status => Err(ErrorKind::BadStatus(status)),
    }
}
