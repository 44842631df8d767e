//! The resource table of logical computers (patent Fig. 5) and the search for a standby (Fig. 7, step 701).
//!
//! A standby *covers* the active partition if it has at least as much of everything. That is a partial order: one
//! may have more memory and the other more processor, and then neither covers the other.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::exit::ExitCode;
use crate::names::Name;

/// The resources of one logical computer: a row of the table without its identifier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    /// Column 502: how much of one processor, in percent; 250 is two and a half processors.
    pub cpu_percent: u32,
    /// Column 503: memory, in bytes.
    pub memory: u64,
    /// How many processes and threads.
    pub pids: u32,
    /// Column 504: the sizes of the disks, in bytes. Names do not matter here: every partition has its own.
    pub disks: Vec<u64>,
    /// Column 505: the host's network device by which the partition is reached; none for a partition without network.
    pub network: Option<String>,
}

/// A column in which a standby has less than is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shortfall {
    /// Percent of one processor that are missing.
    Cpu(u32),
    /// Bytes of memory that are missing.
    Memory(u64),
    /// Processes that are missing.
    Pids(u32),
    /// A disk is missing altogether; its size in bytes.
    DiskMissing(u64),
    /// A disk is too small by this many bytes.
    DiskSmall {
        /// The size that is needed, in bytes.
        needed: u64,
        /// How many bytes are missing.
        missing: u64,
    },
    /// The partition is reached by another device, or by none.
    Network {
        /// The device that is needed.
        needed: String,
        /// The one it has.
        present: Option<String>,
    },
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu(missing) => write!(f, "{missing}% of a processor too little"),
            Self::Memory(missing) => write!(f, "{} of memory too little", bytes(*missing)),
            Self::Pids(missing) => write!(f, "{missing} processes too few"),
            Self::DiskMissing(needed) => write!(f, "no disk for one of {}", bytes(*needed)),
            Self::DiskSmall { needed, missing } => {
                write!(f, "a disk {} too small for one of {}", bytes(*missing), bytes(*needed))
            }
            Self::Network { needed, present: Some(present) } => {
                write!(f, "network device {present} instead of {needed}")
            }
            Self::Network { needed, present: None } => write!(f, "no network device instead of {needed}"),
        }
    }
}

/// No candidate covers the active partition.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("no standby covers {active}: {}", reasons(.rejected))]
pub struct NoStandby {
    /// The active partition.
    pub active: Name,
    /// Every candidate and what it lacks, in the order in which they were given.
    pub rejected: Vec<(Name, Vec<Shortfall>)>,
}

impl NoStandby {
    /// The code for this end of a command.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::Unavailable
    }
}

