//! The control channel: what a partition's init says to the agent, without any network (patent Fig. 3, 305).
//!
//! A stream socket in a directory of the host that is bound, read-only, into the partition. Each frame is four bytes
//! of length, most significant first, and that many bytes of JSON. A connection begins with [`Message::Hello`], which
//! carries the nonce of this boot of the partition; every frame is answered by an [`Answer`]. The agent never accepts
//! descriptors, and never allocates what a length announces: the buffer grows with what has arrived.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use crate::patch::wire::{self, PatchResults};

/// The version of the protocol.
pub const VERSION: u32 = 1;
/// The longest frame, in bytes: results of the largest size, and their envelope.
pub const FRAME_MAX: usize = wire::WIRE_MAX + 1024;
/// The longest text of a reason.
pub const REASON_MAX: usize = 1000;
/// The control directory as the partition sees it.
pub const DIRECTORY: &str = "/run/patchswitch/control";
/// The agent's socket in it. Not there while no agent listens.
pub const SOCKET: &str = "agent.sock";
/// The description of this boot in it, a [`Boot`].
pub const BOOT: &str = "boot.json";

const LENGTH: usize = 4;

/// What the agent tells a partition about the boot that is about to happen.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// [`VERSION`].
    pub version: u32,
    /// Differs for every boot of every partition; the kernel's own is the host's.
    pub boot_id: String,
    /// Proves that a message belongs to this boot. Not for logs.
    pub nonce: String,
}

impl std::fmt::Debug for Boot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Boot").field("boot_id", &self.boot_id).finish_non_exhaustive()
    }
}

impl Boot {
    /// A boot with a new identifier and a new nonce, of 128 random bits each.
    ///
    /// # Errors
    /// If the kernel has no randomness to give.
    pub fn new() -> io::Result<Self> {
        Ok(Self { version: VERSION, boot_id: random_id()?, nonce: random_id()? })
    }
}

/// 128 random bits as 32 hexadecimal digits.
pub(crate) fn random_id() -> io::Result<String> {
    let mut bytes = [0_u8; 16];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What a partition says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Message {
    /// The first message of a connection.
    Hello {
        /// [`Boot::boot_id`].
        boot_id: String,
        /// [`Boot::nonce`].
        nonce: String,
    },
    /// The results of the patches (patent Fig. 12, step 1207).
    Results(PatchResults),
    /// The service's program was started; whether it serves is for probes to find out.
    ServiceStarted {},
    /// The partition is about to end.
    Stopping {
        /// Why, in words.
        reason: String,
        /// The exit status of the init.
        code: i32,
    },
}

/// A message and the version of the protocol it is in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    /// [`VERSION`].
    pub version: u32,
    /// The message.
    pub message: Message,
}

/// What the agent says to each message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// The agent has it.
    Accepted,
    /// The agent does not want it and closes the connection.
    Refused(String),
}

