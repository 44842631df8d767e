//! The programs on a bench: loaded, attached to nothing, with two partitions whose sockets the kernel knows.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use aya::maps::{Array, HashMap, PerCpuArray};
use aya::programs::tc::qdisc_add_clsact;
use aya::programs::{Program, ProgramInfo, SchedClassifier, TcAttachType, TestRun as _, TestRunOptions, Xdp};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfLoader, Pod};
use patchswitch::dataplane::{self, to_wire};
use patchswitch::host::linux::netlink::Netlink;
use patchswitch::host::linux::netns::{Netns, NetnsRef};
use patchswitch_common::Slot;
use patchswitch_common::maps::{
    Address, FlowKey, FlowRecord, FragmentKey, FragmentRecord, Quick, Settings, SlotEntry, UplinkEntry,
};
use patchswitch_common::verdict::{EVENTS, HOOKS, Hook, VERDICTS, counter};
use patchswitch_common::word::Word;
use patchswitch_tests::any_frame;
use patchswitch_tests::netlab::{CLIENT, Ns, OWN_A, OWN_B, SERVICE, SwitchLab, UPLINK};

use crate::buffers::{Counts, Flows};
use crate::frame::ETHERNET;
use crate::xdp;

/// `TC_ACT_UNSPEC`: the next program, and then the kernel.
pub(crate) const NEXT: i32 = -1;
/// `TC_ACT_SHOT`.
pub(crate) const DROP: i32 = 2;
/// `TC_ACT_REDIRECT`.
pub(crate) const REDIRECT: i32 = 7;

/// The service's TCP and UDP port.
pub(crate) const PORT: u16 = 80;
/// How many flows can be learned here.
pub(crate) const LEARNED: u32 = 4;
pub(crate) const IDLE_NS: u64 = 10_000_000_000;

/// Where the fields of `struct __sk_buff` are (`linux/bpf.h`).
const MARK: usize = 8;
const IFINDEX: usize = 40;
const DATA_END: usize = 80;
const CONTEXT: usize = 192;

/// What a program did with a packet.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) action: i32,
    /// The packet afterwards.
    pub(crate) frame: Vec<u8>,
    /// Its mark afterwards.
    pub(crate) mark: u32,
    /// Counters that went up, by name: the verdict first, then events.
    pub(crate) counted: Vec<&'static str>,
    /// The same of those that compare the two sides.
    pub(crate) compared: Vec<&'static str>,
}

/// What a program did with one of many packets: the action, and the packet afterwards.
pub(crate) type Done = (i32, Vec<u8>);

/// A link of the host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) mac: [u8; 6],
}

pub(crate) struct Bench {
    pub(crate) lab: SwitchLab,
    pub(crate) uplink: Link,
    /// The host-side links of the partitions.
    pub(crate) links: [Link; 2],
    ebpf: Ebpf,
    runs: BTreeMap<&'static str, u64>,
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap_or(IpAddr::from([0; 4]))
}

/// The addresses of one family.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Family {
    pub(crate) client: IpAddr,
    pub(crate) service: IpAddr,
    pub(crate) own_a: IpAddr,
    pub(crate) own_b: IpAddr,
    pub(crate) host: IpAddr,
    pub(crate) stranger: IpAddr,
}

/// Both families.
pub(crate) fn families() -> [Family; 2] {
    let of = |n: usize| Family {
        client: address(CLIENT[n]),
        service: address(SERVICE[n]),
        own_a: address(OWN_A[n]),
        own_b: address(OWN_B[n]),
        host: address(["10.77.0.1", "fd77::1"][n]),
        stranger: address(["10.66.6.6", "fd66::6"][n]),
    };
    [of(0), of(1)]
}

impl Bench {
    /// Two partitions with the service's addresses, and the programs loaded with nobody serving but slot A.
    pub(crate) fn new(label: &str) -> anyhow::Result<Self> {
        Self::with_room(label, LEARNED)
    }

    /// The same with room for so many learned flows.
    pub(crate) fn with_room(label: &str, flows: u32) -> anyhow::Result<Self> {
        let mut bench = Self::bare(label, flows)?;
        let nsids = [nsid(&bench.lab, &bench.lab.a, 4711)?, nsid(&bench.lab, &bench.lab.b, 4712)?];
        bench.furnish(nsids)?;
        Ok(bench)
    }

