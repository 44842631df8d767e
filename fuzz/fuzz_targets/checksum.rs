//! The program itself, in the kernel: whatever a reply is, rewritten it has another source and sums that are as right as
//! they were, and nothing else of it has changed. Needs root; nothing is attached and no packet leaves.

#![no_main]

use std::cell::RefCell;

use aya::maps::{Array, HashMap};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader, Pod};
use libfuzzer_sys::fuzz_target;
use patchswitch_common::Slot;
use patchswitch_common::maps::{
    Address, FlowKey, FlowRecord, FragmentKey, FragmentRecord, Settings, SlotEntry, mapped,
};
use patchswitch_common::parse::{Kind, Network, Packet};
use patchswitch_common::refuse::outbound;
use patchswitch_common::word::Word;
use patchswitch_fuzz::any_frame::{is_v6, network, packet};
use patchswitch_fuzz::sums::with_source;

static OBJECT: &[u8] = aya::include_bytes_aligned!("../../patchswitch/bpf/patchswitch.bpf.o");
const PROGRAM: &str = "ps_from_part";
/// The link address of both partitions.
const INNER: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// The loopback is a link that is there; the other one is asked for nothing.
const LINKS: [u32; 2] = [1, u32::MAX];
/// What fits into the page of a test run.
const LONGEST: usize = 1514;
/// Where `struct __sk_buff` has the link.
const IFINDEX: usize = 40;

/// Addresses of both families that differ in their last byte.
fn addresses(last: u8) -> [Address; 2] {
    let v6 = 0xfd77_u128 << 112 | u128::from(last);
    [mapped([10, 77, 0, last]), v6.to_be_bytes()]
}

fn service(v6: bool) -> Address {
    addresses(10)[usize::from(v6)]
}

fn own(slot: Slot, v6: bool) -> Address {
    addresses(11 + slot as u8)[usize::from(v6)]
}

struct Bench(Ebpf);

impl Bench {
    fn new() -> Self {
        let mut bench = Self(EbpfLoader::new().load(OBJECT).expect("the object is loaded"));
        let program: &mut SchedClassifier = bench.0.program_mut(PROGRAM).unwrap().try_into().unwrap();
        program.load().expect("the program is loaded: it needs root");
        bench.set("SETTINGS", 0, Settings { inner_mac: INNER, ..Settings::default() });
        for slot in [Slot::A, Slot::B] {
            let [own4, own6] = [own(slot, false), own(slot, true)];
            let entry =
                SlotEntry { ifindex: LINKS[slot as usize], nsid: -1, own4, own6, ..SlotEntry::default() };
            bench.set("SLOTS", slot.index(), entry);
        }
        for address in [service(false), service(true)] {
            bench.enter::<Address, u32>("ADDRESSES", address, 1);
        }
        bench.set("WORD", 0, Word::steady(Slot::A, 1).taken_over_by(Slot::B).with_notice(true).0);
        bench
    }

    fn set<V: Pod>(&mut self, map: &str, at: u32, value: V) {
        Array::try_from(self.0.map_mut(map).unwrap()).unwrap().set(at, value, 0).unwrap();
    }

    fn enter<K: Pod, V: Pod>(&mut self, map: &str, key: K, value: V) {
        HashMap::try_from(self.0.map_mut(map).unwrap()).unwrap().insert(key, value, 0).unwrap();
    }

    /// Makes the flow of a reply known, or the first fragment of its datagram one that was rewritten.
    fn remember(&mut self, network: &Network, packet: &Packet) {
        let (seen_ns, local) = (boot_ns(), service(network.v6));
        if packet.kind == Kind::LaterFragment {
            let Network { source, destination, fragment_id, protocol, v6, .. } = network;
            let key = FragmentKey::new(source, destination, *fragment_id, *protocol, *v6);
            self.enter("FRAGMENTS", key, FragmentRecord { slot: 0, rewritten: 1, seen_ns, local });
        } else {
            self.enter("LEARNED", key(packet), FlowRecord { seen_ns, local, slot: 0, pad: 0 });
        }
    }

    fn forget(&mut self, packet: &Packet) {
        let mut learned: HashMap<_, FlowKey, FlowRecord> =
            self.0.map_mut("LEARNED").unwrap().try_into().unwrap();
        // Of a fragment there is none.
        let _ = learned.remove(&key(packet));
    }

    fn run(&mut self, frame: &[u8]) -> Vec<u8> {
        let mut context = [0; 192];
        context[IFINDEX..IFINDEX + 4].copy_from_slice(&LINKS[0].to_ne_bytes());
        let mut out = vec![0; frame.len() + 64];
        let program: &mut SchedClassifier = self.0.program_mut(PROGRAM).unwrap().try_into().unwrap();
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        let result = program.test_run(options).expect("the program runs");
        out.truncate(result.data_size_out as usize);
        out
    }
}

fn key(packet: &Packet) -> FlowKey {
    let flow = packet.flow;
    FlowKey {
        remote: flow.remote,
        remote_port: flow.remote_port,
        local_port: flow.local_port,
        protocol: flow.protocol,
        pad: [0; 3],
    }
}

fn boot_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

thread_local! {
    static BENCH: RefCell<Bench> = RefCell::new(Bench::new());
}

/// The frame as the retiring partition sends it from its own address.
fn sent(frame: &[u8], v6: bool) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[6..12].copy_from_slice(&INNER);
    let own = own(Slot::A, v6);
    if v6 {
        frame[22..38].copy_from_slice(&own);
    } else {
        frame[26..30].copy_from_slice(&own[12..]);
    }
    frame
}

fuzz_target!(|frame: &[u8]| {
    let Some(v6) = is_v6(frame) else { return };
    // Shorter ones the kernel takes for no test.
    if frame.len() < if v6 { 54 } else { 34 } || frame.len() > LONGEST {
        return;
    }
    let frame = sent(frame, v6);
    let Ok(network) = network(&frame[..], v6) else { return };
    let is_service = |address: &Address| [service(false), service(true)].contains(address);
    let passes =
        outbound(&frame[..], &network, is_service).is_none() && network.destination != own(Slot::B, v6);
    let read = packet(&frame[..], &network, true);
    let out = BENCH.with_borrow_mut(|bench| {
        if let Ok(packet) = &read {
            bench.remember(&network, packet);
        }
        let out = bench.run(&frame);
        if let Ok(packet) = &read {
            bench.forget(packet);
        }
        out
    });
    let wanted =
        if passes && read.is_ok() { with_source(&frame, &network, &service(v6)) } else { frame.clone() };
    assert_eq!(out, wanted, "{network:?}\n{frame:02x?}");
});
