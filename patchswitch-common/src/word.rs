//! The phase word: the only truth about who serves.
//!
//! Eight bytes in a mapped array, written by one aligned store and read once per packet, so that no packet sees half
//! of a change:
//!
//! ```text
//!  63            32 31      24 23      16 15       8 7        0
//! ┌────────────────┬──────────┬──────────┬──────────┬──────────┐
//! │   generation   │  share   │  flags   │  active  │  phase   │
//! └────────────────┴──────────┴──────────┴──────────┴──────────┘
//! ```
//!
//! A phase of two sides may have a bit of its byte set beside it: see [`Word::moved_to`].
//!
//! The share is that of a canary, in hundredths; in any phase but [`Phase::Sharing`] it is 0 and has no meaning.

use crate::Slot;

/// What happens to flows that the active partition does not own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// There are none: every packet goes to the active partition.
    Steady = 0,
    /// The other partition is retiring and keeps the flows it has.
    Draining = 1,
    /// A canary: the other partition gets a share of the new flows, and each keeps the flows it has.
    Sharing = 2,
}

/// The notice of the patent (step 2204): replies of the retiring partition get the service address as their source.
const NOTICE: u8 = 1 << 0;
/// Flows that the active partition answers and that have no socket of their own are remembered.
const LEARN: u8 = 1 << 1;
/// Beside a phase: the switch was to the letter of the patent's second embodiment. Who looks at the whole byte, as the programs for
/// packets to the service do, sees no phase that it knows.
const LETTER: u8 = 1 << 4;
/// The bits of the phase without that.
const PHASE: u8 = 0xf;

/// The bits of the share.
const SHARE: u64 = 0xff << 24;

/// The phase word, in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Word(pub u64);

impl Word {
    /// A steady word: `active` serves everything, nothing is learned or rewritten.
    #[inline(always)]
    pub const fn steady(active: Slot, generation: u32) -> Self {
        Self((generation as u64) << 32 | (active as u64) << 8)
    }

    /// The phase. A value that this version does not know counts as [`Phase::Steady`]: deliver to the active side.
    #[inline(always)]
    pub const fn phase(self) -> Phase {
        phase_of(self.0 as u8 & PHASE)
    }

    /// The phase as packets to the service see it: after a switch to the letter there is nobody but the active side.
    #[inline(always)]
    pub const fn inward(self) -> Phase {
        phase_of(self.0 as u8)
    }

    /// How many of a hundred new flows the side that is not active gets: 0 unless it shares.
    #[inline(always)]
    pub const fn share(self) -> u8 {
        (self.0 >> 24) as u8
    }

    /// The partition that gets new flows.
    #[inline(always)]
    pub const fn active(self) -> Slot {
        Slot::from_bit((self.0 >> 8) as u8)
    }

    /// Counts the changes of this word; goes only forward.
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Whether replies of the retiring partition are rewritten.
    #[inline(always)]
    pub const fn notice(self) -> bool {
        self.flags() & NOTICE != 0
    }

    /// Whether flows without a socket of their own are remembered.
    #[inline(always)]
    pub const fn learns(self) -> bool {
        self.flags() & LEARN != 0
    }

    /// Whether nobody but the active side is there at all.
    #[inline(always)]
    pub const fn is_steady(self) -> bool {
        self.0 as u8 == Phase::Steady as u8
    }

    /// Whether the retiring side gets nothing any more, not even what belongs to its own flows.
    #[inline(always)]
    pub const fn is_to_the_letter(self) -> bool {
        self.0 as u8 & !PHASE != 0
    }

    #[inline(always)]
    const fn flags(self) -> u8 {
        (self.0 >> 16) as u8
    }

    const fn with_flag(self, flag: u8, on: bool) -> Self {
        let bit = (flag as u64) << 16;
        Self(if on { self.0 | bit } else { self.0 & !bit }).next()
    }

    const fn next(self) -> Self {
        let generation = self.generation().wrapping_add(1) as u64;
        Self(self.0 & 0xffff_ffff | generation << 32)
    }

    /// The next word, with the notice on or off.
    #[must_use]
    pub const fn with_notice(self, on: bool) -> Self {
        self.with_flag(NOTICE, on)
    }

    /// The next word, with learning on or off.
    #[must_use]
    pub const fn with_learning(self, on: bool) -> Self {
        self.with_flag(LEARN, on)
    }

