//! Sums that somebody has verified already (`CHECKSUM_UNNECESSARY`): a card does, and so does the kernel when it tries
//! whether packets can be joined (GRO). The programs see packets of which nobody will look at the sum again, and still it
//! has to be right when they leave (packet case H-08).

#![expect(unsafe_code, reason = "what a packet socket says of sums has no safe wrapper")]

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use patchswitch_common::Slot;
use patchswitch_load::echo;
use patchswitch_tests::frame;
use patchswitch_tests::netlab::{CLIENT_LINK, Ns, UPLINK};

use crate::buffers::{datagrams, servers};
use crate::foreign::Counter;
use crate::offload::link;
use crate::rig::{Rig, service};
use crate::udp::{clients, event, learn, switch};

/// The port of the servers.
const OTHER: u16 = 7300;
/// Flows stay known for the length of a test.
const IDLE: Duration = Duration::from_secs(60);
/// `TP_STATUS_CSUM_VALID` of `linux/if_packet.h`.
const VERIFIED: u32 = 1 << 7;
/// What a datagram of the tests has in it, so that it is known.
const MARK: &[u8; 8] = b"verified";

/// A packet socket that says of each packet what is known of its sum.
struct Sums(OwnedFd);

impl Sums {
    fn of(ns: &Ns, link: &str) -> anyhow::Result<Self> {
        ns.enter(|| {
            let name = std::ffi::CString::new(link)?;
            // SAFETY: a string that outlives the call.
            let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
            ensure!(index != 0, "no link {link}");
            Ok(Self(packets(index)?))
        })
    }

    /// Whether somebody has verified the sum of the next packet that comes in and has the mark.
    fn next(&self) -> anyhow::Result<bool> {
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end {
            match receive(&self.0)? {
                Some((bytes, status)) if bytes.windows(MARK.len()).any(|part| part == MARK) => {
                    return Ok(status & VERIFIED != 0);
                }
                Some(_) => {}
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        anyhow::bail!("the packet did not come")
    }
}

/// A packet socket for all that a link has, which tells what belongs to each packet.
fn packets(index: u32) -> anyhow::Result<OwnedFd> {
    let all = (libc::ETH_P_ALL as u16).to_be();
    let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: a call without pointers.
    let socket = unsafe { libc::socket(libc::AF_PACKET, flags, i32::from(all)) };
    ensure!(socket >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor is new and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let on = 1_i32;
    // SAFETY: the pointer is to a number that lives for the call, and the size is its own.
    let told = unsafe {
        let size = size_of::<i32>() as u32;
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_AUXDATA,
            (&raw const on).cast(),
            size,
        )
    };
    ensure!(told == 0, "{}", io::Error::last_os_error());
    // SAFETY: a plain structure of numbers, for which 0 is a value.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    (to.sll_family, to.sll_protocol, to.sll_ifindex) = (libc::AF_PACKET as u16, all, index.cast_signed());
    // SAFETY: the address lives for the call, and the size is its own.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const to).cast(), size_of_val(&to) as u32) };
    ensure!(bound == 0, "{}", io::Error::last_os_error());
    Ok(socket)
}

/// A packet that came in, and its `tp_status`; nothing if there is none yet. What goes out has none of use.
fn receive(socket: &OwnedFd) -> anyhow::Result<Option<(Vec<u8>, u32)>> {
    let (mut bytes, mut control) = (vec![0_u8; 1 << 16], [0_u64; 16]);
    // SAFETY: plain structures of numbers and pointers, for which 0 is a value.
    let (mut from, mut message): (libc::sockaddr_ll, libc::msghdr) = unsafe { std::mem::zeroed() };
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    (message.msg_name, message.msg_namelen) = ((&raw mut from).cast(), size_of_val(&from) as u32);
    (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control) as _);
    // SAFETY: every pointer in the message is to a buffer with the length beside it, which outlives the call.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    if length < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error.into()) };
    }
    bytes.truncate(length.unsigned_abs());
    // SAFETY: the kernel has filled the message; its first control message, if any, lies in the buffer.
    let status = unsafe {
        let header =
            libc::CMSG_FIRSTHDR(&raw const message).as_ref().context("nothing is told of a packet")?;
        ensure!(header.cmsg_type == libc::PACKET_AUXDATA, "something else is told of it");
        libc::CMSG_DATA(header).cast::<u32>().read_unaligned()
    };
    Ok(Some((if from.sll_pkttype == OUTGOING { Vec::new() } else { bytes }, status)))
}

/// `PACKET_OUTGOING` of `linux/if_packet.h`.
const OUTGOING: u8 = 4;

/// Says whether the host's kernel tries to join what comes by two links: that is what verifies sums here.
fn joins(rig: &Rig, inner: &str, joins: &str) -> anyhow::Result<()> {
    for link in [UPLINK, inner] {
        rig.lab.host.run(&["ethtool", "-K", link, "gro", joins])?;
    }
    Ok(())
}

fn exchange(client: &UdpSocket, server: &UdpSocket, data: &[u8]) -> anyhow::Result<()> {
    client.send(data)?;
    let mut got = [0; 2000];
    let (length, from) = server.recv_from(&mut got)?;
    ensure!(got[..length] == *data, "the server got something else");
    server.send_to(data, from)?;
    let length = client.recv(&mut got)?;
    ensure!(got[..length] == *data, "the client got something else");
    Ok(())
}

