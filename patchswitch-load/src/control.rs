//! How a running client is told what to do: one line for an order, one line for its answer.
//!
//! ```text
//!  mark NAME [@NANOSECONDS]   ok 123456789      a phase begins (now, or at a time of CLOCK_BOOTTIME)
//!  open-idle                  ok                opens an idle connection in each family
//!  use-idle                   ok                uses each for one request; answers when they have ended
//!  start-download             ok                starts a download in each family
//!  finish-download            ok                no longer slows them down; answers when they have ended
//!  status                     ok {"issued":…}
//!  stop                       ok                the run ends and its report is written
//! ```
//!
//! What cannot be done is answered by `error` and the reason.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock, mpsc};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::UnboundedSender;

/// The longest line that is read.
const LINE_MAX: u64 = 4096;

/// An order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// A phase begins.
    Mark {
        /// Its name.
        name: String,
        /// When; none: now.
        at_ns: Option<u64>,
    },
    /// Opens an idle connection in each family.
    OpenIdle,
    /// Uses the idle connections.
    UseIdle,
    /// Starts a download in each family.
    StartDownload,
    /// Lets downloads go on at full speed and waits for their end.
    FinishDownload,
    /// How far the run is.
    Status,
    /// Ends the run.
    Stop,
}

/// A line that is no order.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// No order begins like this.
    #[error("{0:?} is no order")]
    Unknown(String),
    /// `mark` wants a name, and then at most a time.
    #[error("a mark is a name and perhaps @ and a time in nanoseconds, not {0:?}")]
    Mark(String),
}

impl std::str::FromStr for Command {
    type Err = CommandError;

    fn from_str(line: &str) -> Result<Self, CommandError> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let bad_mark = || CommandError::Mark(line.trim().to_owned());
        Ok(match words[..] {
            ["mark", name] if !name.starts_with('@') => Self::Mark { name: name.to_owned(), at_ns: None },
            ["mark", name, at] => {
                let at_ns = at.strip_prefix('@').and_then(|at| at.parse().ok());
                Self::Mark { name: name.to_owned(), at_ns: Some(at_ns.ok_or_else(bad_mark)?) }
            }
            ["mark", ..] => return Err(bad_mark()),
            ["open-idle"] => Self::OpenIdle,
            ["use-idle"] => Self::UseIdle,
            ["start-download"] => Self::StartDownload,
            ["finish-download"] => Self::FinishDownload,
            ["status"] => Self::Status,
            ["stop"] => Self::Stop,
            _ => return Err(CommandError::Unknown(line.trim().to_owned())),
        })
    }
}

/// How far a run is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Now, by `CLOCK_BOOTTIME`.
    pub now_ns: u64,
    /// Requests issued.
    pub issued: u64,
    /// Requests answered.
    pub answered: u64,
    /// Requests failed.
    pub failed: u64,
    /// When the first failure was known.
    pub first_failure_ns: Option<u64>,
    /// Downloads under way.
    pub downloading: u64,
}

/// The answer to an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// It is done.
    Done,
    /// It is done, with a number to tell.
    Value(u64),
    /// How far the run is.
    Status(Status),
    /// It could not be done.
    Error(String),
}

impl Response {
    /// Why it could not be done.
    pub(crate) fn error(text: &str) -> Self {
        Self::Error(text.to_owned())
    }

    /// As one line, without its end.
    pub fn line(&self) -> String {
        match self {
            Self::Done => "ok".into(),
            Self::Value(value) => format!("ok {value}"),
            Self::Status(status) => match serde_json::to_string(status) {
                Ok(text) => format!("ok {text}"),
                Err(error) => format!("error {error}"),
            },
            Self::Error(text) => format!("error {}", text.replace('\n', " ")),
        }
    }
}

/// Where an order's answer is wanted.
#[derive(Debug)]
pub struct Reply(Option<mpsc::Sender<Response>>);

impl Reply {
    /// Nobody wants it.
    pub fn nobody() -> Self {
        Self(None)
    }

    pub(crate) fn give(self, response: Response) {
        if let Some(sender) = self.0 {
            // Who asked may have gone: then nobody misses it.
            drop(sender.send(response));
        }
    }
}

/// An order on its way to the client.
#[derive(Debug)]
pub struct Order {
    /// What to do.
    pub command: Command,
    /// Where the answer goes.
    pub reply: Reply,
}

/// Gives one line's order and waits for its answer.
pub fn obey(line: &str, orders: &UnboundedSender<Order>) -> Response {
    let command = match line.parse() {
        Ok(command) => command,
        Err(error) => return Response::Error(CommandError::to_string(&error)),
    };
    let (sender, receiver) = mpsc::channel();
    let gone = || Response::error("the run has ended");
    match orders.send(Order { command, reply: Reply(Some(sender)) }) {
        Ok(()) => receiver.recv().unwrap_or_else(|_| gone()),
        Err(_) => gone(),
    }
}

/// The socket on which orders come. When this is dropped its file is removed, and every order that was taken has had
/// its answer: the process may end then.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    /// Shared by those who have taken an order and not yet answered.
    answering: Arc<RwLock<()>>,
}

