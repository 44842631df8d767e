//! A canary: the new partition gets a small share of the new flows first, then a larger one, and all of them in the end.
//!
//! ```text
//!  steady on A ── share 1 ──► sharing ── share 10 ──► sharing ── … ── all ──► draining to B
//!                                │                       │
//!                                └──── B does worse ─────┴──► draining to A: what B has stays there until it ends
//! ```
//!
//! How a side does is counted by the programs: connections that were asked for, accepted and reset. Segments that had to
//! be sent again are counted by the kernel of each partition's network namespace, for no single packet tells that it is
//! one of these.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use patchswitch_common::Slot;
use patchswitch_common::verdict::Event;
use patchswitch_common::word::Phase;
use serde::Serialize;

use super::{AttachError, Attachment, SwitchOptions};
use crate::host::linux::counters;

/// How often the two sides are compared.
const LOOK: Duration = Duration::from_millis(500);
/// So many looks back is "lately": ten seconds.
const LATELY: usize = 20;

/// What a canary does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Canary {
    /// The shares of new flows, in hundredths, each larger than the one before; 100 is the switch.
    pub shares: Vec<u8>,
    /// How long each of them lasts.
    pub every: Duration,
}

/// How a side did in a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Conduct {
    /// Connections that clients asked for.
    pub asked: u64,
    /// Of these, accepted.
    pub answered: u64,
    /// Connections that the side reset or refused.
    pub reset: u64,
    /// TCP segments sent.
    pub sent: u64,
    /// Of these, sent again.
    pub sent_again: u64,
}

/// How a canary ended.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CanaryReport {
    /// The last share that was given.
    pub share: u8,
    /// How the new side did.
    pub new: Conduct,
    /// How the old side did.
    pub old: Conduct,
    /// Why new flows went back to the old side, if they did.
    pub given_back: Option<String>,
    /// Whether the caller called it off: the share is 0 then, and what the new side has stays with it until it ends.
    pub called_off: bool,
}

/// As many failures are noise.
const NOISE: u64 = 4;
/// How far a part must be above the other side's to be worse, in millionths: two in a hundred of all there was.
const SLIGHTLY: u64 = 20_000;
/// Of fewer connections a part says nothing.
const ENOUGH: u64 = 20;
/// Ten in a hundred of what was lately: that is looked at again and again, and chance has as many tries.
const CLEARLY: u64 = 100_000;

impl Conduct {
    fn since(self, before: Self) -> Self {
        Self {
            asked: self.asked.saturating_sub(before.asked),
            answered: self.answered.saturating_sub(before.answered),
            reset: self.reset.saturating_sub(before.reset),
            sent: self.sent.saturating_sub(before.sent),
            sent_again: self.sent_again.saturating_sub(before.sent_again),
        }
    }

    const fn and(self, other: Self) -> Self {
        Self {
            asked: self.asked + other.asked,
            answered: self.answered + other.answered,
            reset: self.reset + other.reset,
            sent: self.sent + other.sent,
            sent_again: self.sent_again + other.sent_again,
        }
    }

    /// Connections that failed: not accepted, or reset. One that was refused is both.
    fn failed(self) -> u64 {
        self.asked.saturating_sub(self.answered).max(self.reset)
    }

    /// Why this side does worse than another one; nothing if it does not, or too little is known.
    ///
    /// Worse is a part of failures that is more than twice the other's and more than two in a hundred above it: below
    /// that, chance tells two equal sides apart often enough.
    pub fn worse_than(self, other: Self) -> Option<String> {
        self.worse_by(SLIGHTLY, other)
    }

    fn worse_by(self, margin: u64, other: Self) -> Option<String> {
        let (failed, base) = (self.failed(), other.failed());
        if failed > NOISE && is_more(margin, (failed, self.asked), (base, other.asked)) {
            return Some(format!(
                "of {} connections that the new side was asked for, {failed} failed ({} not accepted, {} reset); on the \
                 old side {base} of {}",
                self.asked,
                self.asked.saturating_sub(self.answered),
                self.reset,
                other.asked
            ));
        }
        let (again, base) = (self.sent_again, other.sent_again);
        if again > NOISE && is_more(margin, (again, self.sent), (base, other.sent)) {
            return Some(format!(
                "of {} segments the new side sent {again} again; the old side {base} of {}",
                self.sent, other.sent
            ));
        }
        None
    }
}

/// Whether one part of a whole is more than twice another one and more than a margin above it, in millionths.
fn is_more(margin: u64, (part, whole): (u64, u64), (other_part, other_whole): (u64, u64)) -> bool {
    let ratio = |part: u64, whole: u64| match whole {
        // Resets of connections that were there before: nothing to compare with, and bad enough.
        0 => u128::from(part > 0) * 1_000_000,
        whole => u128::from(part) * 1_000_000 / u128::from(whole),
    };
    let (ours, others) = (ratio(part, whole), ratio(other_part, other_whole));
    ours > 2 * others && ours > others + u128::from(margin)
}

/// How both sides did, the new one first, since the canary began and lately: of a long time the last seconds are a small
/// part, and a side that breaks late would be seen late.
struct Looks {
    begin: [Conduct; 2],
    lately: VecDeque<[Conduct; 2]>,
}

