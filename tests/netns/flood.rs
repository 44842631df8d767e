//! Frames by the million, with no queue on the way in which one could be lost beside the programs.
//!
//! ```text
//!  TC:   one frame, again and again ─► a program that passes everything ─► up from the uplink, as its driver brings them
//!  XDP:  one frame, again and again ─► a program that redirects ─► the client's link ─► the uplink's driver
//! ```
//!
//! The kernel runs the program of XDP for each frame and does with it what it says (`BPF_F_TEST_XDP_LIVE_FRAMES`). The
//! program is ours once more, with maps of its own, since no other object is at hand.

use std::net::IpAddr;

use anyhow::{Context as _, ensure};
use aya::programs::{TestRun as _, TestRunAttrs, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader, Pod};
use patchswitch::dataplane::{self, to_wire};
use patchswitch_common::Slot;
use patchswitch_common::maps::{Address, Quick, Settings, SlotEntry, UplinkEntry};
use patchswitch_common::word::Word;
use patchswitch_tests::frame;
use patchswitch_tests::netlab::{CLIENT, CLIENT_LINK, Ns, SwitchLab, UPLINK};
use patchswitch_tests::programs;
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};
use serde_json::Value;

use crate::rig::service;

/// Where the datagrams go.
const PORT: u16 = 7011;
/// So many frames the kernel takes at once.
const BATCH: u32 = 64;

/// Who sends.
pub(crate) struct Flood {
    program: Ebpf,
    from: Ns,
    index: u32,
    /// A frame of each family.
    frames: Vec<Vec<u8>>,
}

impl Flood {
    /// Frames that come up from the uplink; or those that come to it over the client's link, if it has XDP.
    pub(crate) fn new(lab: &SwitchLab, over_the_link: bool) -> anyhow::Result<Self> {
        let (uplink, mac) = link(&lab.host, UPLINK)?;
        let mut program = EbpfLoader::new().load(&dataplane::object()?)?;
        let xdp: &mut Xdp = program.program_mut("ps_xdp").context("no such program")?.try_into()?;
        xdp.load()?;
        let (from, index, addressed) = if over_the_link {
            // The kernel uses a page again as it came back: addressed to the partition by the program on the uplink.
            let (index, inside) = (link(&lab.client, CLIENT_LINK)?.0, link(&lab.a, "eth0")?.1);
            lead_out(&mut program, index, [inside, mac])?;
            (lab.client.clone(), index, inside)
        } else {
            (lab.host.clone(), uplink, mac)
        };
        let mut frames = Vec::new();
        for (client, to) in CLIENT.iter().zip(service()) {
            let client: IpAddr = client.parse()?;
            frames.push(frame::udp((client, 4000), (to, PORT), &[0; 22]).frame(addressed));
        }
        Ok(Self { program, from, index, frames })
    }

    /// Sends so many frames of each family.
    pub(crate) fn send(&self, times: u32) -> anyhow::Result<()> {
        let program: &Xdp = self.program.program("ps_xdp").context("no such program")?.try_into()?;
        for frame in &self.frames {
            let mut context = [0; 24];
            context[4..8].copy_from_slice(&u32::try_from(frame.len())?.to_ne_bytes());
            context[12..16].copy_from_slice(&self.index.to_ne_bytes());
            let mut options = TestRunOptions::new();
            options.data_in = Some(frame);
            options.ctx_in = Some(&context);
            options.repeat = times;
            options.attrs = TestRunAttrs::new().xdp_live_frames(BATCH);
            self.from.enter(|| Ok(program.test_run(options).map(drop)?))?;
        }
        Ok(())
    }
}

/// Keeps this thread and what it starts on one processor.
///
/// A ring of a veth has room for 256 frames. Who fills it and who empties it take turns on one processor; on two, frames
/// of a sender that does not wait would be lost whatever the programs do.
pub(crate) fn on_one_processor() -> anyhow::Result<()> {
    let mut one = CpuSet::new();
    one.set(sched_getcpu());
    Ok(sched_setaffinity(None, &one)?)
}

/// Tells the program to redirect to a link what is for one link address, and to address it to another.
fn lead_out(program: &mut Ebpf, index: u32, [from, to]: [[u8; 6]; 2]) -> anyhow::Result<()> {
    let addresses = service().map(to_wire);
    set(program, "SETTINGS", Settings { inner_mac: to, ..Settings::default() })?;
    set(program, "QUICK", Quick::of(&addresses))?;
    set(program, "WORD", Word::steady(Slot::A, 1).0)?;
    set(program, "SLOTS", SlotEntry { ifindex: index, ..SlotEntry::default() })?;
    for address in addresses {
        insert::<Address, u32>(program, "ADDRESSES", address, 1)?;
    }
    insert(program, "UPLINKS", index, UplinkEntry { mac: from, pad: [0; 2] })
}

fn set<V: Pod>(program: &mut Ebpf, map: &str, value: V) -> anyhow::Result<()> {
    let map = program.map_mut(map).context("no such map")?;
    Ok(aya::maps::Array::<_, V>::try_from(map)?.set(0, value, 0)?)
}

fn insert<K: Pod, V: Pod>(program: &mut Ebpf, map: &str, key: K, value: V) -> anyhow::Result<()> {
    let map = program.map_mut(map).context("no such map")?;
    Ok(aya::maps::HashMap::<_, K, V>::try_from(map)?.insert(key, value, 0)?)
}

/// The index and the address of a link.
fn link(ns: &Ns, name: &str) -> anyhow::Result<(u32, [u8; 6])> {
    let found = pnet::datalink::interfaces;
    let found =
        ns.enter(|| Ok(found().into_iter().find(|link| link.name == name)))?.context("no such link")?;
    Ok((found.index, found.mac.context("no address")?.octets()))
}

/// Counts what comes to a namespace, before anything of it that could lose one: no socket gets it.
pub(crate) fn count_in(ns: &Ns) -> anyhow::Result<()> {
    let families = ["ipv4", "ipv6"];
    let counters = families.map(|family| format!("add counter inet flood {family}\n"));
    let rules = families.map(|family| {
        format!(
            "add rule inet flood came meta nfproto {family} udp dport {PORT} counter name {family} drop\n"
        )
    });
    let chain = "add chain inet flood came { type filter hook prerouting priority -300; }\n";
    let text = ["add table inet flood\n", &counters.concat(), chain, &rules.concat()].concat();
    ns.enter(|| programs::run_with_input(&["nft", "-f", "-"], Some(&text)).map(drop))
}

/// What [`count_in`] has counted of each family.
pub(crate) fn counted(ns: &Ns) -> anyhow::Result<[u64; 2]> {
    let text = ns.run(&["nft", "-j", "list", "counters", "table", "inet", "flood"])?;
    let listed: Value = serde_json::from_str(&text)?;
    let of = |family: &str| {
        let counters = listed["nftables"].as_array().into_iter().flatten().map(|one| &one["counter"]);
        let mut counters = counters.filter(|counter| counter["name"] == family);
        counters.find_map(|counter| counter["packets"].as_u64())
    };
    let found = [of("ipv4"), of("ipv6")];
    ensure!(found.iter().all(Option::is_some), "{text}");
    Ok(found.map(Option::unwrap_or_default))
}