    /// The same with nothing in any map.
    pub(crate) fn unfurnished(label: &str) -> anyhow::Result<Self> {
        Self::bare(label, LEARNED)
    }

    fn bare(label: &str, flows: u32) -> anyhow::Result<Self> {
        let lab = SwitchLab::new(label)?;
        for (ns, link, own) in [(&lab.a, "lca", OWN_A), (&lab.b, "lcb", OWN_B)] {
            lab.lab.veth((ns, "eth0"), (&lab.host, link))?;
            // Both ends of a connection may be in one partition here: the client's address is there as well.
            let held = [SERVICE, own, CLIENT].concat();
            let line = |address: &&str| format!("addr add {address}{} dev lo nodad\n", width(address));
            ns.ip_batch(&held.iter().map(line).collect::<String>().replace(" nodad\n", "\n"))?;
            lab.host.sysctl(&format!("net/ipv4/conf/{link}/forwarding"), "1")?;
        }
        lab.host.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        for service in SERVICE {
            lab.host.ip(&format!("route add {service}{} dev lca", width(service)))?;
        }
        let links = [link(&lab.host, "lca")?, link(&lab.host, "lcb")?];
        let uplink = link(&lab.host, UPLINK)?;
        Ok(Self { uplink, links, ebpf: load(flows)?, lab, runs: BTreeMap::new() })
    }

    fn furnish(&mut self, nsids: [i32; 2]) -> anyhow::Result<()> {
        let settings = Settings {
            learned_idle_ns: IDLE_NS,
            probe_mark: dataplane::PROBE_MARK,
            inner_mac: crate::frame::SENDER,
            ..Settings::default()
        };
        self.array("SETTINGS")?.set(0, settings, 0)?;
        for (slot, own) in [(Slot::A, OWN_A), (Slot::B, OWN_B)] {
            let entry = SlotEntry {
                ifindex: self.links[slot as usize].index,
                nsid: nsids[slot as usize],
                own4: to_wire(address(own[0])),
                own6: to_wire(address(own[1])),
                ..SlotEntry::default()
            };
            self.array("SLOTS")?.set(slot.index(), entry, 0)?;
        }
        let addresses = SERVICE.map(|service| to_wire(address(service)));
        for service in addresses {
            self.hash::<Address, u32>("ADDRESSES")?.insert(service, 1, 0)?;
        }
        self.short_way(true)?;
        let Link { index, mac } = self.uplink;
        Ok(self.hash("UPLINKS")?.insert(index, UplinkEntry { mac, pad: [0; 2] }, 0)?)
    }

    fn array<V: Pod>(&mut self, name: &str) -> anyhow::Result<Array<&mut aya::maps::MapData, V>> {
        Ok(self.ebpf.map_mut(name).context("no such map")?.try_into()?)
    }

    fn hash<K: Pod, V: Pod>(&mut self, name: &str) -> anyhow::Result<HashMap<&mut aya::maps::MapData, K, V>> {
        Ok(self.ebpf.map_mut(name).context("no such map")?.try_into()?)
    }

    /// Declares what is known of datagrams.
    pub(crate) fn declare(&mut self, change: impl Fn(Settings) -> Settings) -> anyhow::Result<()> {
        let mut settings = self.array::<Settings>("SETTINGS")?;
        let now = settings.get(&0, 0)?;
        Ok(settings.set(0, change(now), 0)?)
    }

    /// Whether packets may take the short way, which knows the first addresses; without it all take the long one.
    pub(crate) fn short_way(&mut self, is_open: bool) -> anyhow::Result<()> {
        let addresses = SERVICE.map(|service| to_wire(address(service)));
        let quick = if is_open { Quick::of(&addresses) } else { Quick::default() };
        Ok(self.array("QUICK")?.set(0, quick, 0)?)
    }

    /// Who serves, who retires.
    pub(crate) fn word(&mut self, word: Word) -> anyhow::Result<()> {
        Ok(self.array("WORD")?.set(0, word.0, 0)?)
    }