fn reasons(rejected: &[(Name, Vec<Shortfall>)]) -> String {
    if rejected.is_empty() {
        return "no partition is unassigned; define one".to_owned();
    }
    let one = |(name, lacks): &(Name, Vec<Shortfall>)| {
        let lacks: Vec<String> = lacks.iter().map(ToString::to_string).collect();
        format!("{name} has {}", lacks.join(" and "))
    };
    rejected.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// Everything that the standby lacks; empty if it covers the active partition.
pub fn shortfalls(standby: &Resources, active: &Resources) -> Vec<Shortfall> {
    let mut lacks = Vec::new();
    lacks.extend(missing(active.cpu_percent, standby.cpu_percent).map(Shortfall::Cpu));
    lacks.extend(missing(active.memory, standby.memory).map(Shortfall::Memory));
    lacks.extend(missing(active.pids, standby.pids).map(Shortfall::Pids));
    lacks.extend(disk_shortfalls(&standby.disks, &active.disks));
    if let Some(needed) = &active.network
        && standby.network.as_ref() != Some(needed)
    {
        lacks.push(Shortfall::Network { needed: needed.clone(), present: standby.network.clone() });
    }
    lacks
}

/// Whether the standby has at least as much of everything.
pub fn covers(standby: &Resources, active: &Resources) -> bool {
    shortfalls(standby, active).is_empty()
}

/// The smallest of the candidates that cover the active partition; of equals the first one.
///
/// "Small" is judged by memory, then processor, then disks in total, then processes.
///
/// # Errors
/// [`NoStandby`], which says of every candidate what it lacks.
pub fn find_standby<'a>(
    active: (&Name, &Resources),
    candidates: &[(&'a Name, &Resources)],
) -> Result<&'a Name, NoStandby> {
    let covering = candidates.iter().filter(|(_, resources)| covers(resources, active.1));
    // `min_by_key` keeps the first of equals.
    if let Some((name, _)) = covering.min_by_key(|(_, resources)| size(resources)) {
        return Ok(name);
    }
    let lack = |(name, resources): &(&Name, &Resources)| ((*name).clone(), shortfalls(resources, active.1));
    Err(NoStandby { active: active.0.clone(), rejected: candidates.iter().map(lack).collect() })
}

/// A total order that agrees with `covers`: what covers another is never smaller than it.
fn size(resources: &Resources) -> impl Ord + use<> {
    let disks: u128 = resources.disks.iter().copied().map(u128::from).sum();
    let counts = (resources.disks.len(), resources.network.is_some());
    (resources.memory, resources.cpu_percent, disks, resources.pids, counts)
}

/// Each needed disk gets one of its own. Largest against largest is the best assignment there is.
fn disk_shortfalls(standby: &[u64], active: &[u64]) -> Vec<Shortfall> {
    let sorted = |disks: &[u64]| {
        let mut disks = disks.to_vec();
        disks.sort_unstable_by(|a, b| b.cmp(a));
        disks
    };
    let present = sorted(standby);
    let short = |(index, needed): (usize, u64)| match present.get(index) {
        None => Some(Shortfall::DiskMissing(needed)),
        Some(disk) => missing(needed, *disk).map(|missing| Shortfall::DiskSmall { needed, missing }),
    };
    sorted(active).into_iter().enumerate().filter_map(short).collect()
}

fn missing<T: PartialOrd + std::ops::Sub<Output = T>>(needed: T, present: T) -> Option<T> {
    (present < needed).then(|| needed - present)
}

/// A number of bytes, in the largest unit that leaves nothing over.
fn bytes(count: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let exact = units.iter().find(|(shift, _)| count != 0 && count.trailing_zeros() >= *shift);
    exact.map_or_else(|| format!("{count} bytes"), |(shift, unit)| format!("{} {unit}", count >> shift))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn resources() -> Resources {
        Resources {
            cpu_percent: 100,
            memory: 256 * MIB,
            pids: 200,
            disks: vec![1024 * MIB, 64 * MIB],
            network: Some("eth0".to_owned()),
        }
    }

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    #[test]
    fn each_column_says_by_how_much_it_falls_short() {
        let lack = |change: fn(&mut Resources)| {
            let mut standby = resources();
            change(&mut standby);
            let lacks = shortfalls(&standby, &resources());
            lacks.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(lack(|r| r.cpu_percent = 75), ["25% of a processor too little"]);
        assert_eq!(lack(|r| r.memory = 192 * MIB), ["64 MiB of memory too little"]);
        assert_eq!(lack(|r| r.pids = 199), ["1 processes too few"]);
        assert_eq!(lack(|r| r.disks[0] = 1023 * MIB), ["a disk 1 MiB too small for one of 1 GiB"]);
        assert_eq!(lack(|r| r.disks.truncate(1)), ["no disk for one of 64 MiB"]);
        assert_eq!(lack(|r| r.network = None), ["no network device instead of eth0"]);
        assert_eq!(lack(|r| r.network = Some("eth1".into())), ["network device eth1 instead of eth0"]);
        assert_eq!(lack(|r| r.disks.reverse()), [] as [&str; 0], "disks are matched by size");
    }

    #[test]
    fn the_error_names_every_candidate_and_ends_with_69() {
        let small = Resources { memory: 192 * MIB, cpu_percent: 50, ..resources() };
        let (active, one) = (name("web"), name("spare"));
        let error = find_standby((&active, &resources()), &[(&one, &small)]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no standby covers web: spare has 50% of a processor too little and 64 MiB of memory too little"
        );
        assert_eq!(error.exit_code().number(), 69);
        let none = find_standby((&active, &resources()), &[]).unwrap_err();
        assert!(none.to_string().contains("no partition is unassigned"));
    }

    #[test]
    fn of_equals_the_first_is_taken() {
        let (web, a, b, c) = (name("web"), name("a"), name("b"), name("c"));
        let large = Resources { memory: 512 * MIB, ..resources() };
        let candidates = [(&a, &large), (&b, &resources()), (&c, &resources())];
        assert_eq!(find_standby((&web, &resources()), &candidates), Ok(&b));
    }

    fn any_resources() -> impl Strategy<Value = Resources> {
        // Few values, so that equal and comparable ones are common.
        let network = prop::option::of(prop::sample::select(vec!["eth0".to_owned(), "eth1".to_owned()]));
        (1..4_u32, 1..4_u64, 1..3_u32, prop::collection::vec(1..4_u64, 0..4), network).prop_map(
            |(cpu_percent, memory, pids, disks, network)| Resources {
                cpu_percent,
                memory,
                pids,
                disks,
                network,
            },
        )
    }

    proptest! {
        #[test]
        fn covering_is_reflexive(a in any_resources()) {
            prop_assert!(covers(&a, &a));
        }

        #[test]
        fn covering_is_transitive(a in any_resources(), b in any_resources(), c in any_resources()) {
            if covers(&a, &b) && covers(&b, &c) {
                prop_assert!(covers(&a, &c));
            }
        }

        #[test]
        fn covering_each_other_is_being_equal(a in any_resources(), b in any_resources()) {
            let sorted = |r: &Resources| { let mut r = r.clone(); r.disks.sort_unstable(); r };
            let both = covers(&a, &b) && covers(&b, &a);
            prop_assert_eq!(both, sorted(&a) == sorted(&b));
        }

        #[test]
        fn what_covers_is_never_smaller(a in any_resources(), b in any_resources()) {
            if covers(&a, &b) {
                prop_assert!(size(&a) >= size(&b));
            }
        }

        #[test]
        fn the_found_one_covers_and_no_smaller_one_does(
            active in any_resources(),
            candidates in prop::collection::vec(any_resources(), 0..8),
        ) {
            let web = name("web");
            let names: Vec<Name> = (0..candidates.len()).map(|i| name(&format!("s{i}"))).collect();
            let pairs: Vec<_> = names.iter().zip(&candidates).collect();
            match find_standby((&web, &active), &pairs) {
                Ok(found) => {
                    let at = names.iter().position(|n| n == found).unwrap();
                    prop_assert!(covers(&candidates[at], &active));
                    for (index, other) in candidates.iter().enumerate().filter(|(_, r)| covers(r, &active)) {
                        prop_assert!(size(other) > size(&candidates[at])
                            || (size(other) == size(&candidates[at]) && index >= at));
                    }
                }
                Err(error) => {
                    prop_assert!(candidates.iter().all(|r| !covers(r, &active)));
                    prop_assert!(error.rejected.iter().all(|(_, lacks)| !lacks.is_empty()));
                }
            }
        }
    }
}
