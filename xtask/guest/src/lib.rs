//! What xtask and the test machine say to each other over one virtio-serial port.
//!
//! Frames with a length in front, so that the outputs of several commands share the port. The command's number
//! (`id`) is chosen by the host; xtask's own clients speak the same protocol over a UNIX socket and always use 0.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// The name of the port, as the guest finds it under `/sys/class/virtio-ports`.
pub const PORT: &str = "patchswitch.agent";
/// The name of the port into which a test writes what it wants to be told after the next start of the machine.
pub const RESET_PORT: &str = "patchswitch.reset";
/// The most that one frame carries. A longer one means that the two ends have lost each other.
pub const BODY_MAX: usize = 1 << 20;
/// How much input for a command may be on its way: more would pile up in the guest's memory.
pub const STDIN_WINDOW: usize = 1 << 18;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// To the guest: start a command. Body: [`Request`] as JSON.
    Run = 1,
    /// To the guest: input for a command. An empty body closes it.
    Stdin = 2,
    /// To the guest: kill a command's process group.
    Kill = 3,
    /// To the guest: sync and power off.
    PowerOff = 4,
    /// From the guest: it takes commands now. Body: the kernel's release.
    Ready = 16,
    /// From the guest: it has read the request. Without this word soon after, the machine hangs.
    Taken = 21,
    /// From the guest: a piece of a command's standard output.
    Stdout = 17,
    /// From the guest: a piece of a command's standard error.
    Stderr = 18,
    /// From the guest: so many bytes of input (`u32`, little endian) went into the command's pipe.
    StdinTaken = 19,
    /// From the guest: the command is over. Body: [`End`] as JSON.
    End = 20,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::{End, Kill, PowerOff, Ready, Run, Stderr, Stdin, StdinTaken, Stdout, Taken};
        [Run, Stdin, Kill, PowerOff, Ready, Taken, Stdout, Stderr, StdinTaken, End]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// The command it is about.
    pub id: u32,
    /// What it carries.
    pub body: Vec<u8>,
}

impl Frame {
    /// A frame with a body of bytes.
    pub fn new(kind: Kind, id: u32, body: impl Into<Vec<u8>>) -> Self {
        Self { kind, id, body: body.into() }
    }

    /// A frame whose body is a value as JSON.
    ///
    /// # Errors
    /// If the value cannot be written as JSON.
    pub fn json(kind: Kind, id: u32, value: &impl Serialize) -> io::Result<Self> {
        Ok(Self { kind, id, body: serde_json::to_vec(value)? })
    }

    /// Reads one frame; `None` if the other end closed between two frames.
    ///
    /// # Errors
    /// If reading fails, the other end closes inside a frame, or what comes is not a frame.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut head = [0; 9];
        let first = loop {
            match from.read(&mut head) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if first == 0 {
            return Ok(None);
        }
        from.read_exact(&mut head[first..])?;
        let [kind, i0, i1, i2, i3, l0, l1, l2, l3] = head;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let kind = Kind::from_byte(kind).ok_or_else(|| bad(format!("no frame begins with {kind}")))?;
        if length > BODY_MAX {
            return Err(bad(format!("a frame of {length} bytes")));
        }
        let mut body = vec![0; length];
        from.read_exact(&mut body)?;
        Ok(Some(Self { kind, id: u32::from_le_bytes([i0, i1, i2, i3]), body }))
    }

    /// Writes the frame with one call, so that frames of several threads do not mix.
    ///
    /// # Errors
    /// If writing fails or the body is longer than [`BODY_MAX`].
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let length = u32::try_from(self.body.len()).ok().filter(|n| *n as usize <= BODY_MAX);
        let length =
            length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the frame is too long"))?;
        let mut bytes = Vec::with_capacity(9 + self.body.len());
        bytes.push(self.kind as u8);
        bytes.extend_from_slice(&self.id.to_le_bytes());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&self.body);
        to.write_all(&bytes)?;
        to.flush()
    }
}

/// A command for the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Added to the guest's own small environment.
    pub env: BTreeMap<String, String>,
    /// The working directory; `/` if empty.
    pub dir: String,
    /// After so many milliseconds the command's process group is killed. There is no command without a limit: one
    /// that hangs would hang the caller for ever.
    pub limit_ms: u64,
    /// Whether input follows; otherwise the command reads from `/dev/null`.
    pub stdin: bool,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// It exited with this code.
    Code(i32),
    /// It was killed by this signal.
    Signal(i32),
    /// It was killed at the end of its time.
    TimedOut,
    /// It could not be started.
    NotStarted(String),
}

impl End {
    /// The exit code that a shell or `timeout` would report for this end.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Code(code) => *code,
            Self::Signal(signal) => 128 + signal,
            Self::TimedOut => 124,
            Self::NotStarted(_) => 127,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_way_and_the_end_is_seen() {
        let request = Request { argv: vec!["true".into()], limit_ms: 5, ..Request::default() };
        let frames = [
            Frame::json(Kind::Run, 7, &request).unwrap(),
            Frame::new(Kind::Stdin, 7, vec![0, 255, 10]),
            Frame::new(Kind::Stdin, 7, Vec::new()),
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            frame.write(&mut bytes).unwrap();
        }
        let mut from = bytes.as_slice();
        for frame in &frames {
            assert_eq!(Frame::read(&mut from).unwrap().as_ref(), Some(frame));
        }
        assert_eq!(Frame::read(&mut from).unwrap(), None);
        assert_eq!(serde_json::from_slice::<Request>(&frames[0].body).unwrap(), request);
    }

    #[test]
    fn a_cut_or_foreign_stream_is_an_error_not_the_end() {
        let mut bytes = Vec::new();
        Frame::new(Kind::Stdout, 1, b"text".to_vec()).write(&mut bytes).unwrap();
        for length in 1..bytes.len() {
            assert!(Frame::read(&mut &bytes[..length]).is_err(), "{length}");
        }
        assert!(Frame::read(&mut b"HTTP/1.1 200".as_slice()).is_err());
        let long = [17, 0, 0, 0, 0, 255, 255, 255, 255];
        assert!(Frame::read(&mut long.as_slice()).is_err());
        assert!(Frame::new(Kind::Stdout, 1, vec![0; BODY_MAX + 1]).write(&mut io::sink()).is_err());
    }

    #[test]
    fn only_code_zero_is_success() {
        assert_eq!(End::Code(0).exit_code(), 0);
        for end in [End::Code(1), End::Signal(9), End::TimedOut, End::NotStarted(String::new())] {
            assert_ne!(end.exit_code(), 0, "{end:?}");
        }
    }
}