    /// Has packets for a slot wait in the queue of a link for so long.
    pub(crate) fn hold(&mut self, slot: Slot, queue: u32, limit: Duration) -> anyhow::Result<()> {
        let mut slots = self.array::<SlotEntry>("SLOTS")?;
        let entry = slots.get(&slot.index(), 0)?;
        let hold_until_ns = boot_ns() + u64::try_from(limit.as_nanos())?;
        Ok(slots.set(slot.index(), SlotEntry { hold: queue, hold_until_ns, ..entry }, 0)?)
    }

    /// Empties a slot.
    pub(crate) fn empty(&mut self, slot: Slot) -> anyhow::Result<()> {
        Ok(self.array("SLOTS")?.set(slot.index(), SlotEntry::default(), 0)?)
    }

    /// Gives a slot another id of a namespace.
    pub(crate) fn misplace(&mut self, slot: Slot, nsid: i32) -> anyhow::Result<()> {
        let mut slots = self.array::<SlotEntry>("SLOTS")?;
        let entry = slots.get(&slot.index(), 0)?;
        Ok(slots.set(slot.index(), SlotEntry { nsid, ..entry }, 0)?)
    }

    /// Remembers a flow, as if it had been answered a time ago.
    pub(crate) fn remember(
        &mut self,
        key: FlowKey,
        local: IpAddr,
        slot: Slot,
        age_ns: u64,
    ) -> anyhow::Result<()> {
        // The clock of a machine that has just started is not as far, and the programs' own difference wraps.
        let seen_ns = boot_ns().wrapping_sub(age_ns);
        let record = FlowRecord { seen_ns, local: to_wire(local), slot: slot.index(), pad: 0 };
        Ok(self.hash("LEARNED")?.insert(key, record, 0)?)
    }

    /// Makes what is remembered of fragments older.
    pub(crate) fn age_fragments(&mut self, by: Duration) -> anyhow::Result<()> {
        let by = u64::try_from(by.as_nanos())?;
        // The clock of a machine that has just started is not as far, and the programs' own difference wraps.
        let aged = self.set_fragments(|seen_ns| seen_ns.wrapping_sub(by))?;
        ensure!(aged > 0, "nothing is remembered");
        Ok(())
    }

    /// Makes what is remembered of fragments new.
    pub(crate) fn renew_fragments(&mut self) -> anyhow::Result<()> {
        let now = boot_ns();
        self.set_fragments(|_| now).map(drop)
    }

    /// Changes when all fragments were seen; how many there are.
    fn set_fragments(&mut self, to: impl Fn(u64) -> u64) -> anyhow::Result<usize> {
        let mut map = self.hash::<FragmentKey, FragmentRecord>("FRAGMENTS")?;
        let all: Vec<_> = map.iter().collect::<Result<_, _>>()?;
        for (key, record) in &all {
            map.insert(key, FragmentRecord { seen_ns: to(record.seen_ns), ..*record }, 0)?;
        }
        Ok(all.len())
    }

    /// What is remembered of a flow.
    pub(crate) fn remembered(&mut self, key: FlowKey) -> anyhow::Result<Option<FlowRecord>> {
        Ok(self.hash("LEARNED")?.get(&key, 0).ok())
    }

    /// Forgets all flows.
    pub(crate) fn forget(&mut self) -> anyhow::Result<()> {
        let mut map = self.hash::<FlowKey, FlowRecord>("LEARNED")?;
        let keys: Vec<FlowKey> = map.keys().collect::<Result<_, _>>()?;
        keys.iter().try_for_each(|key| Ok(map.remove(key)?))
    }

    /// Sends a packet through a program, as if it had come on a link. What comes on an uplink goes through XDP as well,
    /// which must do the same as far as it goes.
    pub(crate) fn run(&mut self, hook: Hook, on: Link, mark: u32, frame: &[u8]) -> anyhow::Result<Seen> {
        if hook != Hook::Uplink || frame.len() > xdp::LONGEST {
            return self.run_filter(hook, on, mark, frame);
        }
        let flows = self.flows()?;
        let before = self.run_xdp(on, frame)?;
        self.put_back(&flows)?;
        let seen = self.run_filter(hook, on, mark, frame)?;
        xdp::compare(frame, &before, &seen)?;
        Ok(seen)
    }