    /// The next word, in which `slot` gets the new flows and the other one keeps its own.
    ///
    /// Taking over and giving back are this one function with the roles exchanged. Learning ends: what is in flight
    /// belongs to the side that retires.
    #[must_use]
    pub const fn taken_over_by(self, slot: Slot) -> Self {
        let kept = self.with_flag(LEARN, false).0 & !(SHARE | 0xffff);
        Self(kept | (slot as u64) << 8 | Phase::Draining as u64)
    }

    /// As [`Word::taken_over_by`], but the other one's flows are not steered to it (the patent's second embodiment, figures 22
    /// to 26): what it still sends is sent on, what its clients send comes to `slot`, which knows nothing of it.
    #[must_use]
    pub const fn moved_to(self, slot: Slot) -> Self {
        Self(self.taken_over_by(slot).0 | LETTER as u64)
    }

    /// The next word, in which nobody retires any more.
    #[must_use]
    pub const fn settled(self) -> Self {
        Self(self.with_flag(NOTICE | LEARN, false).0 & !(SHARE | 0xff))
    }

    /// The next word, in which the side that is not active gets `share` of a hundred new flows, at most 99. Flows without a
    /// socket are remembered from then on, on both sides: when the share changes, they must not.
    #[must_use]
    pub const fn shared(self, share: u8) -> Self {
        let share = if share > 99 { 99 } else { share };
        let kept = self.with_flag(NOTICE, false).with_flag(LEARN, true).0 & !(SHARE | 0xff);
        Self(kept | (share as u64) << 24 | Phase::Sharing as u64)
    }
}

#[inline(always)]
const fn phase_of(byte: u8) -> Phase {
    const DRAINING: u8 = Phase::Draining as u8;
    const SHARING: u8 = Phase::Sharing as u8;
    match byte {
        DRAINING => Phase::Draining,
        SHARING => Phase::Sharing,
        _ => Phase::Steady,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_the_safe_word() {
        let word = Word::default();
        assert_eq!(
            (word.phase(), word.active(), word.notice(), word.learns()),
            (Phase::Steady, Slot::A, false, false)
        );
    }

    #[test]
    fn a_switch_and_its_reverse_go_through_the_same_words() {
        let start = Word::steady(Slot::A, 7).with_learning(true).with_notice(true);
        let there = start.taken_over_by(Slot::B);
        assert_eq!((there.phase(), there.active()), (Phase::Draining, Slot::B));
        assert!(there.notice() && !there.learns());
        let back = there.taken_over_by(Slot::A);
        assert_eq!((back.phase(), back.active()), (Phase::Draining, Slot::A));
        let settled = back.settled();
        assert_eq!(settled, Word::steady(Slot::A, settled.generation()));
        assert!(start.generation() < there.generation() && there.generation() < back.generation());
        assert!(back.generation() < settled.generation());
    }

    #[test]
    fn a_canary_grows_and_ends_in_a_switch_either_way() {
        let small = Word::steady(Slot::A, 7).with_notice(true).shared(10);
        assert_eq!((small.phase(), small.active(), small.share()), (Phase::Sharing, Slot::A, 10));
        assert!(small.learns() && !small.notice());
        let large = small.shared(50);
        assert_eq!((large.share(), large.active()), (50, Slot::A));
        assert!(large.generation() > small.generation());
        assert_eq!(large.shared(255).share(), 99);
        for slot in [Slot::A, Slot::B] {
            let over = large.taken_over_by(slot);
            assert_eq!((over.phase(), over.active(), over.share()), (Phase::Draining, slot, 0));
            assert!(!over.learns());
        }
        assert_eq!(large.settled(), Word::steady(Slot::A, large.settled().generation()));
    }

    #[test]
    fn to_the_letter_only_what_is_sent_knows_of_two_sides() {
        let start = Word::steady(Slot::A, 7).with_notice(true);
        let moved = start.moved_to(Slot::B);
        assert_eq!((moved.phase(), moved.active()), (Phase::Draining, Slot::B));
        assert!(moved.notice() && moved.is_to_the_letter());
        assert_eq!(moved.inward(), Phase::Steady);
        let back = moved.taken_over_by(Slot::A);
        assert!(!back.is_to_the_letter());
        assert_eq!(back.inward(), Phase::Draining);
        assert_eq!(moved.settled(), Word::steady(Slot::B, moved.settled().generation()));
        assert!(!moved.shared(10).is_to_the_letter());
    }

    #[test]
    fn an_unknown_phase_delivers_to_the_active_side() {
        let word = Word(0xff | 1 << 8);
        assert_eq!((word.phase(), word.active()), (Phase::Steady, Slot::B));
    }
}
