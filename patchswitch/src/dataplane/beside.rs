//! Who else is on the links. Nobody is put aside by ours: what is not for us goes on to whoever comes next.
//!
//! ```text
//!  wire ─► XDP ─► TCX, in the order of the list ─► filters of clsact, by priority ─► the host
//! ```
//!
//! Ours are known by the counters that they use, not by their name, which anybody can give.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use aya::maps::MapInfo;
use aya::programs::{ProgramError, ProgramInfo, SchedClassifier, TcAttachType, TcError, loaded_programs};
use serde::Serialize;

use super::attach::HookKind;
use super::load::refused;
use super::{DataplaneError, maps};
use crate::host::linux::netlink::{Direction, Filter, Link, Netlink, XdpMode};
use crate::names;

/// What a link has in one direction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OnLink {
    /// The link.
    pub link: String,
    /// `ingress` or `egress`.
    pub direction: &'static str,
    /// In the order in which packets meet them.
    pub programs: Vec<Placed>,
}

/// Something that packets meet, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Placed {
    /// `xdp-offloaded`, `xdp-native`, `xdp-generic`, `tcx` or `clsact`.
    pub hook: &'static str,
    /// Of a filter: smaller numbers come first.
    pub priority: Option<u16>,
    /// What kind of filter it is, or `bpf`.
    pub kind: String,
    /// The BPF program, unless it is something else; classic BPF has no number.
    pub program: Option<Program>,
    /// The attachment of ours that it belongs to; nothing: it is somebody else's.
    pub attachment: Option<String>,
}

/// A BPF program in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Program {
    /// Its number.
    pub id: u32,
    /// Its name there, which may be empty.
    pub name: String,
    /// What it is called after its instructions, as `bpftool prog` shows it.
    pub tag: String,
}

pub(super) async fn list(host: &Netlink, links: &[&str]) -> Result<Vec<OnLink>, DataplaneError> {
    let known = Known::read()?;
    let mut lists = Vec::new();
    for link in host.links().await? {
        if !links.contains(&link.name.as_str()) {
            continue;
        }
        let wire = host.xdp(&link).await?.into_iter();
        let mut ingress: Vec<_> = wire.filter_map(|(mode, id)| known.placed(xdp(mode), id)).collect();
        ingress.extend(known.classifiers(host, &link, Direction::Ingress).await?);
        let egress = known.classifiers(host, &link, Direction::Egress).await?;
        for (direction, programs) in [("ingress", ingress), ("egress", egress)] {
            if !programs.is_empty() {
                lists.push(OnLink { link: link.name.clone(), direction, programs });
            }
        }
    }
    Ok(lists)
}

const fn xdp(mode: XdpMode) -> &'static str {
    match mode {
        XdpMode::Offloaded => "xdp-offloaded",
        XdpMode::Native => "xdp-native",
        XdpMode::Generic => "xdp-generic",
    }
}

/// The programs in the kernel, and the counters by which ours are known.
struct Known {
    programs: BTreeMap<u32, ProgramInfo>,
    counters: BTreeMap<u32, String>,
}

impl Known {
    fn read() -> Result<Self, DataplaneError> {
        // One that went away meanwhile is not there any more.
        let programs = loaded_programs().filter_map(Result::ok).map(|info| (info.id(), info)).collect();
        let root = Path::new(names::PIN_ROOT);
        let mut counters = BTreeMap::new();
        for entry in fs::read_dir(root).into_iter().flatten().flatten() {
            if let Ok(map) = MapInfo::from_pin(maps::path(&entry.path(), maps::COUNTERS)) {
                counters.insert(map.id(), entry.file_name().to_string_lossy().into_owned());
            }
        }
        Ok(Self { programs, counters })
    }

    /// Filters and programs of one direction. Those of TCX come first.
    async fn classifiers(
        &self,
        host: &Netlink,
        link: &Link,
        direction: Direction,
    ) -> Result<Vec<Placed>, DataplaneError> {
        let mut placed: Vec<_> =
            tcx(link, direction)?.into_iter().map(|info| self.of("tcx", &info)).collect();
        placed.extend(host.filters(link, direction).await?.into_iter().map(|filter| self.filter(filter)));
        Ok(placed)
    }

    fn filter(&self, filter: Filter) -> Placed {
        let known = filter.program.and_then(|id| self.placed("clsact", id));
        let other =
            Placed { hook: "clsact", priority: None, kind: filter.kind, program: None, attachment: None };
        Placed { priority: Some(filter.priority), ..known.unwrap_or(other) }
    }

    fn placed(&self, hook: &'static str, id: u32) -> Option<Placed> {
        self.programs.get(&id).map(|info| self.of(hook, info))
    }

    fn of(&self, hook: &'static str, info: &ProgramInfo) -> Placed {
        let name = String::from_utf8_lossy(info.name()).into_owned();
        let maps = info.map_ids().ok().flatten().unwrap_or_default();
        let program = Program { id: info.id(), name, tag: format!("{:016x}", info.tag()) };
        let attachment = maps.iter().find_map(|map| self.counters.get(map).cloned());
        Placed { hook, priority: None, kind: "bpf".to_owned(), program: Some(program), attachment }
    }
}

fn tcx(link: &Link, direction: Direction) -> Result<Vec<ProgramInfo>, DataplaneError> {
    if HookKind::of_this_kernel() != HookKind::Tcx {
        return Ok(Vec::new());
    }
    let direction = match direction {
        Direction::Ingress => TcAttachType::Ingress,
        Direction::Egress => TcAttachType::Egress,
    };
    match SchedClassifier::query_tcx(&link.name, direction) {
        Ok((_, programs)) => Ok(programs),
        // It was removed meanwhile.
        Err(ProgramError::TcError(TcError::IoError(_))) => Ok(Vec::new()),
        Err(error) => Err(refused("list", &format!("of {}", link.name), &error)),
    }
}
