//! What is measured, how often and how long.

use std::time::Duration;

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::peers;

/// The rows of the table that this program measures, and what they say.
pub(crate) const ROWS: [(u8, &str); 14] = [
    (1, "requests failed in a switch under load"),
    (2, "connections reset or timed out, segments sent again"),
    (3, "longest gap of a 10 kHz datagram probe and a 1 kHz TCP probe"),
    (4, "99.9th percentile of requests around a switch, to quiet times"),
    (5, "from the switch to the first connection of the new side; command to fence"),
    (6, "the same in reverse"),
    (7, "packets of flows that came to the wrong side"),
    (8, "64-byte datagrams a second, nothing under way"),
    (9, "the same while draining with many old flows"),
    (10, "TCP request and response: rate, P50, P99"),
    (11, "cycles for a packet on the sending core"),
    (12, "BPF ns for a packet over an empty program, hot and cold"),
    (18, "memory for a million flows; old flows that are alive while draining (19)"),
    (22, "what the verifier reads, and its time"),
];

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    /// Whether it has to be over in five minutes.
    pub(crate) quick: bool,
}

impl Scale {
    fn pick<T>(self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }

    /// Blocks of the order ABBA for rates.
    pub(crate) fn blocks(self) -> usize {
        self.pick(10, 20)
    }

    /// How long one side of a block sends.
    pub(crate) fn slot(self) -> Duration {
        Duration::from_millis(self.pick(100, 300))
    }

    /// Blocks of test runs.
    pub(crate) fn ns_blocks(self) -> usize {
        self.pick(7, 21)
    }

    /// How often a packet goes through a program for one value.
    pub(crate) fn repeat(self) -> u32 {
        self.pick(50_000, 200_000)
    }

    /// How many calls with one run each make a value.
    pub(crate) fn single_runs(self) -> usize {
        self.pick(1_000, 5_000)
    }

    /// Connections among which a cold packet's is drawn.
    pub(crate) fn cold_flows(self) -> u32 {
        self.pick(5_000, 15_000)
    }

    /// How often the programs are loaded.
    pub(crate) fn loads(self) -> usize {
        self.pick(3, 10)
    }

    /// Old flows of the draining side.
    pub(crate) fn old_flows(self) -> u32 {
        self.pick(50_000, 100_000)
    }

    /// Blocks of two quiet windows and two with a switch in them: of a peer that takes long, and of patchswitch.
    pub(crate) fn switch_blocks(self, slow: bool, ours: bool) -> usize {
        match (slow, ours) {
            (true, _) => self.pick(1, 5),
            (false, false) => self.pick(5, 10),
            (false, true) => self.pick(12, 40),
        }
    }

    /// How long such a window is.
    pub(crate) fn window(self) -> Duration {
        Duration::from_millis(self.pick(400, 1000))
    }

    /// Switches under load in close succession.
    pub(crate) fn many_switches(self) -> u32 {
        self.pick(100, 200)
    }

    /// Whom patchswitch is compared with under each of several loads.
    pub(crate) fn level_peers(self) -> &'static [&'static str] {
        let all = &[peers::BRIDGE, peers::KEEPALIVED, peers::NFT, peers::HAPROXY, peers::LETTER, peers::IPVS];
        self.pick(&[peers::HAPROXY], all)
    }

    /// Switches of a peer under each of several loads.
    pub(crate) fn switches_at_level(self, slow: bool) -> u32 {
        if slow { self.pick(2, 10) } else { self.pick(20, 200) }
    }

    /// Stores around which connections are opened as fast as it goes, there and as many back.
    pub(crate) fn stores(self) -> usize {
        self.pick(100, 200)
    }

    /// Switches whose moment is measured, there and back together.
    pub(crate) fn flips(self, slow: bool) -> u32 {
        match (slow, self.quick) {
            (false, true) => 6,
            (false, false) => 40,
            (true, true) => 2,
            (true, false) => 6,
        }
    }
}

/// Keeps the calling thread on a processor: 0 has the client and with it all work on its packets, 1 the partitions.
pub(crate) fn pin_to(processor: usize) -> anyhow::Result<()> {
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    let mut set = CpuSet::new();
    set.set(processor % count.max(1));
    Ok(sched_setaffinity(None, &set)?)
}

/// What of it is wanted: nothing named is everything.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selection {
    rows: Vec<u8>,
    peers: Vec<String>,
}

impl Selection {
    /// Reads numbers of rows and keys of peers.
    pub(crate) fn parse(words: &[String], rows: &[(u8, &str)], peers: &[&str]) -> anyhow::Result<Self> {
        let mut selection = Self::default();
        for word in words {
            match word.parse::<u8>() {
                Ok(row) if rows.iter().any(|(number, _)| *number == row) => selection.rows.push(row),
                Err(_) if peers.contains(&word.as_str()) => selection.peers.push(word.clone()),
                _ => anyhow::bail!("{word} is neither a row nor a peer: see --list"),
            }
        }
        Ok(selection)
    }

    /// Whether one of some rows is wanted.
    pub(crate) fn rows(&self, rows: &[u8]) -> bool {
        self.rows.is_empty() || rows.iter().any(|row| self.rows.contains(row))
    }

    /// Whether a peer is wanted.
    pub(crate) fn peer(&self, key: &str) -> bool {
        self.peers.is_empty() || self.peers.iter().any(|peer| peer == key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_peers_are_told_apart() {
        let parse = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(ToString::to_string).collect();
            Selection::parse(&words, &ROWS, &["floor", "bridge"])
        };
        let some = parse(&["8", "bridge", "12"]).unwrap();
        assert!(some.rows(&[8, 9]) && some.rows(&[12]) && !some.rows(&[1, 2]));
        assert!(some.peer("bridge") && !some.peer("floor"));
        let all = parse(&[]).unwrap();
        assert!(all.rows(&[1]) && all.peer("floor"));
        assert!(parse(&["13"]).is_err() && parse(&["nobody"]).is_err());
    }
}
