//! The agent's end of the control channel.
//!
//! One server for one boot of one partition. There is no thread behind it: whoever waits for a partition calls
//! [`ControlServer::next`], and while nobody does, messages wait in the kernel. Everything that comes in is hostile:
//! the sender must be a process of this partition's cgroup and must know this boot's nonce, frames are limited before
//! they are stored, and a connection that is silent is closed.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::control::{self, Answer, Boot, FrameError, Frames, Message};
use crate::host::linux::cgroup::Cgroup;
use crate::host::linux::pidfd::Process;
use crate::host::linux::poll;
use crate::patch::wire::PatchResults;

#[cfg(test)]
mod tests;

/// How long a connection may be silent.
const IDLE: Duration = Duration::from_secs(5);
/// How many connections a partition may have open at once.
const PEERS_MAX: usize = 8;

/// The control channel could not be set up or served.
#[derive(Debug, thiserror::Error)]
#[error("failed to {action} {path}")]
pub struct ControlError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Who may speak on a channel.
#[derive(Clone, Debug)]
pub enum Members {
    /// Processes of this cgroup and of those below it.
    Cgroup(Cgroup),
    /// Exactly this process; for tests of the channel alone.
    Process(u32),
}

impl Members {
    fn contains(&self, pid: u32) -> bool {
        match self {
            // What the kernel does not say is a no.
            Self::Cgroup(cgroup) => cgroup.contains(pid).unwrap_or(false),
            Self::Process(own) => pid == *own,
        }
    }
}

/// What a partition said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is there.
    Hello,
    /// How the patches ended; the host judges by its own table.
    Results(PatchResults),
    /// The service's program was started.
    ServiceStarted,
    /// The init is about to end.
    Stopping {
        /// Why, in its own words.
        reason: String,
        /// The exit status it will have.
        code: i32,
    },
    /// Somebody said something that was refused, and why.
    Refused(String),
}

/// What ended the wait for an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Something was said.
    Event(Event),
    /// The watched process has ended and nothing more was said before.
    Ended,
    /// The deadline has passed.
    TimeOut,
}

/// The agent's end of the control channel of one boot of one partition.
#[derive(Debug)]
pub struct ControlServer {
    listener: UnixListener,
    socket: PathBuf,
    boot: Boot,
    members: Members,
    peers: Vec<Peer>,
}

#[derive(Debug)]
struct Peer {
    stream: UnixStream,
    frames: Frames,
    greeted: bool,
    silent_after: Instant,
}

