//! What the host and other partitions send to a partition, at the egress of its link.

use patchswitch::dataplane::probe_mark;
use patchswitch_common::Slot;
use patchswitch_common::verdict::Hook;
use patchswitch_common::word::Word;

use crate::bench::{Bench, DROP, NEXT, PORT, REDIRECT, families};
use crate::frame::{ethernet, tcp};
use crate::steer::{DRAINING, SYN, listener};

#[test]
fn the_owner_decides_and_not_the_route() {
    let mut bench = Bench::new("tohost").unwrap();
    let [a, b] = bench.links;
    for family in families() {
        let _listening = listener(&bench.lab.a, family).unwrap();
        let frame = tcp((family.host, 1000), (family.service, PORT), SYN, b"").frame(a.mac);
        let own = tcp((family.host, 1000), (family.own_a, PORT), SYN, b"").frame(a.mac);
        let steady = Word::steady(Slot::A, 1);
        for (what, word, on, mark, action, verdict) in [
            ("its owner's link", steady, a, 0, NEXT, "to_a"),
            ("the other one's link", steady, b, 0, REDIRECT, "to_a"),
            ("after the switch", DRAINING, a, 0, REDIRECT, "to_b"),
            ("after the switch, its link", DRAINING, b, 0, NEXT, "to_b"),
            ("a probe of the standby", steady, b, probe_mark(Slot::B), NEXT, "probe"),
            ("a probe of the active one", steady, a, probe_mark(Slot::A), NEXT, "probe"),
            ("a probe of the retiring one", DRAINING, a, probe_mark(Slot::A), NEXT, "probe"),
            ("a mark of somebody else's", steady, b, 0x77, REDIRECT, "to_a"),
        ] {
            bench.word(word).unwrap();
            let seen = bench.run(Hook::ToPartition, on, mark, &frame).unwrap();
            assert_eq!((seen.action, seen.counted.as_slice()), (action, &[verdict][..]), "{what}");
            assert_eq!((seen.frame, seen.mark), (frame.clone(), mark), "{what}");
        }
        for (what, word, on, action, verdict) in [
            ("to who serves", steady, a, NEXT, "not_ours"),
            ("to a standby", steady, b, DROP, "quarantined"),
            ("to the retiring one", DRAINING, a, NEXT, "not_ours"),
        ] {
            bench.word(word).unwrap();
            let seen = bench.run(Hook::ToPartition, on, 0, &own).unwrap();
            assert_eq!(
                (seen.action, seen.counted.as_slice()),
                (action, &[verdict][..]),
                "own address, {what}"
            );
        }
    }
    let arp = ethernet(b.mac, 0x0806, &[0; 46]);
    let seen = bench.run(Hook::ToPartition, b, 0, &arp).unwrap();
    assert_eq!((seen.action, seen.counted.as_slice()), (NEXT, &["not_ours"][..]), "no IP");
    let _listening = listener(&bench.lab.a, families()[0]).unwrap();
    bench.empty(Slot::B).unwrap();
    bench.word(DRAINING).unwrap();
    let [family, _] = families();
    let frame = tcp((family.host, 1000), (family.service, PORT), SYN, b"").frame(a.mac);
    let seen = bench.run(Hook::ToPartition, a, 0, &frame).unwrap();
    assert_eq!((seen.action, seen.counted.as_slice()), (NEXT, &["unsteered"][..]));
    bench.finish().unwrap();
}
