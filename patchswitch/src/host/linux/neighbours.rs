//! What neighbours say on a link: ARP and neighbour discovery, whole frames (`packet(7)`), and nothing else.
//!
//! The kernel sorts them out by a filter in the socket, so that clients' packets wake nobody up.
#![expect(unsafe_code, reason = "addresses of packet sockets have no safe constructor")]

use std::io::{self, Read as _};

use socket2::{Domain, SockAddr, SockFilter, Socket, Type};

use super::netlink::Link;

const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;
/// The longest frame that is read; more options than that has no message of discovery that claims anything.
const LONGEST: usize = 512;
/// So many frames are read at a time: a flood must not keep who has other work.
const AT_ONCE: usize = 256;

// Classic BPF (`linux/filter.h`, `linux/bpf_common.h`).
const LOAD_WORD: u16 = 0x20;
const LOAD_BYTE: u16 = 0x30;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
/// `SKF_AD_OFF + SKF_AD_PKTTYPE`: to whom a frame was addressed.
const PACKET_TYPE: u32 = 0xffff_f000 + 4;
/// `PACKET_OTHERHOST`: not to us, or in a VLAN that has no device here.
const OTHER_HOST: u32 = 3;
const ICMPV6: u32 = 58;
const SOLICITATION: u32 = 135;
const ADVERTISEMENT: u32 = 136;
/// Where these are in a frame without extension headers.
const NEXT_HEADER: u32 = 14 + 6;
const MESSAGE_TYPE: u32 = 14 + 40;

/// Hears neighbours on one link.
#[derive(Debug)]
pub struct Listener([Socket; 2]);

impl Listener {
    /// Listens on a link of the calling thread's namespace from now on. Root only.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn open(link: &Link) -> io::Result<Self> {
        let step = SockFilter::new;
        let arp = [
            step(LOAD_WORD, 0, 0, PACKET_TYPE),
            step(JUMP_IF_EQUAL, 1, 0, OTHER_HOST),
            step(RETURN, 0, 0, LONGEST as u32),
            step(RETURN, 0, 0, 0),
        ];
        let discovery = [
            step(LOAD_WORD, 0, 0, PACKET_TYPE),
            step(JUMP_IF_EQUAL, 6, 0, OTHER_HOST),
            step(LOAD_BYTE, 0, 0, NEXT_HEADER),
            step(JUMP_IF_EQUAL, 0, 4, ICMPV6),
            step(LOAD_BYTE, 0, 0, MESSAGE_TYPE),
            step(JUMP_IF_EQUAL, 1, 0, SOLICITATION),
            step(JUMP_IF_EQUAL, 0, 1, ADVERTISEMENT),
            step(RETURN, 0, 0, LONGEST as u32),
            step(RETURN, 0, 0, 0),
        ];
        Ok(Self([open(link, ETH_P_ARP, &arp)?, open(link, ETH_P_IPV6, &discovery)?]))
    }

    /// What was heard since the last time, as far as there was room to keep it. Waits for nothing.
    ///
    /// # Errors
    /// What the kernel said, e.g. that the link is down; later calls may succeed.
    pub fn read(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        for mut socket in &self.0 {
            let mut buffer = [0; LONGEST];
            for _ in 0..AT_ONCE {
                match socket.read(&mut buffer) {
                    Ok(length) => frames.push(buffer[..length].to_vec()),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(frames)
    }
}

/// A socket for frames of one protocol on one link that a filter lets pass.
fn open(link: &Link, protocol: u16, filter: &[SockFilter]) -> io::Result<Socket> {
    // Of no protocol at first, so that nothing gets in before the filter is there.
    let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
    socket.set_nonblocking(true)?;
    socket.attach_filter(filter)?;
    socket.bind(&address(link, protocol)?)?;
    Ok(socket)
}

fn address(link: &Link, protocol: u16) -> io::Result<SockAddr> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: i32::try_from(link.index).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the storage has room for every kind of address and is aligned for them; the length is that of what is
    // written.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            storage.cast::<libc::sockaddr_ll>().write(address);
            *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })
    }?;
    Ok(address)
}