impl ControlServer {
    /// Begins to listen in this directory, which the bundle binds into the partition, and describes the boot there.
    /// What an earlier agent left there is replaced.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn listen(dir: &Path, boot: Boot, members: Members) -> Result<Self, ControlError> {
        make_dir(dir)?;
        let text = serde_json::to_vec(&boot).map_err(io::Error::from);
        let (file, new) = (dir.join(control::BOOT), dir.join("boot.json.new"));
        let write = |text: Vec<u8>| {
            remove(&new)?;
            fs::write(&new, text)?;
            fs::set_permissions(&new, fs::Permissions::from_mode(0o400))?;
            fs::rename(&new, &file)
        };
        text.and_then(write).map_err(error("write", &file))?;
        Self::resume(dir, boot, members)
    }

    /// Listens again for a boot that goes on while the agent was started anew.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn resume(dir: &Path, boot: Boot, members: Members) -> Result<Self, ControlError> {
        let socket = dir.join(control::SOCKET);
        remove(&socket).map_err(error("remove", &socket))?;
        let listener = UnixListener::bind(&socket).map_err(error("listen on", &socket))?;
        let mode = fs::Permissions::from_mode(0o600);
        fs::set_permissions(&socket, mode).map_err(error("protect", &socket))?;
        listener.set_nonblocking(true).map_err(error("listen on", &socket))?;
        Ok(Self { listener, socket, boot, members, peers: Vec::new() })
    }

    /// Reads the boot that [`ControlServer::listen`] described in this directory; `None` if there is none.
    ///
    /// # Errors
    /// [`ControlError`] if it cannot be read.
    pub fn boot_of(dir: &Path) -> Result<Option<Boot>, ControlError> {
        let file = dir.join(control::BOOT);
        match fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(io::Error::from)
                .map_err(error("parse", &file)),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(error("read", &file)(source)),
        }
    }

    /// The boot that this server belongs to.
    pub fn boot(&self) -> &Boot {
        &self.boot
    }

    /// Waits until the partition says something, the watched process ends, or the deadline passes. What was said
    /// before the end is told before the end.
    ///
    /// # Errors
    /// [`ControlError`] if the kernel refuses to wait or to accept.
    pub fn next(&mut self, deadline: Instant, watched: Option<&Process>) -> Result<Next, ControlError> {
        loop {
            if let Some(event) = self.speak()? {
                return Ok(Next::Event(event));
            }
            let now = Instant::now();
            self.peers.retain(|peer| peer.silent_after > now);
            let wake =
                self.peers.iter().map(|peer| peer.silent_after).min().map_or(deadline, |at| at.min(deadline));
            let (heard, ended) = self.wait(wake, watched).map_err(error("wait on", &self.socket))?;
            if heard {
                continue;
            }
            if ended {
                return Ok(Next::Ended);
            }
            if Instant::now() >= deadline {
                return Ok(Next::TimeOut);
            }
        }
    }

    /// Waits for an event that `wanted` accepts, passing over the others.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn wait_for<T>(
        &mut self,
        deadline: Instant,
        watched: Option<&Process>,
        mut wanted: impl FnMut(&Event) -> Option<T>,
    ) -> Result<Result<T, Next>, ControlError> {
        loop {
            match self.next(deadline, watched)? {
                Next::Event(event) => {
                    if let Some(found) = wanted(&event) {
                        return Ok(Ok(found));
                    }
                    // A partition that never stops talking does not move the deadline.
                    if Instant::now() >= deadline {
                        return Ok(Err(Next::TimeOut));
                    }
                }
                end => return Ok(Err(end)),
            }
        }
    }

    /// Whether a socket has something, and whether the watched process has ended.
    fn wait(&self, deadline: Instant, watched: Option<&Process>) -> io::Result<(bool, bool)> {
        let mut polled: Vec<PollFd<'_>> =
            watched.into_iter().map(|w| PollFd::new(w, PollFlags::IN)).collect();
        let watching = polled.len();
        polled.extend(self.peers.iter().map(|peer| PollFd::new(&peer.stream, PollFlags::IN)));
        if self.peers.len() < PEERS_MAX {
            polled.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        poll::poll(&mut polled, deadline)?;
        let any = |fds: &[PollFd<'_>]| fds.iter().any(|fd| !fd.revents().is_empty());
        Ok((any(&polled[watching..]), any(&polled[..watching])))
    }

    /// Serves what is there until one event comes of it.
    fn speak(&mut self) -> Result<Option<Event>, ControlError> {
        while self.peers.len() < PEERS_MAX {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if let Some(event) = self.admit(stream).map_err(error("accept on", &self.socket))? {
                        return Ok(Some(event));
                    }
                }
                Err(source) if source.kind() == io::ErrorKind::WouldBlock => break,
                Err(source) if source.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(source) => return Err(error("accept on", &self.socket)(source)),
            }
        }
        for index in 0..self.peers.len() {
            let peer = &mut self.peers[index];
            match peer.serve(&self.boot) {
                Served::Nothing => {}
                Served::Event(event) => return Ok(Some(event)),
                Served::Closed(event) => {
                    self.peers.remove(index);
                    // Indices have moved: the rest is served at the next call.
                    return event.map_or_else(|| self.speak(), |event| Ok(Some(event)));
                }
            }
        }
        Ok(None)
    }

    /// The mode of the socket keeps nobody out who is root in a partition; the cgroup does.
    fn admit(&mut self, stream: UnixStream) -> io::Result<Option<Event>> {
        stream.set_nonblocking(true)?;
        let pid = rustix::net::sockopt::socket_peercred(stream.as_fd())?.pid.as_raw_nonzero().get();
        if !u32::try_from(pid).is_ok_and(|pid| self.members.contains(pid)) {
            let reason = format!("process {pid} is not in this partition");
            return Ok(Some(refuse(&stream, reason)));
        }
        let silent_after = Instant::now() + IDLE;
        self.peers.push(Peer { stream, frames: Frames::default(), greeted: false, silent_after });
        Ok(None)
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        // Without the file a client knows at once that nobody listens; with it, it would find out a little later.
        let _ = fs::remove_file(&self.socket);
    }
}

