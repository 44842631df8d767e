//! The packets of the models, generated around what matters, then cut and damaged.

use std::net::IpAddr;

use proptest::prelude::*;

use super::{LEARNED, OF_A, OF_B};
use crate::bench::{Family, PORT};
use crate::frame::{self, ETHERNET, Ip, Place, icmp};

/// A packet, before it is damaged.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) v6: bool,
    /// Which source: the client mostly, a stranger, one of the link, none.
    pub(super) source: u8,
    pub(crate) protocol: u8,
    pub(super) ports: (u16, u16),
    pub(crate) flags: u8,
    pub(crate) place: Option<Place>,
    pub(crate) options: Vec<u8>,
    pub(crate) extensions: Vec<u8>,
    /// Wrapped into an error of this type, as sent by the service.
    pub(super) error: Option<u8>,
    pub(super) payload: Vec<u8>,
    /// Bytes that are changed: where behind the link header, and by what.
    pub(crate) damage: Vec<(u16, u8)>,
    /// How much of it arrives, in percent.
    pub(crate) arrives: u8,
}

pub(crate) fn made() -> impl Strategy<Value = Made> {
    let port = prop_oneof![Just(OF_A), Just(OF_B), Just(LEARNED), Just(0), any::<u16>()];
    let place = prop_oneof![
        6 => Just(None),
        1 => (0..3_u32, any::<bool>()).prop_map(|(id, more)| Some(Place { offset: 0, more, id })),
        2 => (0..3_u32, 1..9_u16, any::<bool>()).prop_map(|(id, offset, more)| Some(Place { offset, more, id })),
    ];
    let options = prop_oneof![
        6 => Just(Vec::new()),
        1 => prop::collection::vec(prop_oneof![Just(1_u8), Just(131), Just(137), Just(7), 0..9_u8], 4..=4),
        1 => prop::collection::vec(any::<u8>(), 40..=40),
    ];
    let extensions = prop::collection::vec(prop_oneof![Just(0_u8), Just(43), Just(51), Just(60)], 0..8);
    let damage =
        prop_oneof![4 => Just(Vec::new()), 1 => prop::collection::vec((0..90_u16, any::<u8>()), 1..4)];
    let arrives = prop_oneof![4 => Just(100_u8), 1 => 0..100_u8];
    let number = prop_oneof![
        4 => Just(frame::TCP), 2 => Just(frame::UDP), 2 => Just(frame::ICMP), 2 => Just(frame::ICMPV6), 1 => any::<u8>(),
    ];
    let head = (any::<bool>(), 0..12_u8, number, (port, prop_oneof![4 => Just(PORT), 1 => any::<u16>()]));
    let error = prop::option::weighted(0.2, prop_oneof![Just(3_u8), Just(11), Just(1), Just(2)]);
    let rest = (any::<u8>(), place, options, extensions, error);
    (head, rest, prop::collection::vec(any::<u8>(), 0..40), damage, arrives).prop_map(
        |(
            (v6, source, protocol, ports),
            (flags, place, options, extensions, error),
            payload,
            damage,
            arrives,
        )| Made {
            v6,
            source,
            protocol,
            ports,
            flags,
            place,
            options,
            extensions,
            error,
            payload,
            damage,
            arrives,
        },
    )
}

/// Protocols whose header begins with ports, as that of UDP does, but which have no sum from here.
const WITH_PORTS: [u8; 3] = [frame::SCTP, frame::DCCP, frame::UDP_LITE];

/// The packet itself; `ports` are those of source and destination.
pub(super) fn body(made: &Made, family: Family, from: IpAddr, to: IpAddr, ports: (u16, u16)) -> Ip {
    let v4 = family.client.is_ipv4();
    let plain = match made.protocol {
        frame::TCP => frame::tcp((from, ports.0), (to, ports.1), made.flags, &made.payload),
        frame::UDP => frame::udp((from, ports.0), (to, ports.1), &made.payload),
        frame::ICMP | frame::ICMPV6 => {
            let [high, low] = made.ports.0.to_be_bytes();
            let kind = match made.flags {
                0..100 => {
                    if v4 {
                        8
                    } else {
                        128
                    }
                }
                kind => kind,
            };
            icmp(from, to, kind, [high, low, 0, 1], &made.payload)
        }
        number if WITH_PORTS.contains(&number) => {
            let ports = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
            Ip::new(from, to, number, [&ports[..], &made.payload].concat())
        }
        number => Ip::new(from, to, number, made.payload.clone()),
    };
    let options = if v4 { made.options.clone() } else { Vec::new() };
    let extensions = if v4 { Vec::new() } else { made.extensions.clone() };
    Ip { place: made.place, options, extensions, ..plain }
}

/// The bytes that come in.
pub(crate) fn bytes(made: &Made, family: Family, mac: [u8; 6]) -> Vec<u8> {
    let of_link: IpAddr = if made.v6 { [0xfe80, 0, 0, 0, 0, 0, 0, 9].into() } else { [127, 0, 0, 1].into() };
    let source = match made.source {
        0 => family.stranger,
        1 => of_link,
        _ => family.client,
    };
    let packet = match made.error {
        None => body(made, family, source, family.service, made.ports),
        Some(kind) => {
            let ports = (made.ports.1, made.ports.0);
            let inner = body(made, family, family.service, family.client, ports).bytes();
            icmp(family.stranger, family.service, kind, [0; 4], &inner)
        }
    };
    arrived(made, packet.frame(mac))
}

/// What arrives of a frame, and how.
pub(super) fn arrived(made: &Made, mut frame: Vec<u8>) -> Vec<u8> {
    for (at, change) in &made.damage {
        if let Some(byte) = frame.get_mut(ETHERNET + usize::from(*at)) {
            *byte ^= change;
        }
    }
    frame.truncate(ETHERNET + 1 + (frame.len() - ETHERNET - 1) * usize::from(made.arrives) / 100);
    frame
}
