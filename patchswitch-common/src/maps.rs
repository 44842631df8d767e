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
    /// Index of a link in whose queue packets for this partition wait, because it is not ready yet; 0: they do not. Unlike
    /// the rest it may change while the word points at the entry: it is read once per packet.
    pub hold: u32,
    /// Padding, 0.
    pub pad: u32,
    /// From then on nothing waits, whatever `hold` says: nanoseconds of the boot clock.
    pub hold_until_ns: u64,
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
    /// UDP port whose datagrams are QUIC with connection ids of a known form, network byte order; 0: none.
    pub quic_port: u16,
    /// Where in a connection id the part begins that tells who made it.
    pub cid_offset: u8,
    /// How many bytes that part has, at most [`CID`].
    pub cid_len: u8,
    /// Padding, 0.
    pub pad: [u8; 2],
    /// Which bits of that part count; behind it, none.
    pub cid_mask: [u8; CID],
    /// UDP ports of which each datagram stands for itself, network byte order; 0: none.
    pub stateless: [u16; STATELESS],
}

/// The longest part of a connection id that is looked at, in bytes.
pub const CID: usize = 16;
/// How many ports may be stateless.
pub const STATELESS: usize = 8;

/// The protocol number of a learned flow that is not one but a part of a connection id; IANA keeps it for itself.
pub const OF_CID: u8 = 255;

/// How many service addresses of each family are compared with a packet's before the table of all is asked.
pub const QUICK: usize = 4;

/// Value of the quick table: the first service addresses, with which a packet is compared at once. To ask the table of
/// all of them takes twice as long as everything else that nearly all packets need.
///
/// Addresses as numbers that are read from memory as they lie there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quick {
    /// IPv6, in halves; where there are fewer, the first one again.
    pub v6: [[u64; 2]; QUICK],
    /// IPv4; where there are fewer, the first one again.
    pub v4: [u32; QUICK],
    /// 0 if the service has no IPv6 address.
    pub has_v6: u32,
    /// 0 if the service has no IPv4 address.
    pub has_v4: u32,
    /// 0 if there are more addresses than these.
    pub all: u32,
    /// Padding, 0.
    pub pad: u32,
}

impl Quick {
    /// The table of these addresses; IPv4 ones in mapped form.
    pub fn of(addresses: &[Address]) -> Self {
        let mut quick = Self { all: 1, ..Self::default() };
        let (mut v4, mut v6) = (0, 0);
        for address in addresses {
            if is_mapped(address) {
                quick.all &= enter(&mut quick.v4, v4, u32::from_ne_bytes(unmapped(address)));
                v4 += 1;
            } else {
                let halves = u128::from_be_bytes(*address);
                let [high, low] = [(halves >> 64) as u64, halves as u64];
                quick.all &= enter(&mut quick.v6, v6, [high.to_be(), low.to_be()]);
                v6 += 1;
            }
        }
        quick.has_v4 = u32::from(v4 > 0);
        quick.has_v6 = u32::from(v6 > 0);
        quick
    }
}

/// Puts an entry at its place, the first one everywhere; 0 if there is no place.
fn enter<T: Copy>(table: &mut [T; QUICK], at: usize, value: T) -> u32 {
    if at == 0 {
        *table = [value; QUICK];
    }
    let Some(place) = table.get_mut(at) else { return 0 };
    *place = value;
    1
}

/// Whether an address is an IPv4 address in its mapped form.
#[inline(always)]
pub const fn is_mapped(address: &Address) -> bool {
    matches!(address, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, ..])
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
    assert!(size_of::<SlotEntry>() == 56);
    assert!(size_of::<UplinkEntry>() == 8);
    assert!(size_of::<Settings>() == 56);
    assert!(size_of::<Quick>() == 96);
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
    unsafe impl aya::Pod for Quick {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowRecord {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FragmentKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FragmentRecord {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const V6: Address = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

    fn v4(last: u8) -> Address {
        mapped([192, 0, 2, last])
    }

    #[test]
    fn the_quick_table_has_the_first_addresses_and_says_whether_there_are_others() {
        let none = Quick::of(&[]);
        assert_eq!((none.has_v4, none.has_v6, none.all), (0, 0, 1));
        let lasts = |quick: &Quick| quick.v4.map(|address| address.to_ne_bytes()[3]);
        let one = Quick::of(&[v4(1)]);
        assert_eq!((one.v4[0].to_ne_bytes(), lasts(&one)), ([192, 0, 2, 1], [1; QUICK]));
        assert_eq!((one.has_v4, one.has_v6, one.all), (1, 0, 1));
        let three = Quick::of(&[v4(1), V6, v4(2)]);
        assert_eq!((lasts(&three), three.all), ([1, 2, 1, 1], 1));
        let halves = three.v6.map(|[high, low]| (high.to_ne_bytes(), low.to_ne_bytes()));
        assert_eq!(halves, [([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]); QUICK]);
        let many: std::vec::Vec<_> = (1..=5).map(v4).collect();
        let five = Quick::of(&many);
        assert_eq!((lasts(&five), five.all), ([1, 2, 3, 4], 0));
        assert_eq!(Quick::of(&many[..4]).all, 1);
    }
}
