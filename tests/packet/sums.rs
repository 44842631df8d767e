//! Packets whose checksum the network card has computed (CHECKSUM_COMPLETE): a rewrite must keep the card's sum right,
//! or the kernel says "hw csum failure". Only the system call can say that a packet is one; the library cannot.
#![expect(unsafe_code, reason = "BPF_PROG_TEST_RUN with a flag that aya does not pass on")]

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};

use aya::util::KernelVersion;
use patchswitch_common::Slot;
use patchswitch_common::verdict::Hook;

use crate::bench::{Bench, PORT, families, key};
use crate::frame::{self, seal, udp};
use crate::steer::DRAINING;

const BPF_PROG_TEST_RUN: libc::c_long = 10;
/// `BPF_F_TEST_SKB_CHECKSUM_COMPLETE`.
const CHECKSUM_COMPLETE: u32 = 1 << 2;

/// `union bpf_attr`, as far as a test run uses it.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    program: u32,
    action: u32,
    length_in: u32,
    length_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_length_in: u32,
    context_length_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    pad: u32,
}

/// Runs a program on a packet of a link whose sum the card has computed. The kernel checks that sum afterwards.
fn run(program: i32, link: u32, frame: &[u8], out: &mut [u8]) -> io::Result<u32> {
    let mut context = [0_u8; 192];
    context[40..44].copy_from_slice(&link.to_ne_bytes());
    let mut attributes = Attributes {
        program: program.unsigned_abs(),
        length_in: frame.len() as u32,
        length_out: out.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat: 1,
        context_length_in: context.len() as u32,
        context_in: context.as_ptr() as u64,
        flags: CHECKSUM_COMPLETE,
        ..Attributes::default()
    };
    let length = size_of::<Attributes>();
    // SAFETY: every address is that of a buffer with the length beside it, which outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut attributes, length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(attributes.length_out) }
}

#[test]
fn the_cards_sum_stays_right() {
    // The flag of the test run came with 6.15, the rewrite's for IPv6 with 6.16.
    let version = KernelVersion::current().unwrap();
    let tested = |v4| version >= KernelVersion::new(6, if v4 { 15 } else { 16 }, 0);
    let mut bench = Bench::new("complete").unwrap();
    bench.word(DRAINING.with_notice(true)).unwrap();
    for family in families() {
        let client = (family.client, 1000);
        bench.remember(key(client, PORT, frame::UDP), family.service, Slot::A, 0).unwrap();
        let packet = udp((family.own_a, PORT), client, b"answer");
        let (link, host) = (bench.links[0], bench.lab.host.clone());
        let program = bench.program(Hook::FromPartition).unwrap().fd().unwrap().as_fd().as_raw_fd();
        let mut out = vec![0; 512];
        let ran = host.enter(|| Ok(run(program, link.index, &packet.frame(link.mac), &mut out))).unwrap();
        let length = match ran.map_err(|error| error.raw_os_error()) {
            // Where the kernel can test it, it has to; an older one that takes the flag is held to the result as well.
            Err(Some(libc::EINVAL | libc::EBADMSG)) if !tested(family.client.is_ipv4()) => {
                println!("not tested by this kernel: {}", family.client);
                continue;
            }
            other => other.unwrap(),
        };
        let mut wanted = frame::Ip { from: family.service, ..packet };
        seal(&mut wanted, 6);
        assert_eq!(out[..length as usize], wanted.frame(link.mac));
        bench.forget().unwrap();
    }
}