    /// The learned flows.
    pub(crate) fn flows(&mut self) -> anyhow::Result<Flows> {
        Ok(self.hash("LEARNED")?.iter().collect::<Result<_, _>>()?)
    }

    /// Makes the learned flows what they were: what one program learned of a packet, the other one has to learn itself.
    pub(crate) fn put_back(&mut self, flows: &[(FlowKey, FlowRecord)]) -> anyhow::Result<()> {
        let now = self.flows()?;
        let mut map = self.hash::<FlowKey, FlowRecord>("LEARNED")?;
        for (key, _) in now.iter().filter(|(key, _)| flows.iter().all(|(old, _)| old != key)) {
            map.remove(key)?;
        }
        for (key, record) in flows.iter().filter(|flow| !now.contains(flow)) {
            map.insert(key, record, 0)?;
        }
        Ok(())
    }

    /// Sends a frame through the program for XDP, as if it had come on a link.
    pub(crate) fn run_xdp(&mut self, on: Link, frame: &[u8]) -> anyhow::Result<Seen> {
        let before = self.counters()?;
        let mut out = vec![0; frame.len()];
        let context = xdp::context(on.index, frame.len())?;
        let result = {
            let program: &mut Xdp = self.ebpf.program_mut("ps_xdp").context("no such program")?.try_into()?;
            let mut options = TestRunOptions::new();
            options.data_in = Some(frame);
            options.data_out = Some(&mut out);
            options.ctx_in = Some(&context);
            self.lab.host.enter(|| Ok(program.test_run(options)?))?
        };
        out.truncate(result.data_size_out as usize);
        let (compared, counted) = self.counted_since(&before, Hook::Xdp)?;
        Ok(Seen { action: result.return_value.cast_signed(), frame: out, mark: 0, counted, compared })
    }

    /// The counters that went up with a run of a program: those that compare the two sides, and the others.
    fn counted_since(
        &mut self,
        before: &BTreeMap<&'static str, u64>,
        hook: Hook,
    ) -> anyhow::Result<(Vec<&'static str>, Vec<&'static str>)> {
        *self.runs.entry(hook.name()).or_default() += 1;
        let after = self.counters()?;
        let moved = after.iter().filter(|(name, count)| before.get(*name) != Some(count));
        let compares = |name: &&str| EVENTS.iter().any(|event| event.name() == *name && event.compares());
        Ok(moved.map(|(name, _)| *name).partition(compares))
    }

    /// Sends a packet through a program for TC.
    pub(crate) fn run_filter(
        &mut self,
        hook: Hook,
        on: Link,
        mark: u32,
        frame: &[u8],
    ) -> anyhow::Result<Seen> {
        let mut context = [0; CONTEXT];
        context[MARK..MARK + 4].copy_from_slice(&mark.to_ne_bytes());
        context[IFINDEX..IFINDEX + 4].copy_from_slice(&on.index.to_ne_bytes());
        self.run_with(hook, context, frame)
    }

