//! Both directions of a switch: what holds while one side retires holds while the other one does (packet case D-31).

use std::net::IpAddr;

use patchswitch_common::Slot;
use patchswitch_common::word::Word;
use patchswitch_tests::netlab::Ns;

use crate::bench::{Bench, Family};

/// Who retires, while the other one serves: a rollback is the same switch with the roles exchanged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Retiring(pub(crate) Slot);

/// Both directions of a switch.
pub(crate) const DIRECTIONS: [Retiring; 2] = [Retiring(Slot::A), Retiring(Slot::B)];

impl Retiring {
    /// The word while it drains.
    pub(crate) const fn word(self) -> Word {
        Word::steady(self.0, 1).taken_over_by(self.0.other())
    }

    /// What is counted of a packet that the retiring one keeps.
    pub(crate) const fn kept(self) -> &'static [&'static str] {
        match self.0 {
            Slot::A => &["to_a", "kept_by_retiring"],
            Slot::B => &["to_b", "kept_by_retiring"],
        }
    }

    /// Of one that goes to the serving one.
    pub(crate) const fn moved(self) -> &'static [&'static str] {
        match self.0 {
            Slot::A => &["to_b"],
            Slot::B => &["to_a"],
        }
    }

    /// Of one that goes there because the retiring one has nothing that it could be for.
    pub(crate) const fn nothing(self) -> &'static [&'static str] {
        match self.0 {
            Slot::A => &["to_b", "nothing_in_retiring"],
            Slot::B => &["to_a", "nothing_in_retiring"],
        }
    }

    /// The namespaces of the retiring one and of the serving one.
    pub(crate) fn spaces(self, bench: &Bench) -> [Ns; 2] {
        let (a, b) = (bench.lab.a.clone(), bench.lab.b.clone());
        if self.0 == Slot::A { [a, b] } else { [b, a] }
    }

    /// Its own address.
    pub(crate) const fn own(self, family: Family) -> IpAddr {
        match self.0 {
            Slot::A => family.own_a,
            Slot::B => family.own_b,
        }
    }
}
