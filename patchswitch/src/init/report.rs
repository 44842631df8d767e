//! Tells the agent. Nobody may be listening: then the file on the disk has to do, and nothing waits long.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::paths::Paths;
use super::say;
use crate::control::{self, Answer, Boot, FrameError, Message};

/// How long between two attempts.
const PAUSE: Duration = Duration::from_millis(100);

/// The description of this boot, if the agent gave one.
fn boot(paths: &Paths) -> Option<Boot> {
    serde_json::from_slice(&fs::read(paths.control(control::BOOT)).ok()?).ok()
}

/// Identifies this boot of the partition. Without an agent it is the kernel's, which is at least no other boot's of
/// this disk.
pub(super) fn boot_id(paths: &Paths) -> String {
    let kernel = || fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
    let id = boot(paths).map(|boot| boot.boot_id).or_else(kernel);
    id.map_or_else(|| "unknown".to_owned(), |id| id.trim().to_owned())
}

/// Says something to the agent, trying again until the patience is at its end. Whether the agent has it.
pub(super) fn tell(paths: &Paths, message: &Message, patience: Duration) -> bool {
    let Some(boot) = boot(paths) else { return false };
    let end = Instant::now() + patience;
    loop {
        match attempt(paths, &boot, message, patience) {
            Ok(Answer::Accepted) => return true,
            Ok(Answer::Refused(reason)) => {
                say(&format!("the agent refused a message: {reason}"));
                return false;
            }
            Err(error) if Instant::now() >= end => {
                let cause = std::error::Error::source(&error).map(|c| format!(": {c}")).unwrap_or_default();
                say(&format!("nobody hears us: {error}{cause}"));
                return false;
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// As [`tell`], on a thread of its own: PID 1 has other things to do.
pub(super) fn tell_later(paths: &Paths, message: Message, patience: Duration) {
    let paths = paths.clone();
    std::thread::spawn(move || tell(&paths, &message, patience));
}

fn attempt(paths: &Paths, boot: &Boot, message: &Message, patience: Duration) -> Result<Answer, FrameError> {
    let mut connection = connect(paths, patience).map_err(FrameError::Io)?;
    let hello = Message::Hello { boot_id: boot.boot_id.clone(), nonce: boot.nonce.clone() };
    match control::say(&mut connection, hello)? {
        Answer::Accepted => control::say(&mut connection, message.clone()),
        refused @ Answer::Refused(_) => Ok(refused),
    }
}

/// Without blocking, because an agent that listens and does not accept would block it for ever.
fn connect(paths: &Paths, patience: Duration) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(paths.control(control::SOCKET))?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    Ok(stream)
}
