//! The frames that a link has, in and out, while something is done.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use patchswitch_tests::netlab::Ns;
use pnet::datalink::{self, Channel, Config, DataLinkReceiver};

/// What is kept of a frame.
const HEAD: usize = 128;
/// After what was done a link may go on for so long.
const REST: Duration = Duration::from_secs(1);

/// A frame of a link.
#[derive(Debug)]
pub(crate) struct Frame {
    /// Its length, longer than the link's if the kernel has joined it or will cut it.
    pub(crate) length: usize,
    /// Its first bytes.
    pub(crate) head: Vec<u8>,
}

/// Says that it is done, also when that failed.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Does something, and gives the frames of a link that are wanted until then. Of very many some may be missing.
pub(crate) fn tapped<T>(
    ns: &Ns,
    link: &str,
    wanted: impl Fn(&[u8]) -> bool + Sync,
    during: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(T, Vec<Frame>)> {
    let mut receiver = ns.enter(|| open(link))?;
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| read(receiver.as_mut(), &wanted, &is_done));
        let done = Done(&is_done);
        let result = during();
        drop(done);
        let frames = reading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok((result?, frames))
    })
}

fn open(link: &str) -> anyhow::Result<Box<dyn DataLinkReceiver>> {
    let link = datalink::interfaces().into_iter().find(|found| found.name == link).context("no link")?;
    // Longer than what a kernel joins: a frame is never read in part.
    let config = Config {
        read_timeout: Some(Duration::from_millis(100)),
        read_buffer_size: 1 << 17,
        ..Config::default()
    };
    match datalink::channel(&link, config)? {
        Channel::Ethernet(_, receiver) => Ok(receiver),
        _ => anyhow::bail!("not a link of frames"),
    }
}

fn read(
    receiver: &mut dyn DataLinkReceiver,
    wanted: &impl Fn(&[u8]) -> bool,
    is_done: &AtomicBool,
) -> Vec<Frame> {
    let (mut frames, mut end) = (Vec::new(), None);
    loop {
        if is_done.load(Ordering::SeqCst)
            && *end.get_or_insert_with(|| Instant::now() + REST) < Instant::now()
        {
            return frames;
        }
        match receiver.next() {
            Ok(frame) if wanted(frame) => {
                frames.push(Frame { length: frame.len(), head: frame[..frame.len().min(HEAD)].to_vec() });
            }
            Ok(_) => {}
            // Nothing was there for a while.
            Err(_) if end.is_some() => return frames,
            Err(_) => {}
        }
    }
}
