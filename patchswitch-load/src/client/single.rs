//! Requests on connections of their own.
//!
//! Every other one asks the server to close, the rest close by themselves: so both sides get connections in
//! TIME_WAIT, and a switch meets both.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::timeout_at;

use super::Shared;
use super::connection::Connection;
use crate::clock;
use crate::http;
use crate::record::{ErrorKind, Ticket, Trace};

/// How long the server may take to close after an answer that said so. Not part of the request.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// Starts one.
pub(super) fn start(shared: &Rc<Shared>, ticket: Ticket) {
    tokio::task::spawn_local(request(Rc::clone(shared), ticket));
}

async fn request(shared: Rc<Shared>, ticket: Ticket) {
    let deadline = shared.deadline(&ticket);
    // Outside of the exchange, so that they are known when it is cut off by the time-out.
    let (mut connection, mut trace) = (None, Trace::default());
    let server_closes = ticket.number % 8 < 4;
    let exchange = exchange(&shared, &ticket, server_closes, &mut connection, &mut trace);
    let result = match timeout_at(deadline, exchange).await {
        Ok(result) => result,
        Err(_) => Err(ErrorKind::TimeOut),
    };
    match result {
        Ok(instance) => shared.recorder.borrow_mut().answer(ticket, instance),
        Err(error) => {
            trace.local = connection.as_ref().and_then(Connection::local);
            shared.recorder.borrow_mut().fail(ticket, trace, error);
            return;
        }
    }
    if let Some(connection) = connection.filter(|_| server_closes) {
        connection.close_after_server(CLOSE_LIMIT).await;
    }
}

async fn exchange(
    shared: &Shared,
    ticket: &Ticket,
    close: bool,
    slot: &mut Option<Connection>,
    trace: &mut Trace,
) -> Result<u8, ErrorKind> {
    let target = shared.settings.target(ticket.family).ok_or(ErrorKind::Unreachable)?;
    trace.opened_ns = Some(clock::now_ns());
    let connection = slot.insert(Connection::open(target, None).await?);
    let host = shared.settings.host(target);
    let question = http::question(&shared.settings.path, &host, ticket.number, close);
    let answered = connection.get(&question).await?;
    let instance = shared.instance(&answered);
    trace.instance = Some(instance);
    match answered.head.status {
        200 => Ok(instance),
        status => Err(ErrorKind::BadStatus(status)),
    }
}