enum Served {
    Nothing,
    Event(Event),
    Closed(Option<Event>),
}

impl Peer {
    fn serve(&mut self, boot: &Boot) -> Served {
        let mut piece = [0; 16 << 10];
        loop {
            match self.frames.next_frame() {
                Ok(Some(frame)) => return self.answer(&frame, boot),
                Ok(None) => {}
                Err(error) => return Served::Closed(Some(refuse(&self.stream, text(&error)))),
            }
            match self.stream.read(&mut piece) {
                Ok(0) if self.frames.is_empty() => return Served::Closed(None),
                Ok(0) => return Served::Closed(Some(Event::Refused("a frame was cut short".to_owned()))),
                Ok(count) => {
                    self.frames.push(&piece[..count]);
                    self.silent_after = Instant::now() + IDLE;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Served::Nothing,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Served::Closed(None),
            }
        }
    }

    fn answer(&mut self, frame: &[u8], boot: &Boot) -> Served {
        let event = match control::parse(frame) {
            Err(error) => Err(text(&error)),
            Ok(Message::Hello { boot_id, nonce }) if same(&nonce, &boot.nonce) && boot_id == boot.boot_id => {
                self.greeted = true;
                Ok(Event::Hello)
            }
            Ok(Message::Hello { .. }) => Err("the nonce belongs to another boot".to_owned()),
            Ok(_) if !self.greeted => Err("the first message has to be a greeting".to_owned()),
            Ok(Message::Results(results)) if results.boot_id != boot.boot_id => {
                Err("the results belong to another boot".to_owned())
            }
            Ok(Message::Results(results)) => Ok(Event::Results(results)),
            Ok(Message::ServiceStarted {}) => Ok(Event::ServiceStarted),
            Ok(Message::Stopping { reason, code }) => Ok(Event::Stopping { reason, code }),
        };
        match event {
            Err(reason) => Served::Closed(Some(refuse(&self.stream, reason))),
            Ok(event) => {
                // Whether it listens to answers or not: what it said was said, and more may be waiting.
                let _ = send(&self.stream, &Answer::Accepted);
                Served::Event(event)
            }
        }
    }
}

/// An answer that does not fit the socket's buffer is not waited for.
fn send(mut stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    let bytes = control::encode_answer(answer).map_err(io::Error::other)?;
    stream.write_all(&bytes)
}

fn refuse(stream: &UnixStream, reason: String) -> Event {
    // The connection is closed in any case.
    let _ = send(stream, &Answer::Refused(reason.clone()));
    Event::Refused(reason)
}

/// Compares in a time that does not depend on where the first difference is.
fn same(left: &str, right: &str) -> bool {
    let differences = left.bytes().zip(right.bytes()).fold(0, |all, (l, r)| all | (l ^ r));
    left.len() == right.len() && differences == 0
}

/// The error with its causes, for an answer.
fn text(error: &FrameError) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    crate::patch::wire::printable(&format!("{error}{cause}"))
}

fn make_dir(dir: &Path) -> Result<(), ControlError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(error("make", dir))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> ControlError {
    let path = path.to_owned();
    move |source| ControlError { action, path: path.clone(), source }
}
