//! Packets whose checksum the network card has computed (CHECKSUM_COMPLETE): a rewrite must keep the card's sum right,
//! or the kernel says "hw csum failure". Only the system call can say that a packet is one; the library cannot.
#![expect(unsafe_code, reason = "BPF_PROG_TEST_RUN with a flag that aya does not pass on")]

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};

use aya::util::KernelVersion;
use patchswitch_common::Slot;
use patchswitch_common::verdict::Hook;

use crate::bench::{Bench, Done, Family, Link, PORT, families, key};
use crate::frame::{self, Ip, Place, icmp, sctp, seal, tcp, udp};
use crate::steer::{ACK, DRAINING};

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
fn run(program: i32, link: u32, frame: &[u8], out: &mut [u8]) -> io::Result<(i32, u32)> {
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
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((attributes.action.cast_signed(), attributes.length_out))
}

/// What a program does with a packet that comes on a link, whose sum the card has computed. Nothing if this kernel cannot test it.
pub(crate) fn summed(bench: &mut Bench, hook: Hook, on: Link, frame: &[u8]) -> anyhow::Result<Option<Done>> {
    let host = bench.lab.host.clone();
    let program = bench.program(hook)?.fd()?.as_fd().as_raw_fd();
    let mut out = vec![0; frame.len() + 256];
    // Before, a rewrite of IPv6 makes the card's sum wrong: the program cannot say that it is one.
    let is_tested = KernelVersion::current()? >= KernelVersion::new(6, 16, 0);
    let is_v6 = frame.get(12..14) == Some(&[0x86, 0xdd]);
    match host.enter(|| Ok(run(program, on.index, frame, &mut out)))? {
        Ok((action, length)) => {
            out.truncate(length as usize);
            Ok(Some((action, out)))
        }
        Err(error) => match error.raw_os_error() {
            Some(libc::EINVAL) if !is_tested => Ok(None),
            Some(libc::EBADMSG) if !is_tested && is_v6 => Ok(None),
            _ => Err(error.into()),
        },
    }
}

/// What comes out of the program for a packet of the first partition. Nothing if this kernel cannot test it.
fn rewritten(bench: &mut Bench, packet: &Ip) -> anyhow::Result<Option<Vec<u8>>> {
    // The flag of the test run came with 6.15, the rewrite's for IPv6 with 6.16.
    let is_tested =
        KernelVersion::current()? >= KernelVersion::new(6, if packet.from.is_ipv4() { 15 } else { 16 }, 0);
    let (link, host) = (bench.links[0], bench.lab.host.clone());
    let program = bench.program(Hook::FromPartition)?.fd()?.as_fd().as_raw_fd();
    let mut out = vec![0; 512];
    let ran = host.enter(|| Ok(run(program, link.index, &packet.frame(link.mac), &mut out)))?;
    match ran.map_err(|error| (error.raw_os_error(), error)) {
        Ok((_, length)) => out.truncate(length as usize),
        // Where the kernel can test it, it has to; an older one that takes the flag is held to the result as well.
        Err((Some(libc::EINVAL | libc::EBADMSG), _)) if !is_tested => return Ok(None),
        Err((_, error)) => return Err(error.into()),
    }
    Ok(Some(out))
}

/// A packet as its client gets it: from the service, with a sum from scratch, if one is about the source.
fn wanted(packet: &Ip, service: IpAddr, at: Option<usize>) -> Ip {
    let mut wanted = Ip { from: service, ..packet.clone() };
    if let Some(at) = at {
        seal(&mut wanted, at);
    }
    wanted
}

/// Both halves of a packet.
fn halves(whole: &Ip, id: u32) -> [Ip; 2] {
    let (first, later) = whole.payload.split_at(48);
    let part = |payload: &[u8], offset, more| {
        let place = Some(Place { offset, more, id });
        Ip { place, payload: payload.to_vec(), ..whole.clone() }
    };
    [part(first, 0, true), part(later, 6, false)]
}

/// What the first partition sends of flows in flight, with where its sum is, if that is about the source.
fn replies(family: Family) -> Vec<(&'static str, Ip, Option<usize>)> {
    let v4 = family.client.is_ipv4();
    let (own, client) = ((family.own_a, PORT), (family.client, 1000));
    let (pong, error) = if v4 { (0, 3) } else { (129, 1) };
    let echo = |payload: &[u8]| icmp(family.own_a, family.client, pong, [0, 7, 0, 1], payload);
    let asked = udp(client, (family.service, PORT), b"x").bytes();
    let asked_more = udp(client, (family.service, PORT), b"question").bytes();
    let refused = |asked: &[u8]| icmp(family.own_a, family.client, error, [0; 4], asked);
    let mut without = udp(own, client, b"answer");
    without.payload[6..8].fill(0);
    vec![
        ("a datagram", udp(own, client, b"answer"), Some(6)),
        ("a datagram of odd length", udp(own, client, b"odd"), Some(6)),
        ("a datagram without a sum", without, None),
        ("a segment", tcp(own, client, ACK, b"data"), Some(16)),
        ("an association", sctp(own, client, b"chunk"), None),
        ("an echo", echo(b"pong"), Some(2)),
        ("an echo of odd length", echo(b"odd"), Some(2)),
        ("an error", refused(&asked), Some(2)),
        ("another error", refused(&asked_more), Some(2)),
    ]
}

