//! What is kept of every request: one compact entry of an answered one, everything known of a failed one.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::clock;

/// What a request is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// HTTP over a pool of connections that are kept, and renewed every few seconds.
    Keepalive,
    /// HTTP over a connection of its own.
    New,
    /// A long download, slowed down by its reader.
    Download,
    /// One request over a connection that was opened long before and never used.
    Idle,
    /// A datagram and its echo.
    Udp,
}

impl Class {
    /// All of them, in the order of `Recorder`'s lists.
    pub const ALL: [Self; 5] = [Self::Keepalive, Self::New, Self::Download, Self::Idle, Self::Udp];

    /// Whether requests of this class come all the time, so that a time without an answer means something.
    pub fn is_steady(self) -> bool {
        matches!(self, Self::Keepalive | Self::New | Self::Udp)
    }
}

/// The address family of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Keepalive => "keepalive",
            Self::New => "new",
            Self::Download => "download",
            Self::Idle => "idle",
            Self::Udp => "udp",
        })
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::V4 { "v4" } else { "v6" })
    }
}

/// How a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "kind", content = "detail", rename_all = "snake_case")]
pub enum ErrorKind {
    /// The connection was refused.
    #[error("refused")]
    Refused,
    /// The connection was reset.
    #[error("reset")]
    Reset,
    /// No way to the server, says a router or the client's own kernel.
    #[error("unreachable")]
    Unreachable,
    /// No complete answer in time.
    #[error("time-out")]
    TimeOut,
    /// The server closed the connection before the first byte of an answer.
    #[error("closed without an answer")]
    Closed,
    /// The answer ended before its announced length.
    #[error("answer cut off after {got} of {wanted} bytes")]
    Short {
        /// Bytes of the body that came.
        got: u64,
        /// Bytes that were announced.
        wanted: u64,
    },
    /// A complete answer with another status than 200.
    #[error("status {0}")]
    BadStatus(u16),
    /// Something that is no answer.
    #[error("not an answer: {0}")]
    BadAnswer(String),
    /// A datagram's answer came from somebody else than who was asked.
    #[error("answer from {0}")]
    WrongSource(SocketAddr),
    /// A download has another content than before.
    #[error("wrong digest {0}")]
    BadDigest(String),
    /// Anything else, in the words of the kernel.
    #[error("{0}")]
    Other(String),
}

impl From<std::io::Error> for ErrorKind {
    fn from(error: std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        match error.kind() {
            Io::ConnectionRefused => Self::Refused,
            // Writing to a connection that the other side has reset says "broken pipe".
            Io::ConnectionReset | Io::ConnectionAborted | Io::BrokenPipe => Self::Reset,
            Io::HostUnreachable | Io::NetworkUnreachable => Self::Unreachable,
            Io::TimedOut => Self::TimeOut,
            _ => Self::Other(error.to_string()),
        }
    }
}

/// A request that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Its number in the run.
    pub number: u64,
    /// What it was like.
    pub class: Class,
    /// Its address family.
    pub family: Family,
    /// When it was due.
    pub due_ns: u64,
    /// When it was known to have failed.
    pub failed_ns: u64,
    /// The same by the wall clock, in milliseconds since 1970.
    pub wall_ms: u64,
    /// When its connection (or the first datagram's socket) was opened, if it came that far.
    pub opened_ns: Option<u64>,
    /// The client's end of it: what to look for in a packet capture.
    pub local: Option<SocketAddr>,
    /// Who answered, or who answered earlier on the same connection, if anybody did.
    pub instance: Option<String>,
    /// How it failed.
    pub error: ErrorKind,
}

/// The answered requests of one class and family, in the order of their ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Series {
    /// What they are like.
    pub class: Class,
    /// Their address family.
    pub family: Family,
    /// When each was complete, in microseconds since the start of the run; stored as differences.
    #[serde(with = "differences")]
    done_us: Vec<u64>,
    /// How long each took from the moment it was due, in microseconds.
    latency_us: Vec<u32>,
    /// Who answered each: an index of [`Run::instances`](crate::report::Run::instances).
    instance: Vec<u8>,
}

