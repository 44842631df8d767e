//! Every map: its key, its value, who writes it and who reads it. All are pinned by user space.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::helpers::generated::bpf_ktime_get_boot_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray};
use patchswitch_common::Slot;
use patchswitch_common::maps::{
    Address, CID, FRAGMENT_NS, FlowKey, FlowRecord, FragmentKey, FragmentRecord, Quick, STATELESS, Settings,
    SlotEntry,
};
use patchswitch_common::verdict::COUNTERS as COUNTER_COUNT;
use patchswitch_common::word::Word;

const BPF_F_MMAPABLE: u32 = 1 << 10;

/// The phase word. Written by user space with one 8-byte store; read once per packet.
#[map]
static WORD: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Where the two partitions are. Written by user space, never while the word points at the entry.
#[map]
static SLOTS: Array<SlotEntry> = Array::with_max_entries(2, 0);

/// What does not change during a switch. Written by user space once.
#[map]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

/// The service addresses of both families; the value has no meaning. Written by user space once.
#[map]
static ADDRESSES: HashMap<Address, u32> = HashMap::with_max_entries(64, BPF_F_NO_PREALLOC);

/// The first of them. Written by user space once.
#[map]
static QUICK: Array<Quick> = Array::with_max_entries(1, 0);

/// Links on which clients are; the value has no meaning. Written by user space.
#[map]
static UPLINKS: HashMap<u32, u32> = HashMap::with_max_entries(64, BPF_F_NO_PREALLOC);

/// Flows without a socket of their own that a partition answered. Written by `from_partition` while the word says so,
/// emptied by user space. Not LRU: that evicts live entries far below its capacity. Preallocated: an allocation may
/// fail under memory pressure, when it must not.
#[map]
static LEARNED: HashMap<FlowKey, FlowRecord> = HashMap::with_max_entries(65_536, 0);

/// What was done with the first fragment of a datagram. LRU: an entry is of use for milliseconds, and nobody else
/// would remove it.
#[map]
static FRAGMENTS: LruHashMap<FragmentKey, FragmentRecord> = LruHashMap::with_max_entries(16_384, 0);

/// How often each exit was taken: see `patchswitch_common::verdict`. Written by the programs.
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTER_COUNT, 0);

/// The phase word, read once per packet: phase and direction out of two reads can disagree.
#[inline(always)]
pub fn word() -> Word {
    match WORD.get_ptr(0) {
        // SAFETY: the pointer is into the map's only entry; an aligned 8-byte read is one instruction.
        Some(pointer) => Word(unsafe { core::ptr::read_volatile(pointer) }),
        None => Word::default(),
    }
}

/// Where a partition is; nothing if the slot is empty.
#[inline(always)]
pub fn slot(slot: Slot) -> Option<&'static SlotEntry> {
    SLOTS.get(slot.index()).filter(|entry| entry.ifindex != 0)
}

/// The slot whose host-side link this is.
#[inline(always)]
pub fn slot_of(ifindex: u32) -> Option<Slot> {
    let is = |s: Slot| slot(s).is_some_and(|entry| entry.ifindex == ifindex);
    if is(Slot::A) {
        Some(Slot::A)
    } else if is(Slot::B) {
        Some(Slot::B)
    } else {
        None
    }
}

/// Settings that are not written yet: nothing is declared.
static NOTHING: Settings = Settings {
    learned_idle_ns: 0,
    probe_mark: 0,
    inner_mac: [0; 6],
    quic_port: 0,
    cid_offset: 0,
    cid_len: 0,
    pad: [0; 2],
    cid_mask: [0; CID],
    stateless: [0; STATELESS],
};

#[inline(always)]
pub fn settings() -> &'static Settings {
    SETTINGS.get(0).unwrap_or(&NOTHING)
}

#[inline(always)]
pub fn is_service(address: &Address) -> bool {
    ADDRESSES.get_ptr(address).is_some()
}

/// The addresses that a packet is compared with first.
#[inline(always)]
pub fn quick() -> Option<&'static Quick> {
    QUICK.get(0)
}

#[inline(always)]
pub fn is_uplink(ifindex: u32) -> bool {
    UPLINKS.get_ptr(ifindex).is_some()
}

/// The boot clock, in nanoseconds.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// A learned flow.
#[inline(always)]
pub fn learned(key: &FlowKey) -> Option<FlowRecord> {
    // SAFETY: the memory stays valid for the length of the program (RCU), but the entry may be overwritten while it is
    // copied: its time by `learn`, all of it where the flow moves to the other side or is forgotten and its place used
    // again. Who reads it looks whether slot and address are what they must be.
    unsafe { LEARNED.get(key) }.copied()
}

/// Remembers a flow. One that is known gets a new time and no more: a new entry would take the lock of its bucket.
#[inline(always)]
pub fn learn(key: &FlowKey, record: &FlowRecord) -> bool {
    if let Some(known) = LEARNED.get_ptr_mut(key) {
        // SAFETY: into an entry of the map, which is valid for the length of the program (RCU); other processors store
        // the same field, an aligned word. If the place is another flow's by now, that one is a little fresher.
        unsafe {
            if (*known).slot == record.slot && (*known).local == record.local {
                (&raw mut (*known).seen_ns).write_volatile(record.seen_ns);
                return true;
            }
        }
    }
    LEARNED.insert(key, record, 0).is_ok()
}

/// What was done with a first fragment, if that was not too long ago.
#[inline(always)]
pub fn fragment(key: &FragmentKey) -> Option<FragmentRecord> {
    // SAFETY: as for `learned`.
    let record = unsafe { FRAGMENTS.get(key) }.copied()?;
    (now().wrapping_sub(record.seen_ns) <= FRAGMENT_NS).then_some(record)
}

#[inline(always)]
pub fn remember_fragment(key: &FragmentKey, record: &FragmentRecord) {
    // A fragment that is not remembered costs the rest of its datagram, which UDP may lose anyway.
    let _ = FRAGMENTS.insert(key, record, 0);
}

/// Counts, and says how often that was now on this processor.
#[inline(always)]
pub fn count(index: u32) -> u64 {
    let Some(pointer) = COUNTERS.get_ptr_mut(index) else { return 0 };
    // SAFETY: the entry is this processor's own, and programs on one hook do not interrupt each other.
    unsafe {
        *pointer += 1;
        *pointer
    }
}