/// A bench in which the first partition has answered one flow of each kind.
fn answered(bench: &mut Bench, family: Family) -> anyhow::Result<()> {
    let echo = if family.client.is_ipv4() { frame::ICMP } else { frame::ICMPV6 };
    bench.remember(key((family.client, 7), 0, echo), family.service, Slot::A, 0)?;
    for protocol in [frame::UDP, frame::TCP, frame::SCTP] {
        bench.remember(key((family.client, 1000), PORT, protocol), family.service, Slot::A, 0)?;
    }
    Ok(())
}

#[test]
fn the_cards_sum_stays_right() {
    let mut bench = Bench::new("complete").unwrap();
    bench.word(DRAINING.with_notice(true)).unwrap();
    for family in families() {
        answered(&mut bench, family).unwrap();
        for (what, packet, at) in replies(family) {
            let Some(seen) = rewritten(&mut bench, &packet).expect(what) else {
                println!("not tested by this kernel: {what}");
                continue;
            };
            assert_eq!(seen, wanted(&packet, family.service, at).frame(bench.links[0].mac), "{what}");
        }
        bench.forget().unwrap();
    }
}

/// The first fragment has the sum of all of the packet; in a later one nothing makes up for another source.
#[test]
fn the_cards_sum_of_fragments_stays_right() {
    let mut bench = Bench::new("completefrag").unwrap();
    bench.word(DRAINING.with_notice(true)).unwrap();
    for family in families() {
        answered(&mut bench, family).unwrap();
        let (own, client) = ((family.own_a, PORT), (family.client, 1000));
        let pong = if family.client.is_ipv4() { 0 } else { 129 };
        let long: Vec<u8> = (0..101).collect();
        for (id, (what, packet, at)) in (1..).zip([
            ("a datagram", udp(own, client, &long), Some(6)),
            ("an echo", icmp(family.own_a, family.client, pong, [0, 7, 0, 1], &long), Some(2)),
            ("an association", sctp(own, client, &long), None),
        ]) {
            let all = halves(&wanted(&packet, family.service, at), id);
            for (half, wanted) in halves(&packet, id).iter().zip(all) {
                let Some(seen) = rewritten(&mut bench, half).expect(what) else {
                    println!("not tested by this kernel: {what}");
                    continue;
                };
                assert_eq!(seen, wanted.frame(bench.links[0].mac), "{what}: {half:?}");
            }
        }
        bench.forget().unwrap();
    }
}

/// What clients send, whose flows are with the retiring side or not, and to both.
fn questions(family: Family) -> Vec<(&'static str, Ip)> {
    let v4 = family.client.is_ipv4();
    let (client, stranger, service) =
        ((family.client, 1000), (family.stranger, 1000), (family.service, PORT));
    let (ping, error) = if v4 { (8, 3) } else { (128, 1) };
    let answered = udp(service, client, b"answer").bytes();
    let long = udp(client, service, &[7; 90]);
    let [first, later] = halves(&long, 0x77);
    let options =
        |ip: Ip| if v4 { Ip { options: vec![1; 8], ..ip } } else { Ip { extensions: vec![0, 60], ..ip } };
    vec![
        ("a segment", tcp(stranger, service, ACK, b"question")),
        ("a datagram", udp(client, service, b"question")),
        ("a datagram of a stranger", udp(stranger, service, b"question")),
        ("a datagram behind options", options(udp(client, service, b"question"))),
        ("an echo", icmp(family.client, family.service, ping, [0, 7, 0, 1], b"ping")),
        ("an error", icmp(family.stranger, family.service, error, [0; 4], &answered)),
        ("a first fragment", first),
        ("a later fragment", later),
        (
            "a fragment before its first one",
            Ip { place: Some(Place { offset: 6, more: false, id: 0x78 }), ..long },
        ),
        ("an association", sctp(client, service, b"chunk of data")),
    ]
}

/// A client's packet is nobody's to change, and so its sum stays right, by whichever way it is decided.
#[test]
fn what_clients_send_keeps_the_cards_sum() {
    let mut bench = Bench::new("sumsin").unwrap();
    bench.word(DRAINING).unwrap();
    // The flag of the test run came with 6.15.
    let is_tested = KernelVersion::current().unwrap() >= KernelVersion::new(6, 15, 0);
    for family in families() {
        bench.remember(key((family.client, 1000), PORT, frame::UDP), family.service, Slot::A, 0).unwrap();
        for (what, packet) in questions(family) {
            let frame = packet.frame(bench.uplink.mac);
            for short_way in [true, false] {
                bench.short_way(short_way).unwrap();
                let plain = bench.run_filter(Hook::Uplink, bench.uplink, 0, &frame).unwrap();
                let (link, host) = (bench.uplink, bench.lab.host.clone());
                let program = bench.program(Hook::Uplink).unwrap().fd().unwrap().as_fd().as_raw_fd();
                let mut out = vec![0; 512];
                let ran = host.enter(|| Ok(run(program, link.index, &frame, &mut out))).unwrap();
                match ran {
                    Ok((action, length)) => {
                        out.truncate(length as usize);
                        assert_eq!((action, &out), (plain.action, &frame), "{what}");
                    }
                    Err(error) if !is_tested && error.raw_os_error() == Some(libc::EINVAL) => {
                        println!("not tested by this kernel: {what}");
                    }
                    Err(error) => panic!("{what}: {error}"),
                }
            }
        }
    }
}
