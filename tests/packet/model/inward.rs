//! What the host and other partitions send to a partition, at the egress of one of the two links.

use std::net::IpAddr;

use patchswitch::dataplane::PROBE_MARK;
use patchswitch_common::Slot;
use patchswitch_common::verdict::{AGAIN_MARK, Verdict};
use patchswitch_common::word::{Phase, Word};

use super::Expected;
use super::known::{Known, choose, to};
use super::sent::ENDS;
use crate::bench::{DROP, Family, NEXT, REDIRECT};

/// What is to be seen of a frame that goes out of a link; of nobody's link there is no slot.
pub(super) fn expect(
    word: Word,
    on: Option<Slot>,
    mark: u32,
    frame: &[u8],
    known: &mut [Known; 2],
) -> Expected {
    if mark == AGAIN_MARK {
        return Expected::plain(Verdict::Again, NEXT, 0, frame);
    }
    if mark == PROBE_MARK || mark == PROBE_MARK + 1 {
        return Expected::plain(Verdict::Probe, NEXT, mark, frame);
    }
    let v6 = match frame[12..14] {
        [0x08, 0x00] => false,
        [0x86, 0xdd] => true,
        _ => return Expected::plain(Verdict::NotOurs, NEXT, mark, frame),
    };
    let is_standby = word.phase() == Phase::Steady && on == Some(word.active().other());
    let chosen = match choose(word, frame, v6, &mut known[usize::from(v6)]) {
        Err(Verdict::NotOurs) if is_standby => {
            return Expected::plain(Verdict::Quarantined, DROP, mark, frame);
        }
        Err(verdict) => return Expected::turned_away(verdict, mark, frame),
        Ok(chosen) => chosen,
    };
    let verdict = to(&chosen);
    let expected = if on == Some(chosen.slot) {
        Expected::plain(verdict, NEXT, mark, frame)
    } else {
        // The other link's program must not copy it once more.
        Expected::plain(verdict, REDIRECT, if chosen.both { AGAIN_MARK } else { mark }, frame)
    };
    expected.with(chosen.counted, chosen.compared)
}

/// Sources and destinations, as often as they matter.
pub(super) fn ends(family: Family) -> [[IpAddr; ENDS]; 2] {
    let Family { client, service, own_a, own_b, host, stranger } = family;
    let v4 = client.is_ipv4();
    let [loopback, group] = if v4 { ["127.0.0.1", "224.0.0.1"] } else { ["::1", "ff02::1"] }
        .map(|text| text.parse().unwrap_or(host));
    let mut ends = [[client; ENDS], [service; ENDS]];
    ends[0][..7].copy_from_slice(&[host, host, host, own_a, own_b, stranger, loopback]);
    ends[1][..6].copy_from_slice(&[own_a, own_b, host, client, loopback, group]);
    ends
}