impl Server {
    /// Listens, on threads of its own, and passes on what comes.
    ///
    /// # Errors
    /// If the socket cannot be made; a file of that name is not replaced.
    pub fn start(path: &Path, orders: UnboundedSender<Order>) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let answering = Arc::new(RwLock::new(()));
        let server = Self { path: path.to_owned(), answering: Arc::clone(&answering) };
        let accept = move || {
            for stream in listener.incoming().flatten() {
                let (orders, answering) = (orders.clone(), Arc::clone(&answering));
                let talk = move || talk(&stream, &orders, &answering);
                // Without a thread the connection is closed: the other side sees it.
                drop(std::thread::Builder::new().name("orders".into()).stack_size(128 * 1024).spawn(talk));
            }
        };
        std::thread::Builder::new().name("control".into()).stack_size(128 * 1024).spawn(accept)?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Gone already is as good.
        drop(std::fs::remove_file(&self.path));
        // Short: the run has ended, so nobody waits for it any more. A poisoned lock is free as well.
        drop(self.answering.write());
    }
}

fn talk(stream: &UnixStream, orders: &UnboundedSender<Order>, answering: &RwLock<()>) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    loop {
        let mut line = String::new();
        if io::Read::take(&mut reader, LINE_MAX).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let _answering = answering.read();
        let response = obey(&line, orders).line();
        writer.write_all(format!("{response}\n").as_bytes())?;
    }
}

/// The harness's end of the control socket.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects; tries again for a while, since the client makes its socket only after it has started.
    ///
    /// # Errors
    /// If there is no socket at the end of `limit`.
    pub fn connect(path: &Path, limit: Duration) -> io::Result<Self> {
        let end = std::time::Instant::now() + limit;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Ok(Self { reader: BufReader::new(stream) }),
                Err(error) if std::time::Instant::now() >= end => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Gives an order and returns what came after `ok`.
    ///
    /// # Errors
    /// If the client is gone, or answered by an error.
    pub fn order(&mut self, line: &str) -> io::Result<String> {
        self.reader.get_ref().write_all(format!("{line}\n").as_bytes())?;
        let mut answer = String::new();
        self.reader.read_line(&mut answer)?;
        match answer.trim_end().split_once(' ').unwrap_or((answer.trim_end(), "")) {
            ("ok", rest) => Ok(rest.to_owned()),
            ("error", rest) => Err(io::Error::other(format!("{line}: {rest}"))),
            _ => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the load client is gone")),
        }
    }

    /// Marks the beginning of a phase, now; returns when that was.
    ///
    /// # Errors
    /// As [`Client::order`].
    pub fn mark(&mut self, name: &str) -> io::Result<u64> {
        self.order(&format!("mark {name}"))?.parse().map_err(io::Error::other)
    }

    /// Marks the beginning of a phase at a time that is known.
    ///
    /// # Errors
    /// As [`Client::order`].
    pub fn mark_at(&mut self, name: &str, at_ns: u64) -> io::Result<()> {
        self.order(&format!("mark {name} @{at_ns}")).map(drop)
    }

    /// How far the run is.
    ///
    /// # Errors
    /// As [`Client::order`].
    pub fn status(&mut self) -> io::Result<Status> {
        serde_json::from_str(&self.order("status")?).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_and_nothing_else() {
        let mark = |name: &str, at_ns| Ok(Command::Mark { name: name.into(), at_ns });
        assert_eq!("mark job1/clone\n".parse(), mark("job1/clone", None));
        assert_eq!("mark flip @12".parse(), mark("flip", Some(12)));
        assert_eq!(" stop ".parse(), Ok(Command::Stop));
        for bad in ["mark", "mark @12", "mark a b", "mark a @b", "mark a @1 c"] {
            assert_eq!(bad.parse::<Command>(), Err(CommandError::Mark(bad.into())), "{bad}");
        }
        for bad in ["", "STOP", "stop now", "open"] {
            assert_eq!(bad.parse::<Command>(), Err(CommandError::Unknown(bad.into())), "{bad}");
        }
    }

    #[test]
    fn orders_go_through_the_socket_and_errors_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel::<Order>();
        let server = Server::start(&path, sender).unwrap();
        let obeyed = std::thread::spawn(move || {
            let first = receiver.blocking_recv().unwrap();
            assert_eq!(first.command, Command::Mark { name: "a".into(), at_ns: None });
            first.reply.give(Response::Value(77));
            receiver.blocking_recv().unwrap().reply.give(Response::error("no"));
            drop(receiver);
        });
        let mut client = Client::connect(&path, Duration::from_secs(2)).unwrap();
        assert_eq!(client.mark("a").unwrap(), 77);
        assert_eq!(client.order("use-idle").unwrap_err().to_string(), "use-idle: no");
        obeyed.join().unwrap();
        assert!(client.order("status").unwrap_err().to_string().contains("the run has ended"));
        assert!(client.order("nonsense").unwrap_err().to_string().contains("is no order"));
        drop(server);
        assert!(!path.exists());
    }
}
