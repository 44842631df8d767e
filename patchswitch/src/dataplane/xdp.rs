//! XDP at an uplink: its link, and the proof that what it redirects arrives.
//!
//! The program on the TC hook stays: it gets what XDP passes on, and everything when XDP is gone.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::path::Path;
use std::time::Duration;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::xdp::{XdpError, XdpLink, XdpMode};
use aya::programs::{ProgramError, TestRun, TestRunAttrs, TestRunOptions, Xdp};
use aya_obj::programs::XdpAttachType;
use patchswitch_common::Slot;
use patchswitch_common::maps::UplinkEntry;
use patchswitch_common::verdict::Hook as At;
use patchswitch_common::word::Word;

use super::attach::{Hook, Point};
use super::load::refused;
use super::self_test::{End, SelfTestError, expect_at, open_socket, packet, peer, verdict};
use super::{DataplaneError, maps};

/// So often a frame is sent before it counts as lost, and so long its arrival is waited for.
const FRAMES: u32 = 4;
const PATIENCE: Duration = Duration::from_millis(500);

/// Opens the pinned program.
fn open(directory: &Path) -> Result<Xdp, DataplaneError> {
    let name = Point::Xdp.program();
    let path = directory.join("programs").join(name);
    Xdp::from_pin(path, XdpAttachType::Interface).map_err(|error| refused("open", name, &error))
}

/// Attaches it where the driver runs it. Generic XDP, which the kernel itself runs, would only cost: it comes just
/// before TC and sees less.
pub(super) fn attach(directory: &Path, hook: &Hook) -> Result<(), DataplaneError> {
    let mut program = open(directory)?;
    let id = program.attach(&hook.link, XdpMode::Driver).map_err(|error| unusable(hook, &error))?;
    let link = program.take_link(id).map_err(|error| unusable(hook, &error))?;
    let unpinned = |reason: String| DataplaneError::Program {
        action: "pin the link of",
        program: Point::Xdp.program().to_owned(),
        reason,
    };
    let link = FdLink::try_from(link).map_err(|error| unpinned(error.to_string()))?;
    link.pin(hook.pin(directory)).map_err(|error| unpinned(error.to_string()))?;
    Ok(())
}

/// Puts a program into the place of the one that is attached, at once.
pub(super) fn update(directory: &Path, hook: &Hook, program: &mut Xdp) -> Result<(), DataplaneError> {
    let failed = |reason: String| DataplaneError::Program {
        action: "replace",
        program: Point::Xdp.program().to_owned(),
        reason,
    };
    let link = PinnedLink::from_pin(hook.pin(directory)).map(FdLink::from).and_then(XdpLink::try_from);
    let link = link.map_err(|error| failed(error.to_string()))?;
    let id = program.attach_to_link(link).map_err(|error| failed(error.to_string()))?;
    program.take_link(id).map(drop).map_err(|error| failed(error.to_string()))
}

/// Why the kernel did not take the program, and what to do about it.
fn unusable(hook: &Hook, error: &ProgramError) -> DataplaneError {
    let errno = match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        ProgramError::XdpError(XdpError::NetlinkError(error)) => error.raw_os_error(),
        _ => None,
    };
    let link = hook.link.clone();
    DataplaneError::Xdp { reason: reason(errno, &super::load::chain(error)), link }
}

fn reason(errno: Option<i32>, said: &str) -> String {
    match errno {
        Some(libc::EOPNOTSUPP) => {
            format!("its driver has no native XDP, or not with the device's present settings ({said})")
        }
        Some(libc::EBUSY | libc::EEXIST) => {
            format!("another XDP program is there already, and a device has room for one ({said})")
        }
        // What drivers say of an MTU above a page; a veth says it of its peer's.
        Some(libc::ERANGE | libc::EINVAL | libc::E2BIG | libc::EMSGSIZE) => format!(
            "its driver refuses; most do where a frame may be longer than a page of memory: set an MTU of at most about \
             3400, for a veth that of its other end ({said})"
        ),
        _ => said.to_owned(),
    }
}

/// Sends frames through the twin's program in the kernel and lets it redirect them (`BPF_F_TEST_XDP_LIVE_FRAMES`): each
/// has to arrive at a socket of the partition that owns it.
///
/// A veth drops what XDP redirects to it if its other end does not poll (NAPI), and a frame that is too long, without
/// a word: nothing but a frame can tell.
pub(super) fn run(directory: &Path, twin: &Path, ends: &[End<'_>]) -> Result<(), DataplaneError> {
    maps::write_settings(twin, &maps::read_settings(directory)?)?;
    let slots = [maps::read_slot(directory, Slot::A)?, maps::read_slot(directory, Slot::B)?];
    for (slot, entry) in [Slot::A, Slot::B].into_iter().zip(&slots) {
        maps::write_slot(twin, slot, entry)?;
    }
    let program = open(twin)?;
    for (index, uplink) in maps::uplinks(directory)? {
        maps::add_uplink(twin, index, uplink.mac)?;
        for end in ends {
            let alone = slots[end.slot.other() as usize].ifindex == 0;
            let steady = Word::steady(end.slot, 0);
            maps::write_word(twin, if alone { steady } else { steady.taken_over_by(end.slot.other()) })?;
            arrives(twin, &program, (index, uplink), end)?;
        }
    }
    Ok(())
}

fn arrives(
    twin: &Path,
    program: &Xdp,
    (index, uplink): (u32, UplinkEntry),
    end: &End<'_>,
) -> Result<(), DataplaneError> {
    let failed =
        |source| SelfTestError::Socket { address: end.address, netns: end.netns.to_string(), source };
    let socket = open_socket(end)?;
    socket.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    let port = socket.local_addr().map_err(failed)?.port();
    let mut frame = packet(peer(end.address), end.address, port);
    frame[..6].copy_from_slice(&uplink.mac);
    for _ in 0..FRAMES {
        expect_at(At::Xdp, twin, end.address, "a flow with a socket", verdict(end.slot), || {
            send(program, index, &frame)
        })?;
        if received(&socket).map_err(failed)? {
            return Ok(());
        }
    }
    let (address, netns) = (end.address, end.netns.to_string());
    Err(SelfTestError::Lost { address, netns, peer: peer(address) }.into())
}

fn send(program: &Xdp, index: u32, frame: &[u8]) -> Result<(), DataplaneError> {
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    let context = context(index, frame.len());
    options.ctx_in = Some(&context);
    options.attrs = TestRunAttrs::new().xdp_live_frames(1);
    program.test_run(options).map(drop).map_err(|error| refused("test", Point::Xdp.program(), &error))
}

/// `struct xdp_md` of `linux/bpf.h`: a frame of this length that came on the first queue of a device.
fn context(index: u32, length: usize) -> [u8; 24] {
    let mut context = [0; 24];
    context[4..8].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
    context[12..16].copy_from_slice(&index.to_ne_bytes());
    context
}

fn received(socket: &UdpSocket) -> std::io::Result<bool> {
    match socket.recv(&mut [0; 8]) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_says_what_it_means() {
        for (errno, part) in [
            (libc::EOPNOTSUPP, "no native XDP"),
            (libc::EBUSY, "another XDP program"),
            (libc::EEXIST, "another XDP program"),
            (libc::EINVAL, "MTU"),
            (libc::ERANGE, "MTU"),
        ] {
            let text = reason(Some(errno), "the kernel's words");
            assert!(text.contains(part) && text.contains("the kernel's words"), "{text}");
        }
        assert_eq!(reason(None, "other words"), "other words");
    }
}