#[test]
fn sums_that_are_verified_already_are_right_all_the_same() {
    let rig = Rig::new("verified").unwrap();
    let servers = servers(&rig).unwrap();
    rig.attach_owned(IDLE).unwrap();
    let inner = link(&rig).unwrap();
    // Both ends make their sums themselves: what comes to the host has whole ones, of which nobody knows anything.
    for (ns, link) in [(&rig.lab.client, CLIENT_LINK), (&rig.lab.a, "eth0")] {
        ns.run(&["ethtool", "-K", link, "tx", "off"]).unwrap();
    }
    let sockets = clients(&rig, OTHER).unwrap();
    learn(&rig).unwrap();
    for (client, server) in sockets.iter().zip(&servers) {
        exchange(client, server, b"before").unwrap();
    }
    switch(&rig, Slot::B).unwrap();
    for verified in [false, true] {
        joins(&rig, &inner, if verified { "on" } else { "off" }).unwrap();
        for (family, (client, server)) in sockets.iter().zip(&servers).enumerate() {
            for length in [MARK.len(), 601, 1400] {
                let what = format!("verified: {verified}, family {family}, {length} bytes");
                let mut data = MARK.to_vec();
                data.resize(length, 0x5a);
                // At the program for clients, in the partition that it brings them to, at the program for answers.
                let seen = [(&rig.lab.host, UPLINK), (&rig.lab.a, "eth0"), (&rig.lab.host, inner.as_str())]
                    .map(|(ns, link)| Sums::of(ns, link).unwrap());
                let ask = || exchange(client, server, &data).unwrap();
                let came = datagrams(&rig.lab.client, CLIENT_LINK, 1, ask).unwrap();
                assert_eq!(seen.map(|sums| sums.next().unwrap()), [verified; 3], "{what}");
                assert_eq!(came, [(data.clone(), true)], "{what}: as the client's link has it");
            }
        }
    }
    assert_eq!([event(&rig, "rewritten_v4"), event(&rig, "rewritten_v6")], [6; 2]);
    rig.finish_owned().unwrap();
}

/// What a VXLAN tunnel sends (RFC 7348): a frame in a datagram, and in the frame one more datagram, with its own sum.
fn tunnelled(length: usize) -> Vec<u8> {
    let mut data = MARK.to_vec();
    data.resize(length, 0x5a);
    let [from, to] = [[192, 0, 2, 1], [192, 0, 2, 2]].map(|address| (IpAddr::from(address), 9));
    let inner = frame::udp(from, to, &data).frame([2, 0, 0, 0, 0, 1]);
    [&[8, 0, 0, 0, 0, 0, 42, 0], &inner[..]].concat()
}

/// Sockets of the client, from the tunnel's port to that of the service.
fn tunnel_ends(rig: &Rig) -> anyhow::Result<[UdpSocket; 2]> {
    let sockets = rig.lab.client.enter(|| Ok(echo::bind(OTHER)?))?;
    for (socket, to) in sockets.iter().zip(service()) {
        socket.connect((to, OTHER))?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    }
    Ok(sockets)
}

/// The host has a tunnel whose port is a port of the service as well: the kernel verifies the sum of what comes to it, and
/// that of the packet within, so that the packet says of two sums that they are right.
#[test]
fn sums_that_are_verified_twice_are_right_all_the_same() {
    let rig = Rig::new("verified2").unwrap();
    let servers = servers(&rig).unwrap();
    rig.attach_owned(IDLE).unwrap();
    let inner = link(&rig).unwrap();
    for (ns, link) in [(&rig.lab.client, CLIENT_LINK), (&rig.lab.a, "eth0")] {
        ns.run(&["ethtool", "-K", link, "tx", "off"]).unwrap();
    }
    joins(&rig, &inner, "on").unwrap();
    rig.lab.host.ip(&format!("link add tunnel type vxlan external dstport {OTHER}")).unwrap();
    rig.lab.host.ip("link set tunnel up").unwrap();
    let sockets = tunnel_ends(&rig).unwrap();
    learn(&rig).unwrap();
    for (client, server) in sockets.iter().zip(&servers) {
        exchange(client, server, &tunnelled(8)).unwrap();
    }
    switch(&rig, Slot::B).unwrap();
    let twice = [UPLINK, &inner].map(|link| Counter::twice_verified(&rig.lab.host, link).unwrap());
    let mut asked = 0;
    for (family, (client, server)) in sockets.iter().zip(&servers).enumerate() {
        for length in [MARK.len(), 601, 1350] {
            let data = tunnelled(length);
            let ask = || exchange(client, server, &data).unwrap();
            let came = datagrams(&rig.lab.client, CLIENT_LINK, 1, ask).unwrap();
            assert_eq!(came, [(data.clone(), true)], "family {family}, {length} bytes");
            asked += 1;
            assert_eq!([twice[0].count(), twice[1].count()], [asked; 2], "family {family}, {length} bytes");
        }
    }
    assert_eq!([event(&rig, "rewritten_v4"), event(&rig, "rewritten_v6")], [3; 2]);
    drop(twice);
    rig.lab.host.ip("link del tunnel").unwrap();
    rig.finish_owned().unwrap();
}