    /// Sends a client's packet of which only the link header is in the buffer's own memory, the rest in pages. Nothing
    /// if this kernel makes none: it wants a context without an end of the data.
    pub(crate) fn run_in_pages(&mut self, on: Link, frame: &[u8]) -> anyhow::Result<Option<Seen>> {
        let mut context = [0; CONTEXT];
        context[IFINDEX..IFINDEX + 4].copy_from_slice(&on.index.to_ne_bytes());
        let header = u32::try_from(ETHERNET)?;
        context[DATA_END..DATA_END + 4].copy_from_slice(&header.to_ne_bytes());
        match self.run_with(Hook::Uplink, context, frame) {
            Ok(seen) => Ok(Some(seen)),
            Err(error) if is_refused(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn run_with(&mut self, hook: Hook, context: [u8; CONTEXT], frame: &[u8]) -> anyhow::Result<Seen> {
        let name = program(hook);
        any_frame::check(frame);
        keep_as_seed(frame)?;
        let before = self.counters()?;
        let (mut out, mut context_out) = (vec![0; frame.len() + 256], [0; CONTEXT]);
        let result = {
            let program: &mut SchedClassifier =
                self.ebpf.program_mut(name).context("no such program")?.try_into()?;
            let mut options = TestRunOptions::new();
            options.data_in = Some(frame);
            options.data_out = Some(&mut out);
            options.ctx_in = Some(&context);
            options.ctx_out = Some(&mut context_out);
            // Devices and namespace ids are those of the caller's namespace.
            self.lab.host.enter(|| Ok(program.test_run(options)?))?
        };
        out.truncate(result.data_size_out as usize);
        let (compared, counted) = self.counted_since(&before, hook)?;
        let mark = u32::from_ne_bytes(context_out[MARK..MARK + 4].try_into()?);
        Ok(Seen { action: result.return_value.cast_signed(), frame: out, mark, counted, compared })
    }

    /// Sends packets through a program one after the other, as if they had come on a link, without a look at the counters
    /// in between: what was done with each, or nothing where the kernel takes no such packet for a test.
    pub(crate) fn run_many(
        &mut self,
        hook: Hook,
        on: Link,
        frames: &[&[u8]],
    ) -> anyhow::Result<Vec<Option<Done>>> {
        let mut skb = [0; CONTEXT];
        skb[IFINDEX..IFINDEX + 4].copy_from_slice(&on.index.to_ne_bytes());
        let host = self.lab.host.clone();
        let program = self.ebpf.program_mut(program(hook)).context("no such program")?;
        let all = host.enter(|| {
            let one = |frame: &&[u8]| {
                let (xdp, mut out) = (xdp::context(on.index, frame.len())?, vec![0; frame.len()]);
                let mut options = TestRunOptions::new();
                options.data_in = Some(frame);
                options.data_out = Some(&mut out);
                options.ctx_in = Some(if hook == Hook::Xdp { &xdp } else { &skb });
                let ran = match &mut *program {
                    Program::Xdp(program) => program.test_run(options),
                    other => <&mut SchedClassifier>::try_from(other)?.test_run(options),
                };
                match ran.map_err(anyhow::Error::from) {
                    Ok(result) => {
                        out.truncate(result.data_size_out as usize);
                        Ok(Some((result.return_value.cast_signed(), out)))
                    }
                    Err(error) if is_refused(&error) => Ok(None),
                    Err(error) => Err(error),
                }
            };
            frames.iter().map(one).collect::<anyhow::Result<Vec<_>>>()
        })?;
        let runs = all.iter().flatten().count();
        *self.runs.entry(hook.name()).or_default() += u64::try_from(runs)?;
        Ok(all)
    }

    /// Sends a packet through a program so many times, as if it had come on a link. What a program made of it is what it
    /// gets the next time.
    pub(crate) fn repeat(&mut self, hook: Hook, on: Link, times: u32, frame: &[u8]) -> anyhow::Result<()> {
        let mut of_filter = [0; CONTEXT];
        of_filter[IFINDEX..IFINDEX + 4].copy_from_slice(&on.index.to_ne_bytes());
        let of_xdp = xdp::context(on.index, frame.len())?;
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.ctx_in = Some(if hook == Hook::Xdp { &of_xdp } else { &of_filter });
        options.repeat = times;
        let program = self.ebpf.program_mut(program(hook)).context("no such program")?;
        self.lab.host.enter(|| match program {
            Program::Xdp(program) => Ok(program.test_run(options).map(drop)?),
            other => Ok(<&mut SchedClassifier>::try_from(other)?.test_run(options).map(drop)?),
        })?;
        *self.runs.entry(hook.name()).or_default() += u64::from(times);
        Ok(())
    }

    /// Sends many packets through a program, each once, as if they had come on a link. How many had each action.
    pub(crate) fn burst(
        &mut self,
        hook: Hook,
        on: Link,
        frames: impl Iterator<Item = Vec<u8>> + Send,
    ) -> anyhow::Result<BTreeMap<i32, u64>> {
        let mut context = [0; CONTEXT];
        context[IFINDEX..IFINDEX + 4].copy_from_slice(&on.index.to_ne_bytes());
        let host = self.lab.host.clone();
        let program: &SchedClassifier = self.program(hook)?;
        let actions = host.enter(|| {
            let mut actions = BTreeMap::<i32, u64>::new();
            for frame in frames {
                let mut options = TestRunOptions::new();
                options.data_in = Some(&frame);
                options.ctx_in = Some(&context);
                let action = program.test_run(options)?.return_value.cast_signed();
                *actions.entry(action).or_default() += 1;
            }
            Ok(actions)
        })?;
        *self.runs.entry(hook.name()).or_default() += actions.values().sum::<u64>();
        Ok(actions)
    }

    /// A packet of a client. It must come out as it went in.
    pub(crate) fn client(&mut self, packet: &crate::frame::Ip) -> anyhow::Result<Seen> {
        let frame = packet.frame(self.uplink.mac);
        let seen = self.run_in_all(Hook::Uplink, self.uplink, &frame)?;
        ensure!(seen.frame == frame, "the packet was changed");
        Ok(seen)
    }

    /// A packet of a partition.
    pub(crate) fn partition(&mut self, slot: Slot, packet: &crate::frame::Ip) -> anyhow::Result<Seen> {
        let link = self.links[slot as usize];
        self.run_in_all(Hook::FromPartition, link, &packet.frame(link.mac))
    }

    /// All counters, each by processor, and how often programs were run.
    pub(crate) fn counts(&mut self) -> anyhow::Result<Counts> {
        let array: PerCpuArray<_, u64> = self.ebpf.map_mut("COUNTERS").context("no counters")?.try_into()?;
        let all = (0..array.len()).map(|index| array.get(&index, 0)).collect::<Result<_, _>>()?;
        Ok((all, self.runs.clone()))
    }

    /// Makes them what they were.
    pub(crate) fn set_counts(&mut self, (all, runs): Counts) -> anyhow::Result<()> {
        let mut array: PerCpuArray<_, u64> =
            self.ebpf.map_mut("COUNTERS").context("no counters")?.try_into()?;
        for (index, values) in all.into_iter().enumerate() {
            array.set(u32::try_from(index)?, values, 0)?;
        }
        self.runs = runs;
        Ok(())
    }

    /// Every counter that is not 0: verdicts of all hooks and events.
    pub(crate) fn counters(&mut self) -> anyhow::Result<BTreeMap<&'static str, u64>> {
        let array: PerCpuArray<_, u64> = self.ebpf.map_mut("COUNTERS").context("no counters")?.try_into()?;
        let sum = |index| Ok::<u64, anyhow::Error>(array.get(&index, 0)?.iter().sum());
        let mut found = BTreeMap::new();
        for hook in HOOKS {
            for verdict in VERDICTS {
                *found.entry(verdict.name()).or_default() += sum(counter(hook, verdict))?;
            }
        }
        for event in EVENTS {
            *found.entry(event.name()).or_default() += sum(event.counter())?;
        }
        Ok(found)
    }

    /// Proves that every packet had exactly one verdict at its hook.
    pub(crate) fn finish(mut self) -> anyhow::Result<()> {
        let runs = std::mem::take(&mut self.runs);
        let array: PerCpuArray<_, u64> = self.ebpf.map_mut("COUNTERS").context("no counters")?.try_into()?;
        for hook in HOOKS {
            let mut verdicts = 0;
            for verdict in VERDICTS {
                verdicts += array.get(&counter(hook, verdict), 0)?.iter().sum::<u64>();
            }
            let packets = runs.get(hook.name()).copied().unwrap_or(0);
            ensure!(verdicts == packets, "{} packets and {verdicts} verdicts at {hook:?}", packets);
        }
        Ok(())
    }

    /// Attaches a program to the ingress of a link of the host, for packets that only a wire brings.
    pub(crate) fn attach(&mut self, hook: Hook, link: &str) -> anyhow::Result<()> {
        let host = self.lab.host.clone();
        let program = self.program(hook)?;
        host.enter(|| {
            if KernelVersion::current()? < KernelVersion::new(6, 6, 0) {
                qdisc_add_clsact(link)?;
            }
            program.attach(link, TcAttachType::Ingress)?;
            Ok(())
        })
    }

    /// What the programs have to say from now on.
    pub(crate) fn told<T: log::Log>(&mut self, to: T) -> anyhow::Result<aya_log::EbpfLogger<T>> {
        Ok(aya_log::EbpfLogger::init_with_logger(&mut self.ebpf, to)?)
    }

    /// What the kernel says of a program.
    pub(crate) fn info(&mut self, hook: Hook) -> anyhow::Result<ProgramInfo> {
        Ok(self.ebpf.program_mut(program(hook)).context("no such program")?.info()?)
    }

    /// The descriptor of a program.
    pub(crate) fn program(&mut self, hook: Hook) -> anyhow::Result<&mut SchedClassifier> {
        Ok(self.ebpf.program_mut(program(hook)).context("no such program")?.try_into()?)
    }
}

/// Whether the kernel refused a test run as such: it does not make such a packet.
fn is_refused(error: &anyhow::Error) -> bool {
    let codes = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    codes.filter_map(std::io::Error::raw_os_error).any(|code| code == libc::EINVAL)
}

/// Where packets are kept for the fuzzers, one file each: see `fuzz/lib.rs`.
const SEEDS_VARIABLE: &str = "PATCHSWITCH_SEEDS";

fn keep_as_seed(frame: &[u8]) -> anyhow::Result<()> {
    let Some(directory) = std::env::var_os(SEEDS_VARIABLE) else { return Ok(()) };
    let mut hasher = DefaultHasher::new();
    frame.hash(&mut hasher);
    std::fs::create_dir_all(&directory)?;
    Ok(std::fs::write(Path::new(&directory).join(format!("{:016x}", hasher.finish())), frame)?)
}

fn program(hook: Hook) -> &'static str {
    match hook {
        Hook::Uplink => "ps_uplink",
        Hook::ToPartition => "ps_to_part",
        Hook::FromPartition => "ps_from_part",
        Hook::Xdp => "ps_xdp",
    }
}

fn width(address: &str) -> &'static str {
    if address.contains(':') { "/128" } else { "/32" }
}

