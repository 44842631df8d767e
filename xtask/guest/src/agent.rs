//! Runs the host's commands: several at a time, each in a process group of its own and with a time limit.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use patchswitch_guest::{End, Frame, Kind, PORT, Request};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::{complain, program};

/// How long the port may take to appear and the host to be there.
const PORT_LIMIT: Duration = Duration::from_secs(20);
/// How long the rest of a command's output is awaited after its end. A child that it left behind keeps the pipe open.
const REST_LIMIT: Duration = Duration::from_millis(500);
/// Size of one piece of output.
const PIECE: usize = 1 << 16;

type Port = Arc<Mutex<File>>;
type Commands = Arc<Mutex<HashMap<u32, Handle>>>;

/// What the port's reader needs of a command. Made when the request is read, because input may follow at once.
struct Handle {
    /// None until it has been started.
    group: Option<Pid>,
    stdin: Option<Sender<Vec<u8>>>,
}

/// Serves until the host says so or is gone.
pub(crate) fn serve() -> Result<()> {
    let mut from = open_port()?;
    let port: Port = Arc::new(Mutex::new(from.try_clone()?));
    let commands = Commands::default();
    send(&port, &Frame::new(Kind::Ready, 0, fs::read("/proc/sys/kernel/osrelease")?.trim_ascii()));
    let start = Instant::now();
    let mut heard = false;
    loop {
        match Frame::read(&mut from)? {
            Some(frame) if frame.kind == Kind::PowerOff => return Ok(()),
            Some(frame) => {
                heard = true;
                handle(frame, &port, &commands);
            }
            // Without a host `read` says end of file: at first it may not be there yet, later it has gone.
            None if !heard && start.elapsed() < PORT_LIMIT => thread::sleep(Duration::from_millis(10)),
            None => bail!("the host has gone"),
        }
    }
}

fn open_port() -> Result<File> {
    let end = Instant::now() + PORT_LIMIT;
    loop {
        if let Some(device) = find_port(PORT)? {
            return File::options().read(true).write(true).open(&device).context(device);
        }
        if Instant::now() >= end {
            bail!("there is no port {PORT}");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn find_port(name: &str) -> Result<Option<String>> {
    let Ok(ports) = fs::read_dir("/sys/class/virtio-ports") else { return Ok(None) };
    for port in ports {
        let dir = port?.path();
        let found = fs::read_to_string(dir.join("name")).unwrap_or_default();
        if let (true, Some(device)) = (found.trim() == name, dir.file_name()) {
            return Ok(Some(format!("/dev/{}", device.to_string_lossy())));
        }
    }
    Ok(None)
}

fn handle(frame: Frame, port: &Port, commands: &Commands) {
    let id = frame.id;
    match frame.kind {
        Kind::Run => {
            let (port, commands) = (Arc::clone(port), Arc::clone(commands));
            send(&port, &Frame::new(Kind::Taken, id, Vec::new()));
            let (stdin, pieces) = channel();
            lock(&commands).insert(id, Handle { group: None, stdin: Some(stdin) });
            thread::spawn(move || {
                let end = command(id, &frame.body, pieces, &port, &commands)
                    .unwrap_or_else(|error| End::NotStarted(format!("{error:#}")));
                lock(&commands).remove(&id);
                match Frame::json(Kind::End, id, &end) {
                    Ok(frame) => send(&port, &frame),
                    Err(error) => complain(&error.to_string()),
                }
            });
        }
        Kind::Stdin => {
            let mut commands = lock(commands);
            let Some(handle) = commands.get_mut(&id) else { return };
            if frame.body.is_empty() {
                handle.stdin = None;
            } else if let Some(stdin) = &handle.stdin {
                // The writer ends with the command; what then still comes has nowhere to go.
                let _late = stdin.send(frame.body);
            }
        }
        Kind::Kill => {
            // Taken out, so that a command which is about to start knows that nobody waits for it.
            if let Some(group) = lock(commands).remove(&id).and_then(|handle| handle.group) {
                kill(group);
            }
        }
        _ => complain(&format!("unexpected {:?}", frame.kind)),
    }
}

/// Runs one command to its end, and says how it ended.
fn command(id: u32, body: &[u8], input: Receiver<Vec<u8>>, port: &Port, commands: &Commands) -> Result<End> {
    let request: Request = serde_json::from_slice(body)?;
    let mut child = start(&request)?;
    let group = Pid::from_child(&child);
    match lock(commands).get_mut(&id) {
        Some(handle) => handle.group = Some(group),
        None => kill(group),
    }
    if let Some(pipe) = child.stdin.take() {
        feed(id, pipe, input, port);
    }
    let (done, readers) = channel();
    relay(id, Kind::Stdout, child.stdout.take(), port, &done);
    relay(id, Kind::Stderr, child.stderr.take(), port, &done);
    drop(done);
    let end = await_end(child, group, Duration::from_millis(request.limit_ms));
    let rest = Instant::now() + REST_LIMIT;
    while readers.recv_timeout(rest.saturating_duration_since(Instant::now())).is_ok() {}
    end
}

fn start(request: &Request) -> Result<Child> {
    let (name, arguments) = request.argv.split_first().context("no command")?;
    let mut command = program(name);
    command.args(arguments).envs(&request.env).process_group(0);
    if !request.dir.is_empty() {
        command.current_dir(&request.dir);
    }
    command.stdin(if request.stdin { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().with_context(|| format!("failed to start {name}"))
}

fn await_end(mut child: Child, group: Pid, limit: Duration) -> Result<End> {
    let (over, waiting) = channel();
    thread::spawn(move || over.send(child.wait()));
    let status = match waiting.recv_timeout(limit) {
        Ok(status) => status?,
        Err(RecvTimeoutError::Timeout) => {
            kill(group);
            // A process in the kernel's hands does not die; the host has to know all the same.
            let _killed = waiting.recv_timeout(Duration::from_secs(5));
            return Ok(End::TimedOut);
        }
        Err(RecvTimeoutError::Disconnected) => bail!("lost the command"),
    };
    Ok(status.code().map_or_else(|| End::Signal(status.signal().unwrap_or_default()), End::Code))
}

/// Writes a command's input, and tells the host how much of it is gone.
fn feed(id: u32, mut pipe: ChildStdin, pieces: Receiver<Vec<u8>>, port: &Port) {
    let port = Arc::clone(port);
    thread::spawn(move || {
        for piece in pieces {
            // A command that closed its input does not want the rest; the host must not wait for it.
            let _closed = pipe.write_all(&piece);
            let length = u32::try_from(piece.len()).unwrap_or(u32::MAX);
            send(&port, &Frame::new(Kind::StdinTaken, id, length.to_le_bytes()));
        }
    });
}

fn relay(id: u32, kind: Kind, pipe: Option<impl Read + Send + 'static>, port: &Port, done: &Sender<()>) {
    let Some(mut pipe) = pipe else { return };
    let (port, done) = (Arc::clone(port), done.clone());
    thread::spawn(move || {
        let mut piece = vec![0; PIECE];
        while let Ok(length @ 1..) = pipe.read(&mut piece) {
            send(&port, &Frame::new(kind, id, &piece[..length]));
        }
        done.send(())
    });
}

fn kill(group: Pid) {
    if let Err(error) = kill_process_group(group, Signal::KILL) {
        complain(&format!("failed to kill {group:?}: {error}"));
    }
}

fn send(port: &Port, frame: &Frame) {
    // If the host has gone, the reader notices and ends the machine.
    if let Err(error) = frame.write(&mut *lock(port)) {
        complain(&format!("failed to write to the host: {error}"));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
