//! The programs as they are built: which helpers of the kernel they call.

use std::collections::BTreeSet;

use aya_obj::Object;
use aya_obj::generated::bpf_func_id::*;
use aya_obj::generated::bpf_insn;
use patchswitch::dataplane;

/// `BPF_JMP | BPF_CALL`.
const CALL: u8 = 0x85;

/// `BPF_STX | BPF_MEM | BPF_DW`.
const STORE: u8 = 0x7b;
/// Where `tstamp` is in `struct __sk_buff` (`linux/bpf.h`).
const TSTAMP: i16 = 152;

/// All instructions of all programs.
fn instructions() -> Vec<bpf_insn> {
    let bytes = dataplane::object().unwrap();
    let object = Object::parse(&bytes).unwrap();
    object.functions.values().flat_map(|function| function.instructions.clone()).collect()
}

/// The numbers of all helpers that are called, by `bpf_func_id`.
fn helpers() -> BTreeSet<u32> {
    let instructions = instructions().into_iter();
    // A source register of 0 says that it is a helper, and no function of the object or of the kernel.
    instructions
        .filter(|one| one.code == CALL && one.src_reg() == 0)
        .map(|one| one.imm.cast_unsigned())
        .collect()
}

/// So a buffer without room before its packet is as good as any other, and nobody's offsets change.
#[test]
fn no_program_makes_a_packet_longer_or_shorter() {
    let called = helpers();
    for helper in [BPF_FUNC_redirect_peer, BPF_FUNC_skc_lookup_tcp, BPF_FUNC_sk_release] {
        assert!(called.contains(&(helper as u32)), "{helper:?} is not in {called:?}");
    }
    for helper in [
        BPF_FUNC_skb_vlan_push,
        BPF_FUNC_skb_vlan_pop,
        BPF_FUNC_skb_change_proto,
        BPF_FUNC_skb_change_tail,
        BPF_FUNC_skb_change_head,
        BPF_FUNC_skb_adjust_room,
        BPF_FUNC_xdp_adjust_head,
        BPF_FUNC_xdp_adjust_meta,
        BPF_FUNC_xdp_adjust_tail,
    ] {
        assert!(!called.contains(&(helper as u32)), "{helper:?} is called");
    }
}

/// When a packet leaves is what its sender wanted, or what the queue of the link does.
#[test]
fn no_program_says_when_a_packet_leaves() {
    assert!(!helpers().contains(&(BPF_FUNC_skb_set_tstamp as u32)));
    // Register 10 is the stack.
    let all = instructions();
    let mut stores = all.iter().filter(|one| one.code == STORE && one.off == TSTAMP && one.dst_reg() != 10);
    assert_eq!(stores.next().map(|one| one.dst_reg()), None);
}