/// One answered request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// When it was complete, in microseconds since the start of the run.
    pub done_us: u64,
    /// How long it took from the moment it was due, in microseconds.
    pub latency_us: u32,
    /// Who answered: an index of the run's instances.
    pub instance: u8,
}

impl Answer {
    /// When it was due, in microseconds since the start of the run.
    pub fn due_us(&self) -> u64 {
        self.done_us.saturating_sub(u64::from(self.latency_us))
    }
}

impl Series {
    /// An empty one.
    pub fn new(class: Class, family: Family) -> Self {
        Self { class, family, done_us: Vec::new(), latency_us: Vec::new(), instance: Vec::new() }
    }

    /// Adds an answer. Answers are added in the order of their ends; one that claims an earlier end than the last
    /// is given the last one's.
    pub fn push(&mut self, answer: Answer) {
        let last = self.done_us.last().copied().unwrap_or(0);
        self.done_us.push(answer.done_us.max(last));
        self.latency_us.push(answer.latency_us);
        self.instance.push(answer.instance);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.done_us.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.done_us.is_empty()
    }

    /// When each was complete, in microseconds since the start of the run; ascending.
    pub fn done_us(&self) -> &[u64] {
        &self.done_us
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Answer> + '_ {
        let others = self.latency_us.iter().zip(&self.instance);
        self.done_us.iter().zip(others).map(|(&done_us, (&latency_us, &instance))| Answer {
            done_us,
            latency_us,
            instance,
        })
    }

    /// Whether its lists have one length, as a file that somebody else wrote need not.
    pub(crate) fn is_whole(&self) -> bool {
        self.latency_us.len() == self.done_us.len() && self.instance.len() == self.done_us.len()
    }
}

mod differences {
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(values: &[u64], serializer: S) -> Result<S::Ok, S::Error> {
        let before = [0].iter().chain(values);
        serializer.collect_seq(values.iter().zip(before).map(|(value, before)| value - before))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
        let mut values = Vec::<u64>::deserialize(deserializer)?;
        let mut sum = 0_u64;
        for value in &mut values {
            sum = sum.checked_add(*value).ok_or_else(|| serde::de::Error::custom("time overflows"))?;
            *value = sum;
        }
        Ok(values)
    }
}

/// What a request knows of its way when it fails.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Trace {
    pub(crate) opened_ns: Option<u64>,
    pub(crate) local: Option<SocketAddr>,
    pub(crate) instance: Option<u8>,
}

/// A request that is under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    pub(crate) number: u64,
    pub(crate) class: Class,
    pub(crate) family: Family,
    pub(crate) due_ns: u64,
}

/// Collects answers and failures while a run lasts.
#[derive(Debug)]
pub(crate) struct Recorder {
    pub(crate) started_ns: u64,
    pub(crate) series: Vec<Series>,
    pub(crate) failures: Vec<Failure>,
    pub(crate) instances: Vec<String>,
    issued: u64,
    answered: u64,
}

impl Recorder {
    /// For a run that starts at a time, with a list for each of the given classes and families.
    pub(crate) fn new(started_ns: u64, series: impl IntoIterator<Item = (Class, Family)>) -> Self {
        let series = series.into_iter().map(|(class, family)| Series::new(class, family)).collect();
        Self { started_ns, series, failures: Vec::new(), instances: Vec::new(), issued: 0, answered: 0 }
    }

    /// The next request's number; it will be answered or fail.
    pub(crate) fn issue(&mut self, class: Class, family: Family, due_ns: u64) -> Ticket {
        let number = self.issued;
        self.issued += 1;
        Ticket { number, class, family, due_ns }
    }

    /// Requests issued so far.
    pub(crate) fn issued(&self) -> u64 {
        self.issued
    }

    /// Requests answered so far.
    pub(crate) fn answered(&self) -> u64 {
        self.answered
    }

    /// Requests whose end is not known yet.
    pub(crate) fn outstanding(&self) -> u64 {
        self.issued - self.answered - self.failures.len() as u64
    }