/// A link of a namespace.
pub(crate) fn link(ns: &Ns, name: &str) -> anyhow::Result<Link> {
    let value: serde_json::Value = serde_json::from_str(&ns.ip(&format!("-j link show dev {name}"))?)?;
    let mac: Vec<u8> = value[0]["address"]
        .as_str()
        .context("no address")?
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    let index = value[0]["ifindex"].as_u64().context("no index")?;
    let mac = mac.try_into().ok().context("not a MAC")?;
    Ok(Link { index: u32::try_from(index)?, mac })
}

fn nsid(lab: &SwitchLab, ns: &Ns, wanted: i32) -> anyhow::Result<i32> {
    lab.host.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let netlink = Netlink::open(&Netns::own()?)?;
            Ok(netlink.nsid(&Netns::open(&NetnsRef::Path(ns.path()))?, wanted).await?)
        })
    })
}

fn load(flows: u32) -> anyhow::Result<Ebpf> {
    let version = KernelVersion::current()?;
    let has = |major, minor| u32::from(version >= KernelVersion::new(major, minor, 0));
    let (skip_neigh, csum_ipv6) = (has(6, 3), has(6, 16));
    let mut ebpf = EbpfLoader::new()
        .override_global("HAS_SKIP_NEIGH", &skip_neigh, true)
        .override_global("HAS_CSUM_IPV6", &csum_ipv6, true)
        .map_max_entries("LEARNED", flows)
        .load(&dataplane::object()?)?;
    for hook in HOOKS {
        match ebpf.program_mut(program(hook)).context("no such program")? {
            Program::Xdp(program) => program.load()?,
            other => <&mut SchedClassifier>::try_from(other)?.load()?,
        }
    }
    Ok(ebpf)
}

fn boot_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// The key of a flow without a connection.
pub(crate) fn key(client: (IpAddr, u16), service_port: u16, protocol: u8) -> FlowKey {
    FlowKey {
        remote: to_wire(client.0),
        remote_port: client.1.to_be(),
        local_port: service_port.to_be(),
        protocol,
        pad: [0; 3],
    }
}

/// The service's end.
pub(crate) fn service(family: Family) -> SocketAddr {
    SocketAddr::new(family.service, PORT)
}
