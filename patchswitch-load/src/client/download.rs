//! Long downloads, slowed down by their reader, and known by their digest.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::time::{Instant, timeout};

use super::connection::Connection;
use super::{DownloadSettings, LoadError, Settings, Shared};
use crate::clock;
use crate::control::{Reply, Response};
use crate::http;
use crate::record::{Class, ErrorKind, Ticket, Trace};
use crate::report::Download;

/// A slow reader reads this often: often enough that the window does not close for long.
const TICK: Duration = Duration::from_millis(50);
/// A small receive buffer makes the reader's slowness the server's.
const RECEIVE_BUFFER: u32 = 64 * 1024;
/// How much a reader in a hurry takes at once.
const HURRY: usize = 64 * 1024;

/// What has come so far.
#[derive(Debug, Default)]
struct Body {
    bytes: u64,
    hash: Sha256,
}

/// Where the expected digest is not given: downloads the file once in each family, at full speed.
pub(super) async fn learn_digest(settings: &mut Settings) -> Result<(), LoadError> {
    let Some(DownloadSettings { path, sha256: None, .. }) = settings.download.clone() else { return Ok(()) };
    let mut learned: Option<String> = None;
    for family in settings.families() {
        let Some(target) = settings.target(family) else { continue };
        let failed = |source| LoadError::Download { path: path.clone(), target, source };
        let question = http::question(&path, &settings.host(target), 0, true);
        let mut body = Body::default();
        let download = async {
            let mut connection = open(target, settings.time_out, None).await?;
            read(&mut connection, &question, settings.time_out, &mut body, async |_| HURRY).await
        };
        download.await.map_err(failed)?;
        let digest = hexadecimal(body.hash);
        match learned.take() {
            Some(first) if first != digest => {
                return Err(LoadError::Contents { path, first, second: digest });
            }
            _ => learned = Some(digest),
        }
    }
    if let Some(download) = &mut settings.download {
        download.sha256 = learned;
    }
    Ok(())
}

/// Starts one download in each family.
pub(super) fn start(shared: &Rc<Shared>) -> Response {
    if shared.settings.download.is_none() {
        return Response::error("no download was configured");
    }
    shared.hurry.set(false);
    for family in shared.settings.families() {
        let ticket = shared.issue(Class::Download, family, clock::now_ns());
        shared.downloading.set(shared.downloading.get() + 1);
        tokio::task::spawn_local(download(Rc::clone(shared), ticket));
    }
    Response::Done
}

/// Lets all downloads go on at full speed, and answers when they have ended.
pub(super) fn finish(shared: &Rc<Shared>, reply: Reply) {
    shared.hurry.set(true);
    let shared = Rc::clone(shared);
    tokio::task::spawn_local(async move {
        while shared.downloading.get() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let failed = shared.downloads.borrow().iter().filter(|download| !download.ok).count();
        reply.give(if failed == 0 { Response::Done } else { Response::error("a download failed") });
    });
}

async fn download(shared: Rc<Shared>, ticket: Ticket) {
    let started_ns = clock::now_ns();
    let (mut body, mut trace) = (Body::default(), Trace { opened_ns: Some(started_ns), ..Trace::default() });
    let mut result = paced(&shared, &ticket, &mut body, &mut trace).await;
    let sha256 = hexadecimal(body.hash);
    let expected = shared.settings.download.as_ref().and_then(|download| download.sha256.as_ref());
    if result.is_ok() && expected.is_some_and(|expected| *expected != sha256) {
        result = Err(ErrorKind::BadDigest(sha256.clone()));
    }
    let ok = result.is_ok();
    let mut recorder = shared.recorder.borrow_mut();
    match result {
        Ok(instance) => recorder.answer(ticket, instance),
        Err(error) => recorder.fail(ticket, trace, error),
    }
    shared.downloads.borrow_mut().push(Download {
        number: ticket.number,
        family: ticket.family,
        started_ns,
        ended_ns: clock::now_ns(),
        bytes: body.bytes,
        sha256,
        ok,
        instance: trace.instance.and_then(|index| recorder.instances.get(usize::from(index)).cloned()),
    });
    shared.downloading.set(shared.downloading.get().saturating_sub(1));
}

async fn paced(
    shared: &Shared,
    ticket: &Ticket,
    body: &mut Body,
    trace: &mut Trace,
) -> Result<u8, ErrorKind> {
    let settings = &shared.settings;
    let (Some(target), Some(wanted)) = (settings.target(ticket.family), &settings.download) else {
        return Err(ErrorKind::Unreachable);
    };
    let mut connection = open(target, settings.time_out, Some(RECEIVE_BUFFER)).await?;
    trace.local = connection.local();
    let question = http::question(&wanted.path, &settings.host(target), ticket.number, true);
    let begin = Instant::now();
    let pace = async |got: u64| {
        loop {
            // As much as is due by now; nothing is read ahead of the rate.
            let due = begin.elapsed().as_millis() * u128::from(wanted.bytes_per_second) / 1000;
            let allowed = usize::try_from(due.saturating_sub(u128::from(got))).unwrap_or(HURRY);
            if shared.hurry.get() {
                return HURRY;
            }
            if allowed > 0 {
                return allowed.min(HURRY);
            }
            tokio::time::sleep(TICK).await;
        }
    };
    let head = read(&mut connection, &question, settings.time_out, body, pace).await?;
    let name = head.instance.or(head.server).unwrap_or_default();
    let instance = shared.recorder.borrow_mut().instance(&name);
    trace.instance = Some(instance);
    Ok(instance)
}

async fn open(
    target: SocketAddr,
    limit: Duration,
    receive_buffer: Option<u32>,
) -> Result<Connection, ErrorKind> {
    match timeout(limit, Connection::open(target, receive_buffer)).await {
        Ok(result) => result,
        Err(_) => Err(ErrorKind::TimeOut),
    }
}

/// Asks and reads to the end. `pace` says how many bytes may be read next, after waiting if need be. Each read has
/// the time limit; the whole has none.
async fn read(
    connection: &mut Connection,
    question: &str,
    limit: Duration,
    body: &mut Body,
    pace: impl AsyncFn(u64) -> usize,
) -> Result<http::AnswerHead, ErrorKind> {
    let head = match timeout(limit, connection.ask(question)).await {
        Ok(head) => head?,
        Err(_) => return Err(ErrorKind::TimeOut),
    };
    if head.status != 200 {
        return Err(ErrorKind::BadStatus(head.status));
    }
    let Some(wanted) = head.body else {
        return Err(ErrorKind::BadAnswer("a download without a length".into()));
    };
    while body.bytes < wanted {
        let allowed = pace(body.bytes).await;
        let left = usize::try_from(wanted - body.bytes).unwrap_or(usize::MAX);
        let bytes = match timeout(limit, connection.read_some(allowed.min(left))).await {
            Ok(bytes) => bytes?,
            Err(_) => return Err(ErrorKind::TimeOut),
        };
        if bytes.is_empty() {
            return Err(ErrorKind::Short { got: body.bytes, wanted });
        }
        body.hash.update(&bytes);
        body.bytes += bytes.len() as u64;
    }
    Ok(head)
}

fn hexadecimal(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