    /// The index of an instance's name. More names than an index holds share the last one: by then it is clear
    /// that the marker does not tell instances apart.
    pub(crate) fn instance(&mut self, name: &str) -> u8 {
        let index = self.instances.iter().position(|known| known == name);
        let index = index.unwrap_or_else(|| {
            let next = self.instances.len().min(usize::from(u8::MAX));
            match self.instances.get_mut(next) {
                Some(last) => "(more)".clone_into(last),
                None => self.instances.push(name.to_owned()),
            }
            next
        });
        u8::try_from(index).unwrap_or(u8::MAX)
    }

    /// Notes an answer that is complete now.
    pub(crate) fn answer(&mut self, ticket: Ticket, instance: u8) {
        let now = clock::now_ns();
        let latency_us = u32::try_from(now.saturating_sub(ticket.due_ns) / 1000).unwrap_or(u32::MAX);
        let done_us = now.saturating_sub(self.started_ns) / 1000;
        let mut series = self.series.iter_mut();
        if let Some(series) = series.find(|s| s.class == ticket.class && s.family == ticket.family) {
            series.push(Answer { done_us, latency_us, instance });
        }
        self.answered += 1;
    }

    /// Notes a failure that is known now.
    pub(crate) fn fail(&mut self, ticket: Ticket, trace: Trace, error: ErrorKind) {
        let instance = trace.instance.and_then(|index| self.instances.get(usize::from(index)).cloned());
        self.failures.push(Failure {
            number: ticket.number,
            class: ticket.class,
            family: ticket.family,
            due_ns: ticket.due_ns,
            failed_ns: clock::now_ns(),
            wall_ms: clock::wall_ms(),
            opened_ns: trace.opened_ns,
            local: trace.local,
            instance,
            error,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_survives_its_file_and_stays_in_order() {
        let mut series = Series::new(Class::New, Family::V6);
        for done_us in [5, 9, 7, 20] {
            series.push(Answer { done_us, latency_us: 3, instance: 1 });
        }
        assert_eq!(series.done_us(), [5, 9, 9, 20]);
        let text = serde_json::to_string(&series).unwrap();
        assert!(text.contains("[5,4,0,11]"), "{text}");
        assert_eq!(serde_json::from_str::<Series>(&text).unwrap(), series);
    }

    #[test]
    fn every_issued_request_is_answered_failed_or_outstanding() {
        let mut recorder = Recorder::new(0, [(Class::New, Family::V4)]);
        let tickets: Vec<_> = (0..3).map(|_| recorder.issue(Class::New, Family::V4, 0)).collect();
        let web = recorder.instance("web");
        assert_eq!((web, recorder.instance("other"), recorder.instance("web")), (0, 1, 0));
        recorder.answer(tickets[0], web);
        recorder.fail(tickets[1], Trace { instance: Some(1), ..Trace::default() }, ErrorKind::Refused);
        assert_eq!((recorder.issued(), recorder.answered(), recorder.outstanding()), (3, 1, 1));
        assert_eq!(recorder.failures[0].instance.as_deref(), Some("other"));
        assert_eq!(recorder.failures[0].number, 1);
    }

    #[test]
    fn a_marker_that_changes_with_every_answer_does_not_fill_the_memory() {
        let mut recorder = Recorder::new(0, []);
        let last = (0..1000).map(|n| recorder.instance(&n.to_string())).max();
        assert_eq!((last, recorder.instances.len()), (Some(255), 256));
        assert_eq!(recorder.instances[255], "(more)");
    }

    #[test]
    fn errors_of_the_kernel_are_told_apart() {
        let kind = |errno| ErrorKind::from(std::io::Error::from_raw_os_error(errno));
        assert_eq!(kind(111), ErrorKind::Refused);
        assert_eq!(kind(104), ErrorKind::Reset);
        assert_eq!(kind(32), ErrorKind::Reset);
        assert_eq!(kind(113), ErrorKind::Unreachable);
        assert_eq!(kind(110), ErrorKind::TimeOut);
        assert!(matches!(kind(99), ErrorKind::Other(_)));
    }
}
