//! Keys and values of the BPF maps: a wire format between the programs and user space.
//!
//! Fixed-width integers, explicit padding, no `bool`, no enum: every bit pattern is valid on both sides. Ports and
//! addresses are in network byte order, everything else in host byte order.

/// An IPv6 address, or an IPv4 address in its mapped form (`::ffff:a.b.c.d`, RFC 4291 2.5.5.2).
pub type Address = [u8; 16];

/// The mapped form of an IPv4 address.
#[inline(always)]
pub const fn mapped(v4: [u8; 4]) -> Address {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3]]
}

/// The IPv4 address of a mapped address.
#[inline(always)]
pub const fn unmapped(address: &Address) -> [u8; 4] {
    [address[12], address[13], address[14], address[15]]
}

/// Value of the slot table: where a partition is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotEntry {
    /// Index of the host-side link of the partition's veth pair; 0 if the slot is empty.
    pub ifindex: u32,
    /// Id of the partition's network namespace as seen from the uplink's; negative if the slot is empty.
    pub nsid: i32,
    /// The partition's own IPv4 address in mapped form, or zeroes.
    pub own4: Address,
    /// The partition's own IPv6 address, or zeroes.
    pub own6: Address,
}

/// Value of the table of uplinks: what XDP has to know of one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UplinkEntry {
    /// Its link address: a frame to another one is not for this host.
    pub mac: [u8; 6],
    /// Padding, 0.
    pub pad: [u8; 2],
}

/// Value of the settings table: what does not change during a switch.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// After this many nanoseconds without an answer a learned flow is forgotten.
    pub learned_idle_ns: u64,
    /// The mark of the agent's own probes of slot A, an even number; slot B's is one more. Probes go to the veth they
    /// were sent on, whoever serves. 0: no such mark.
    pub probe_mark: u32,
    /// The link address of both partitions.
    pub inner_mac: [u8; 6],
    /// Padding, 0.
    pub pad: [u8; 6],
}

/// Key of the learned flows: one that has no socket of its own, seen from the service.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowKey {
    /// Address of the client.
    pub remote: Address,
    /// Port of the client, or the identifier of an echo request; network byte order.
    pub remote_port: u16,
    /// Port of the service; network byte order.
    pub local_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Padding, 0.
    pub pad: [u8; 3],
}

/// Value of the learned flows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowRecord {
    /// When the partition last answered, in nanoseconds of `CLOCK_BOOTTIME`.
    pub seen_ns: u64,
    /// The service address that the client asked.
    pub local: Address,
    /// The slot that answered.
    pub slot: u32,
    /// Padding, 0.
    pub pad: u32,
}

/// Key of the fragments under way: what RFC 791 and RFC 8200 reassemble by.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Identification; network byte order, IPv4's in the lower half.
    pub id: u32,
    /// IP protocol number of the fragmented packet; 0 for IPv6, where fragments of one datagram may differ in it.
    pub protocol: u8,
    /// Padding, 0.
    pub pad: [u8; 3],
}

/// For as long the rest of a datagram may take, in nanoseconds: the kernel keeps fragments for 30 seconds
/// (`ipfrag_time`), and identifications are used again.
pub const FRAGMENT_NS: u64 = 30_000_000_000;

impl FragmentKey {
    /// The key of a fragment; `id` as [`FragmentKey::id`].
    #[inline(always)]
    pub const fn new(source: &Address, destination: &Address, id: u32, protocol: u8, v6: bool) -> Self {
        let protocol = if v6 { 0 } else { protocol };
        Self { source: *source, destination: *destination, id, protocol, pad: [0; 3] }
    }
}

/// Value of the fragments under way: what was done with the first one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentRecord {
    /// The slot that got it (inbound), or sent it (outbound).
    pub slot: u32,
    /// 1 if its source address was rewritten (outbound).
    pub rewritten: u32,
    /// When it came, in nanoseconds of `CLOCK_BOOTTIME`.
    pub seen_ns: u64,
    /// The service address that became its source, or zeroes.
    pub local: Address,
}

const _: () = {
    assert!(size_of::<SlotEntry>() == 40);
    assert!(size_of::<UplinkEntry>() == 8);
    assert!(size_of::<Settings>() == 24);
    assert!(size_of::<FlowKey>() == 24);
    assert!(size_of::<FlowRecord>() == 32);
    assert!(size_of::<FragmentKey>() == 40);
    assert!(size_of::<FragmentRecord>() == 32);
};

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya reads and writes these as plain bytes")]
mod pod {
    use super::*;

    // SAFETY: `#[repr(C)]`, no implicit padding (sizes proved above), every bit pattern valid.
    unsafe impl aya::Pod for SlotEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for UplinkEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Settings {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowRecord {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FragmentKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FragmentRecord {}
}
