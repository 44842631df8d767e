//! The host's end of the agent's port.
//!
//! QEMU has one connection for all commands. The [`Switchboard`] holds it and offers a UNIX socket beside it on which
//! every connection is one command; xtask itself and the test runner's processes use that socket alike.

use std::collections::HashMap;
use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use patchswitch_guest::{End, Frame, Kind, Request, STDIN_WINDOW};

/// How long a client may leave its output unread before it is given up; it would hold up the others.
const CLIENT_LIMIT: Duration = Duration::from_secs(30);

/// How long the machine may take to notice a request. Its processor is emulated and may be busy, but not for so long.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

type Clients = Arc<Mutex<HashMap<u32, UnixStream>>>;

/// Connects commands with the machine.
pub(crate) struct Switchboard {
    port: Arc<Mutex<UnixStream>>,
}

impl Switchboard {
    /// Serves `socket` with the machine behind `port`. What is received is the machine's word that it is ready.
    pub(crate) fn start(port: &UnixStream, socket: &Path) -> Result<(Self, Receiver<String>)> {
        let clients = Clients::default();
        let writer = Arc::new(Mutex::new(port.try_clone()?));
        let (ready, readiness) = channel();
        let (mut reader, for_reader) = (port.try_clone()?, Arc::clone(&clients));
        thread::spawn(move || {
            // The end of the machine is the end of every command in it, however it comes.
            while let Ok(Some(frame)) = Frame::read(&mut reader) {
                if frame.kind == Kind::Ready {
                    // Nobody listens any more once the start was given up.
                    let _late = ready.send(String::from_utf8_lossy(&frame.body).into_owned());
                } else {
                    deliver(&for_reader, frame);
                }
            }
            for (_, client) in lock(&for_reader).drain() {
                hang_up(&client);
            }
        });
        let listener = UnixListener::bind(socket).with_context(|| socket.display().to_string())?;
        let for_listener = Arc::clone(&writer);
        thread::spawn(move || {
            let next = AtomicU32::new(1);
            for client in listener.incoming().map_while(std::result::Result::ok) {
                let id = next.fetch_add(1, Ordering::Relaxed);
                let (clients, port) = (Arc::clone(&clients), Arc::clone(&for_listener));
                thread::spawn(move || serve(id, client, &clients, &port));
            }
        });
        Ok((Self { port: writer }, readiness))
    }

    /// Asks the machine to write its disks and end.
    pub(crate) fn power_off(&self) -> Result<()> {
        Ok(Frame::new(Kind::PowerOff, 0, Vec::new()).write(&mut *lock(&self.port))?)
    }
}

/// Passes one client's frames on to the machine under the number `id`.
fn serve(id: u32, mut client: UnixStream, clients: &Clients, port: &Mutex<UnixStream>) {
    let Ok(writer) = client.try_clone() else { return };
    if writer.set_write_timeout(Some(CLIENT_LIMIT)).is_err() {
        return;
    }
    lock(clients).insert(id, writer);
    while let Ok(Some(frame)) = Frame::read(&mut client) {
        if (Frame { id, ..frame }).write(&mut *lock(port)).is_err() {
            hang_up(&client);
        }
    }
    if lock(clients).remove(&id).is_some() {
        // The client left before its command's end.
        let _gone = Frame::new(Kind::Kill, id, Vec::new()).write(&mut *lock(port));
    }
}

fn deliver(clients: &Clients, frame: Frame) {
    let id = frame.id;
    let over = frame.kind == Kind::End;
    let client = {
        let mut clients = lock(clients);
        if over { clients.remove(&id) } else { clients.get(&id).and_then(|c| c.try_clone().ok()) }
    };
    let Some(mut client) = client else { return };
    if (Frame { id: 0, ..frame }).write(&mut client).is_err() || over {
        hang_up(&client);
    }
}

fn hang_up(client: &UnixStream) {
    // It may have hung up itself.
    let _gone = client.shutdown(Shutdown::Both);
}

/// Which of its outputs a command wrote to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Out,
    Err,
}

/// Runs a command in the machine behind `socket`; `sink` gets its output as it comes.
///
/// # Errors
/// If the machine ends before the command does: that is never a success.
pub(crate) fn run(
    socket: &Path,
    request: &Request,
    sink: impl FnMut(Stream, &[u8]) -> Result<()>,
) -> Result<End> {
    let mut connection = UnixStream::connect(socket).context("the test machine is not running")?;
    Frame::json(Kind::Run, 0, request)?.write(&mut connection)?;
    follow(connection, None, sink)
}

/// Like [`run`], with input from `input`.
pub(crate) fn run_with_input(
    socket: &Path,
    request: &Request,
    mut input: impl std::io::Read + Send + 'static,
    sink: impl FnMut(Stream, &[u8]) -> Result<()>,
) -> Result<End> {
    let mut connection = UnixStream::connect(socket).context("the test machine is not running")?;
    let request = Request { stdin: true, ..request.clone() };
    Frame::json(Kind::Run, 0, &request)?.write(&mut connection)?;
    let window = Arc::new(Window::default());
    let (mut writer, sent) = (connection.try_clone()?, Arc::clone(&window));
    // Left behind if the command ends first: it may be waiting for a terminal.
    thread::spawn(move || -> std::io::Result<()> {
        let mut piece = vec![0; 1 << 16];
        loop {
            let length = match input.read(&mut piece) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                other => other?,
            };
            if length > 0 && !sent.reserve(length) {
                return Ok(());
            }
            Frame::new(Kind::Stdin, 0, &piece[..length]).write(&mut writer)?;
            if length == 0 {
                return writer.flush();
            }
        }
    });
    let end = follow(connection, Some(&window), sink);
    window.close();
    end
}

/// A sink for [`run`]: this process's own outputs.
pub(crate) fn to_terminal(stream: Stream, bytes: &[u8]) -> Result<()> {
    match stream {
        Stream::Out => std::io::stdout().lock().write_all(bytes)?,
        Stream::Err => std::io::stderr().lock().write_all(bytes)?,
    }
    Ok(())
}

fn follow(
    mut connection: UnixStream,
    window: Option<&Window>,
    mut sink: impl FnMut(Stream, &[u8]) -> Result<()>,
) -> Result<End> {
    connection.set_read_timeout(Some(ANSWER_LIMIT))?;
    while let Some(frame) = Frame::read(&mut connection).context("the test machine does not answer")? {
        match frame.kind {
            Kind::Taken => connection.set_read_timeout(None)?,
            Kind::Stdout => sink(Stream::Out, &frame.body)?,
            Kind::Stderr => sink(Stream::Err, &frame.body)?,
            Kind::End => return Ok(serde_json::from_slice(&frame.body)?),
            Kind::StdinTaken => {
                let bytes = frame.body.as_slice().try_into().map(u32::from_le_bytes).unwrap_or(0);
                if let Some(window) = window {
                    window.release(bytes as usize);
                }
            }
            other => bail!("unexpected {other:?} from the test machine"),
        }
    }
    bail!("the test machine ended before the command did")
}

/// Input that is on its way.
#[derive(Default)]
struct Window {
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Window {
    /// Waits for room; false if there is nobody to take it any more.
    fn reserve(&self, bytes: usize) -> bool {
        let mut state = lock(&self.state);
        while state.0 + bytes > STDIN_WINDOW && !state.1 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.0 += bytes;
        !state.1
    }

    fn release(&self, bytes: usize) {
        let mut state = lock(&self.state);
        state.0 = state.0.saturating_sub(bytes);
        self.changed.notify_all();
    }

    fn close(&self) {
        lock(&self.state).1 = true;
        self.changed.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
