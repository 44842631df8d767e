//! What a partition may say, and what it is refused.

use super::*;
use crate::host::linux::programs::{Program, Run};

struct Channel {
    dir: tempfile::TempDir,
    server: ControlServer,
    boot: Boot,
}

fn channel() -> Channel {
    let dir = tempfile::tempdir().unwrap();
    let boot = Boot::new().unwrap();
    let members = Members::Process(std::process::id());
    let server = ControlServer::listen(dir.path(), boot.clone(), members).unwrap();
    Channel { dir, server, boot }
}

impl Channel {
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join(control::SOCKET)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream
    }

    fn hello(&self) -> Message {
        Message::Hello { boot_id: self.boot.boot_id.clone(), nonce: self.boot.nonce.clone() }
    }

    fn next(&mut self, milliseconds: u64) -> Next {
        self.server.next(Instant::now() + Duration::from_millis(milliseconds), None).unwrap()
    }

    fn event(&mut self) -> Event {
        match self.next(5000) {
            Next::Event(event) => event,
            other => panic!("{other:?} instead of an event"),
        }
    }
}

fn answer(stream: &mut UnixStream) -> Answer {
    let mut frames = Frames::default();
    let mut bytes = [0; 512];
    loop {
        if let Some(frame) = frames.next_frame().unwrap() {
            return serde_json::from_slice(&frame).unwrap();
        }
        let count = stream.read(&mut bytes).unwrap();
        assert!(count > 0, "closed without an answer");
        frames.push(&bytes[..count]);
    }
}

fn write(stream: &mut UnixStream, message: Message) {
    stream.write_all(&control::encode(message).unwrap()).unwrap();
}

#[test]
fn a_conversation_is_heard_in_order_and_answered() {
    let mut channel = channel();
    let mut stream = channel.connect();
    write(&mut stream, channel.hello());
    write(&mut stream, Message::ServiceStarted {});
    assert_eq!(channel.event(), Event::Hello);
    assert_eq!(channel.event(), Event::ServiceStarted);
    assert_eq!(answer(&mut stream), Answer::Accepted);
    assert_eq!(channel.next(20), Next::TimeOut);
    let results = PatchResults::new("job", &channel.boot.boot_id);
    write(&mut stream, Message::Results(results.clone()));
    assert_eq!(channel.event(), Event::Results(results));
}

#[test]
fn without_the_nonce_of_this_boot_nothing_is_accepted() {
    let mut channel = channel();
    let mut stream = channel.connect();
    write(&mut stream, Message::ServiceStarted {});
    assert!(matches!(channel.event(), Event::Refused(reason) if reason.contains("greeting")));
    assert!(matches!(answer(&mut stream), Answer::Refused(_)));
    let mut stream = channel.connect();
    let nonce = Boot::new().unwrap().nonce;
    write(&mut stream, Message::Hello { boot_id: channel.boot.boot_id.clone(), nonce });
    assert!(matches!(channel.event(), Event::Refused(reason) if reason.contains("another boot")));
    let mut stream = channel.connect();
    write(&mut stream, channel.hello());
    write(&mut stream, Message::Results(PatchResults::new("job", "earlier-boot")));
    assert_eq!(channel.event(), Event::Hello);
    assert!(matches!(channel.event(), Event::Refused(reason) if reason.contains("another boot")));
}

#[test]
fn a_process_of_elsewhere_is_refused_before_it_says_anything() {
    let dir = tempfile::tempdir().unwrap();
    let boot = Boot::new().unwrap();
    let members = Members::Process(std::process::id() + 1);
    let mut server = ControlServer::listen(dir.path(), boot, members).unwrap();
    let _stream = UnixStream::connect(dir.path().join(control::SOCKET)).unwrap();
    let next = server.next(Instant::now() + Duration::from_secs(5), None).unwrap();
    assert!(matches!(next, Next::Event(Event::Refused(reason)) if reason.contains("not in this partition")));
    assert!(server.peers.is_empty());
}

#[test]
fn a_huge_frame_is_refused_and_the_others_are_still_heard() {
    let mut channel = channel();
    let (mut good, mut bad) = (channel.connect(), channel.connect());
    bad.write_all(&u32::MAX.to_be_bytes()).unwrap();
    assert!(matches!(channel.event(), Event::Refused(reason) if reason.contains("announced")));
    assert!(matches!(answer(&mut bad), Answer::Refused(_)));
    assert_eq!(bad.read(&mut [0; 8]).unwrap(), 0, "the connection is closed");
    write(&mut good, channel.hello());
    assert_eq!(channel.event(), Event::Hello);
}

#[test]
fn silent_connections_do_not_keep_others_out() {
    let mut channel = channel();
    let silent: Vec<UnixStream> = (0..PEERS_MAX + 3).map(|_| channel.connect()).collect();
    assert_eq!(channel.next(20), Next::TimeOut);
    assert_eq!(channel.server.peers.len(), PEERS_MAX);
    channel.server.peers.iter_mut().for_each(|peer| peer.silent_after = Instant::now());
    let mut late = channel.connect();
    write(&mut late, channel.hello());
    assert_eq!(channel.event(), Event::Hello);
    drop(silent);
}

#[test]
fn what_was_said_before_the_end_is_told_before_the_end() {
    let mut channel = channel();
    let mut child = Run::new(Program::Shell).args(["-c", "exit 0"]).spawn().unwrap();
    let process = Process::open(child.id()).unwrap().unwrap();
    assert!(process.wait(Instant::now() + Duration::from_secs(5)).unwrap());
    let mut stream = channel.connect();
    write(&mut stream, channel.hello());
    write(&mut stream, Message::Stopping { reason: "enough".to_owned(), code: 3 });
    drop(stream);
    let deadline = || Instant::now() + Duration::from_secs(5);
    let mut next = || channel.server.next(deadline(), Some(&process)).unwrap();
    assert_eq!(next(), Next::Event(Event::Hello));
    assert_eq!(next(), Next::Event(Event::Stopping { reason: "enough".to_owned(), code: 3 }));
    assert_eq!(next(), Next::Ended);
    child.wait().unwrap();
}

#[test]
fn a_boot_is_described_for_its_partition_and_for_the_next_agent() {
    let channel = channel();
    let (dir, boot) = (channel.dir.path(), &channel.boot);
    assert_eq!(ControlServer::boot_of(dir).unwrap().as_ref(), Some(boot));
    let mode = fs::metadata(dir.join(control::BOOT)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o400);
    let socket = dir.join(control::SOCKET);
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let Channel { dir, server, boot } = channel;
    drop(server);
    assert!(!socket.exists(), "nobody listens, and it shows");
    let members = Members::Process(std::process::id());
    let mut again = ControlServer::resume(dir.path(), boot.clone(), members).unwrap();
    let mut stream = UnixStream::connect(&socket).unwrap();
    write(&mut stream, Message::Hello { boot_id: boot.boot_id, nonce: boot.nonce });
    let next = again.next(Instant::now() + Duration::from_secs(5), None).unwrap();
    assert_eq!(next, Next::Event(Event::Hello));
    assert_eq!(ControlServer::boot_of(Path::new("/nonexistent")).unwrap(), None);
}

#[test]
fn nonces_are_compared_whole() {
    assert!(same("abc", "abc"));
    assert!(!same("abc", "abd") && !same("abc", "ab") && !same("", "a"));
}