/// Bytes that are no frame, or a frame that is no message.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The announced length is more than [`FRAME_MAX`].
    #[error("a frame of {0} bytes is announced, more than the {FRAME_MAX} that are allowed")]
    TooLong(usize),
    /// Not JSON, or not a message.
    #[error("failed to parse the message")]
    Json(#[source] serde_json::Error),
    /// Of another version.
    #[error("the message has version {0}, this program speaks version {VERSION}")]
    Version(u32),
    /// A value that no correct sender produces.
    #[error("the message has a value that is not allowed")]
    Value(#[source] wire::WireError),
    /// The other side closed the connection, or did not answer in time.
    #[error("failed to exchange a message")]
    Io(#[source] io::Error),
}

/// Frames as they come in, in pieces of any size.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
}

impl Frames {
    /// Adds what has arrived. The caller takes all frames after each piece, so that the buffer never holds more than
    /// one frame and one piece.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Takes the next complete frame, if there is one.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] as soon as the length is known.
    pub fn next_frame(&mut self) -> Result<Option<Vec<u8>>, FrameError> {
        let Some(length) = self.bytes.first_chunk::<LENGTH>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if length > FRAME_MAX {
            return Err(FrameError::TooLong(length));
        }
        if self.bytes.len() < LENGTH + length {
            return Ok(None);
        }
        let rest = self.bytes.split_off(LENGTH + length);
        let frame = self.bytes.split_off(LENGTH);
        self.bytes = rest;
        Ok(Some(frame))
    }

    /// Whether nothing incomplete is left.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// Parses and checks a message.
///
/// # Errors
/// [`FrameError`].
pub fn parse(frame: &[u8]) -> Result<Message, FrameError> {
    let envelope: Envelope = serde_json::from_slice(frame).map_err(FrameError::Json)?;
    if envelope.version != VERSION {
        return Err(FrameError::Version(envelope.version));
    }
    Ok(match envelope.message {
        // Parsed by its own rules as well, which make its log tails printable.
        Message::Results(results) => {
            let bytes = serde_json::to_vec(&results).map_err(FrameError::Json)?;
            Message::Results(PatchResults::parse(&bytes).map_err(FrameError::Value)?)
        }
        Message::Stopping { reason, code } => {
            let reason = wire::printable(wire::tail(&reason, REASON_MAX));
            Message::Stopping { reason, code }
        }
        other => other,
    })
}

/// The bytes of a message, frame and all.
///
/// # Errors
/// [`FrameError::TooLong`]; results are to be shortened by [`PatchResults::encode`] first.
pub fn encode(message: Message) -> Result<Vec<u8>, FrameError> {
    frame(&serde_json::to_vec(&Envelope { version: VERSION, message }).map_err(FrameError::Json)?)
}

/// The bytes of an answer, frame and all.
///
/// # Errors
/// [`FrameError`] never in practice.
pub fn encode_answer(answer: &Answer) -> Result<Vec<u8>, FrameError> {
    frame(&serde_json::to_vec(answer).map_err(FrameError::Json)?)
}

fn frame(body: &[u8]) -> Result<Vec<u8>, FrameError> {
    if body.len() > FRAME_MAX {
        return Err(FrameError::TooLong(body.len()));
    }
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    Ok([&length.to_be_bytes(), body].concat())
}

/// Says one message on a connection and waits for the answer; the connection has its own time limits.
///
/// # Errors
/// [`FrameError`].
pub fn say(connection: &mut (impl Read + Write), message: Message) -> Result<Answer, FrameError> {
    connection.write_all(&encode(message)?).map_err(FrameError::Io)?;
    let mut frames = Frames::default();
    let mut piece = [0; 4096];
    loop {
        if let Some(frame) = frames.next_frame()? {
            return serde_json::from_slice(&frame).map_err(FrameError::Json);
        }
        match connection.read(&mut piece) {
            Ok(0) => return Err(FrameError::Io(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => frames.push(&piece[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(FrameError::Io(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn two_boots_differ_and_do_not_show_their_nonce() {
        let (one, other) = (Boot::new().unwrap(), Boot::new().unwrap());
        assert!(one.boot_id != other.boot_id && one.nonce != other.nonce && one.nonce != one.boot_id);
        assert_eq!(one.nonce.len(), 32);
        assert!(!format!("{one:?}").contains(&one.nonce));
    }

    #[test]
    fn a_huge_frame_is_refused_by_its_length_alone() {
        let mut frames = Frames::default();
        frames.push(&u32::MAX.to_be_bytes());
        assert!(
            matches!(frames.next_frame(), Err(FrameError::TooLong(length)) if length == u32::MAX as usize)
        );
        let mut frames = Frames::default();
        frames.push(&u32::try_from(FRAME_MAX).unwrap().to_be_bytes());
        assert!(frames.next_frame().unwrap().is_none());
        assert!(frames.bytes.capacity() < 4096, "nothing is allocated for what is only announced");
    }

    #[test]
    fn results_of_the_largest_size_fit_a_frame() {
        let outcome = |id: usize| wire::PatchOutcome {
            id: id.to_string(),
            exit_code: Some(0),
            signal: None,
            failure: None,
            duration_ms: u64::MAX,
            log_digest: "0".repeat(64),
            log_tail: "\n".repeat(wire::LOG_TAIL_MAX),
            boot_id: "b".to_owned(),
        };
        let all = PatchResults {
            outcomes: (0..wire::PATCHES_MAX).map(outcome).collect(),
            ..PatchResults::new("job", "b")
        };
        let fitting = PatchResults::parse(&all.encode().unwrap()).unwrap();
        let bytes = encode(Message::Results(fitting.clone())).unwrap();
        assert_eq!(parse(&bytes[LENGTH..]).unwrap(), Message::Results(fitting));
    }

    #[test]
    fn other_versions_unknown_words_and_bad_values_are_refused() {
        let refused = |text: &str| parse(text.as_bytes()).unwrap_err().to_string();
        assert!(refused(r#"{"version":2,"message":{"service_started":{}}}"#).contains("version 2"));
        for text in [
            "",
            "[]",
            r#"{"version":1}"#,
            r#"{"version":1,"message":{"shut_down_the_host":{}}}"#,
            r#"{"version":1,"message":{"service_started":{"x":1}}}"#,
            r#"{"version":1,"message":{"service_started":{}},"x":1}"#,
        ] {
            assert!(refused(text).contains("failed to parse"), "{text}");
        }
        let bad = r#"{"version":1,"message":{"results":{"version":1,"job":"../x","boot_id":"b","started":[],
            "outcomes":[],"finished":true}}}"#;
        assert!(refused(bad).contains("not allowed"));
        let nested = format!("{{\"version\":1,\"message\":{}", "[".repeat(100_000));
        assert!(refused(&nested).contains("failed to parse"), "deep nesting must not overflow the stack");
    }

    #[test]
    fn reasons_are_cut_and_made_printable() {
        let reason = format!("\u{1b}[2J{}", "x".repeat(5000));
        let bytes = encode(Message::Stopping { reason, code: 1 }).unwrap();
        let Message::Stopping { reason, .. } = parse(&bytes[LENGTH..]).unwrap() else {
            panic!("another message")
        };
        assert!(reason.len() <= REASON_MAX && !reason.contains('\u{1b}'));
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..6),
            cuts in prop::collection::vec(1..50_usize, 1..50),
        ) {
            let stream: Vec<u8> = bodies.iter().flat_map(|body| frame(body).unwrap()).collect();
            let (mut frames, mut seen, mut rest) = (Frames::default(), Vec::new(), stream.as_slice());
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                frames.push(piece);
                while let Some(body) = frames.next_frame().unwrap() {
                    seen.push(body);
                }
                rest = after;
            }
            prop_assert_eq!(seen, bodies);
            prop_assert!(frames.is_empty());
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let mut frames = Frames::default();
            frames.push(&bytes);
            while let Ok(Some(frame)) = frames.next_frame() {
                let _ = parse(&frame);
            }
            let _ = parse(&bytes);
        }
    }
}