impl Looks {
    fn since(begin: [Conduct; 2]) -> Self {
        Self { begin, lately: VecDeque::from([begin]) }
    }

    /// Since the beginning.
    fn whole(&self, now: [Conduct; 2]) -> [Conduct; 2] {
        difference(now, self.begin)
    }

    /// Why the new side does worse, if it does, by one look more.
    fn worse(&mut self, now: [Conduct; 2]) -> Option<String> {
        let [new, old] = self.whole(now);
        let [new_lately, old_lately] = difference(now, self.lately.front().copied().unwrap_or(self.begin));
        self.lately.push_back(now);
        if self.lately.len() > LATELY {
            self.lately.pop_front();
        }
        // An old side that gets next to nothing any more is compared with as it was.
        let base = if old_lately.asked < ENOUGH { old } else { old_lately };
        let lately = || new_lately.worse_by(CLEARLY, base).map(|why| format!("lately, {why}"));
        new.worse_than(old).or_else(lately)
    }
}

fn difference(now: [Conduct; 2], before: [Conduct; 2]) -> [Conduct; 2] {
    [now[0].since(before[0]), now[1].since(before[1])]
}

impl Attachment {
    /// Gives the side that is not active a share of the new flows, from 1 to 99 in a hundred; flows that exist stay where
    /// they are. It is ended by [`Attachment::switch`], to either side.
    ///
    /// Flows without a socket of their own stay only if they were remembered before: see [`Attachment::learn`].
    ///
    /// # Errors
    /// [`AttachError::Refused`] while a switch is under way, or with a share that is none; others as of
    /// [`Attachment::switch`]. Nothing is shared then that was not before.
    pub async fn share(&mut self, share: u8) -> Result<(), AttachError> {
        if !(1..=99).contains(&share) {
            return Err(AttachError::Refused(format!(
                "a share of {share} is none: 1 to 99 of a hundred new flows"
            )));
        }
        let word = self.plane.word();
        if word.phase() == Phase::Draining {
            return Err(AttachError::Refused(format!(
                "{} still has flows of an earlier switch; wait for the end of `patchswitch drain {0}` first",
                self.record.name
            )));
        }
        if word.phase() == Phase::Steady {
            let (to, options) = (word.active().other(), SwitchOptions::default());
            self.prepare(to, options).await?;
            for other in &mut self.others {
                other.prepare(to, options).await?;
            }
            if !word.learns() {
                // It does from now on: what found no room earlier is no loss of this one.
                self.note_what_is_full()?;
            }
        }
        self.plane.store(word, word.shared(share))?;
        Ok(self.plane.fence()?)
    }

    /// Runs a canary to its end: all shares in turn, or back as soon as the new side does worse than the old one.
    ///
    /// `progress` is told each share and how both sides did so far, the new one first; `stop` calls the canary off.
    ///
    /// # Errors
    /// [`AttachError`]; the word says who serves then, and [`Attachment::switch`] ends it either way.
    pub async fn canary(
        &mut self,
        canary: &Canary,
        stop: &(dyn Fn() -> bool + Sync),
        mut progress: impl FnMut(u8, Conduct, Conduct),
    ) -> Result<CanaryReport, AttachError> {
        let old = self.plane.word().active();
        let ended = self.steps(canary, old, stop, &mut progress).await;
        if ended.is_err() && self.plane.word().phase() == Phase::Sharing {
            // Nobody would watch the new side any more.
            self.give_back(old).await?;
        }
        ended
    }

    async fn steps(
        &mut self,
        canary: &Canary,
        old: Slot,
        stop: &(dyn Fn() -> bool + Sync),
        progress: &mut impl FnMut(u8, Conduct, Conduct),
    ) -> Result<CanaryReport, AttachError> {
        let new = old.other();
        let mut looks = Looks::since([self.conduct(new)?, self.conduct(old)?]);
        let mut report = CanaryReport::default();
        for share in &canary.shares {
            match share {
                100 => drop(self.switch(new).await?),
                share => self.share(*share).await?,
            }
            report.share = *share;
            let end = Instant::now() + canary.every;
            loop {
                let now = [self.conduct(new)?, self.conduct(old)?];
                [report.new, report.old] = looks.whole(now);
                report.given_back = looks.worse(now);
                report.called_off = report.given_back.is_none() && stop();
                if report.given_back.is_some() || report.called_off {
                    self.give_back(old).await?;
                    return Ok(report);
                }
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                tokio::time::sleep(left.min(LOOK)).await;
            }
            progress(*share, report.new, report.old);
        }
        Ok(report)
    }

    /// Gives new flows back to the side that had them before the canary.
    async fn give_back(&mut self, old: Slot) -> Result<(), AttachError> {
        let options = SwitchOptions { despite_losses: true, ..SwitchOptions::default() };
        self.switch_with(old, options).await.map(drop)
    }

