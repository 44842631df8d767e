//! Any bytes are read or refused: nothing beyond the packet is taken for a part of it, and both directions see one flow.

use super::{Watched, is_v6, network, packet};
use patchswitch_common::parse::{Fragment, Kind, LINK_HEADER, Transport, protocol};

/// Checks it of a frame.
pub fn check(frame: &[u8]) {
    let Some(v6) = is_v6(frame) else { return };
    let Ok(read) = network(frame, v6) else { return };
    assert_eq!(read.v6, v6);
    assert!(read.payload >= LINK_HEADER + if v6 { 40 } else { 20 });
    assert!(read.payload <= read.end && read.end as usize <= frame.len());
    assert!(read.fragment != Fragment::Whole || read.fragment_id == 0);

    // What follows the packet in its frame is none of it.
    let exact = &frame[..read.end as usize];
    if frame.len() <= usize::from(u16::MAX) {
        assert_eq!(network(exact, v6), Ok(read));
    }
    let watched = Watched::new(frame);
    let inward = packet(&watched, &read, false);
    if inward.is_ok() {
        assert!(watched.furthest() <= read.end as usize);
    }

    // A reply is its question with the ends exchanged.
    let outward = packet(frame, &read, true);
    assert_eq!(inward.is_ok(), outward.is_ok());
    let (Ok(inward), Ok(outward)) = (inward, outward) else { return };
    let echo = matches!(inward.flow.protocol, protocol::ICMP | protocol::ICMPV6);
    assert_eq!((inward.flow.remote, inward.flow.local), (outward.flow.local, outward.flow.remote));
    if !echo {
        assert_eq!(
            (inward.flow.remote_port, inward.flow.local_port),
            (outward.flow.local_port, outward.flow.remote_port)
        );
    }
    assert_eq!(
        (inward.kind, inward.transport, inward.flags, inward.fragment_id, inward.flow.protocol),
        (outward.kind, outward.transport, outward.flags, outward.fragment_id, outward.flow.protocol)
    );
    match inward.kind {
        Kind::LaterFragment => assert_eq!(read.fragment, Fragment::Later),
        Kind::Direct => assert_eq!(inward.flow.remote, read.source),
        Kind::Error | Kind::ErrorOfFragment => {
            assert!(matches!(read.protocol, protocol::ICMP | protocol::ICMPV6));
        }
    }
    match inward.transport {
        Transport::Tcp => assert_eq!(inward.flow.protocol, protocol::TCP),
        Transport::Udp => assert_eq!(inward.flow.protocol, protocol::UDP),
        Transport::Other => assert_eq!(inward.flags, 0),
    }
    // Nobody has connections from or to port 0.
    if inward.kind == Kind::Direct && inward.transport == Transport::Tcp {
        assert!(inward.flow.remote_port != 0 && inward.flow.local_port != 0);
    }
}