    /// How a side has done since the programs were loaded, all members of a group together.
    fn conduct(&self, slot: Slot) -> Result<Conduct, AttachError> {
        let members = std::iter::once(self).chain(&self.others);
        members
            .map(|member| member.own_conduct(slot))
            .try_fold(Conduct::default(), |sum, one| Ok(sum.and(one?)))
    }

    fn own_conduct(&self, slot: Slot) -> Result<Conduct, AttachError> {
        let count = |event| self.plane.count_of(event);
        let netns = self.netns(slot)?;
        let segments =
            netns.run(|| Ok([counters::read("Tcp", "OutSegs")?, counters::read("Tcp", "RetransSegs")?]))?;
        let failed = |source| AttachError::Counters { netns: netns.to_string(), source };
        let [sent, sent_again] = segments.map_err(failed)?.map(Option::unwrap_or_default);
        Ok(Conduct {
            asked: count(Event::asked(slot))?,
            answered: count(Event::answered(slot))?,
            reset: count(Event::reset(slot))?,
            sent,
            sent_again,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(asked: u64, answered: u64, reset: u64) -> Conduct {
        Conduct { asked, answered, reset, ..Conduct::default() }
    }

    #[test]
    fn a_side_is_worse_only_by_more_than_noise() {
        let good = side(10_000, 10_000, 0);
        for (new, old, worse) in [
            (side(100, 100, 0), good, false),
            (side(0, 0, 0), good, false),
            (side(4, 0, 0), good, false),
            (side(5, 0, 0), good, true),
            (side(100, 95, 0), good, true),
            (side(1000, 990, 0), good, false),
            (side(1000, 975, 0), good, true),
            (side(100, 100, 30), good, true),
            // Both refuse many: that is how this service is.
            (side(100, 70, 0), side(1000, 800, 0), false),
            (side(100, 70, 0), side(1000, 900, 0), true),
            (side(0, 0, 9), good, true),
        ] {
            let found = new.worse_than(old);
            assert_eq!(found.is_some(), worse, "{new:?} {old:?}: {found:?}");
        }
        let again = |sent, sent_again| Conduct { sent, sent_again, ..side(10, 10, 0) };
        assert!(again(1000, 50).worse_than(again(1000, 10)).is_some_and(|text| text.contains("50 again")));
        assert_eq!(again(1000, 25).worse_than(again(1000, 15)), None);
        assert_eq!(again(10, 4).worse_than(again(1000, 0)), None);
    }

    /// The looks until the new side is seen to do worse, after so many good ones; each look has 50 connections of either
    /// side, and of the new one's some fail in the end.
    fn seen_after(good: u64, failing: u64) -> Option<u64> {
        let mut sides = [side(0, 0, 0); 2];
        let mut looks = Looks::since(sides);
        for number in 0..good + 100 {
            let fail = if number < good { 0 } else { failing };
            sides = [sides[0].and(side(50, 50 - fail, fail)), sides[1].and(side(50, 50, 0))];
            if looks.worse(sides).is_some() {
                assert!(number >= good, "given back for nothing");
                return Some(number - good + 1);
            }
        }
        None
    }

    #[test]
    fn a_side_that_breaks_late_is_seen_as_soon() {
        // At once, after ten seconds, after an hour.
        for good in [0, 20, 7200] {
            assert!(seen_after(good, 50).is_some_and(|looks| looks <= 3), "all fail after {good}");
            assert!(seen_after(good, 15).is_some_and(|looks| looks <= 7), "a third fails after {good}");
        }
        // What is not clear is seen only by the whole: 3 of 50, and the whole is long.
        assert!(seen_after(20, 3).is_some_and(|looks| looks <= 20));
        assert_eq!(seen_after(7200, 3), None);
        assert_eq!(seen_after(7200, 0), None);
    }

    #[test]
    fn what_is_no_more_is_not_lately() {
        let mut looks = Looks::since([side(0, 0, 0); 2]);
        let mut sides = [side(100_000, 100_000, 0); 2];
        assert_eq!(looks.worse(sides), None);
        for _ in 0..LATELY {
            assert_eq!(looks.worse(sides), None);
        }
        // 12 of 100 of the last ten seconds, and nothing of the whole.
        sides[0] = sides[0].and(side(100, 88, 12));
        sides[1] = sides[1].and(side(100, 100, 0));
        assert!(looks.worse(sides).is_some_and(|why| why.starts_with("lately, of 100 connections")));
        for _ in 1..LATELY {
            assert!(looks.worse(sides).is_some());
        }
        assert_eq!(looks.worse(sides), None, "ten seconds ago");
    }

    #[test]
    fn an_old_side_that_gets_nothing_any_more_is_compared_as_it_was() {
        let mut looks = Looks::since([side(0, 0, 0); 2]);
        // Some clients never get on with either.
        let mut sides = [side(1000, 880, 120), side(1000, 880, 120)];
        for _ in 0..=LATELY {
            assert_eq!(looks.worse(sides), None);
        }
        sides[0] = sides[0].and(side(50, 44, 6));
        assert_eq!(looks.worse(sides), None, "as always");
        sides[0] = sides[0].and(side(50, 20, 30));
        assert!(looks.worse(sides).is_some(), "no more as always");
    }
}
