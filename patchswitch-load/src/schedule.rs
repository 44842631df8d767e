//! The open-loop schedule: request `i` is due at `i / rate`, whatever became of the ones before it.

use std::time::Duration;

use crate::record::{Class, Family};

/// A rate, and what the requests are like in turn.
#[derive(Clone, Debug)]
pub struct Schedule {
    rate: f64,
    turns: Vec<(Class, Family)>,
    next: u64,
}

impl Schedule {
    /// Requests at a rate (a second), taking turns. Without a rate or a turn nothing is ever due.
    pub fn new(rate: f64, turns: Vec<(Class, Family)>) -> Self {
        Self { rate, turns, next: 0 }
    }

    /// HTTP in turn over kept and new connections, and over the families that have a target: half of all requests
    /// on new connections, half of them in each family.
    pub fn http(rate: f64, families: &[Family]) -> Self {
        let turns = families.iter().enumerate().flat_map(|(index, family)| {
            let classes = [Class::Keepalive, Class::New];
            // Crossed over, so that neighbours differ in both.
            let classes = if index % 2 == 0 { classes } else { [classes[1], classes[0]] };
            classes.map(|class| (class, *family))
        });
        Self::new(rate, turns.collect())
    }

    /// Datagrams over the families in turn.
    pub fn udp(rate: f64, families: &[Family]) -> Self {
        Self::new(rate, families.iter().map(|family| (Class::Udp, *family)).collect())
    }

    /// The kinds of requests it makes.
    pub fn series(&self) -> Vec<(Class, Family)> {
        if self.is_active() { self.turns.clone() } else { Vec::new() }
    }

    /// When the next request is due, from the start.
    pub fn due(&self) -> Option<Duration> {
        self.is_active().then(|| Self::moment(self.next, self.rate))
    }

    /// Takes the next request off the schedule if it is due by now.
    pub fn take(&mut self, now: Duration) -> Option<(Duration, Class, Family)> {
        let due = self.due().filter(|due| *due <= now)?;
        let turn = usize::try_from(self.next % self.turns.len() as u64).unwrap_or(0);
        let (class, family) = *self.turns.get(turn)?;
        self.next += 1;
        Some((due, class, family))
    }

    fn is_active(&self) -> bool {
        self.rate > 0.0 && !self.turns.is_empty()
    }

    #[expect(clippy::cast_precision_loss, reason = "a run has far fewer than 2^53 requests")]
    fn moment(number: u64, rate: f64) -> Duration {
        Duration::try_from_secs_f64(number as f64 / rate).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_all_requests_are_on_new_connections_and_half_in_each_family() {
        let mut schedule = Schedule::http(100.0, &Family::ALL);
        let mut taken = Vec::new();
        while let Some((_, class, family)) = schedule.take(Duration::from_secs(1)) {
            taken.push((class, family));
        }
        assert_eq!(taken.len(), 101, "0.00 to 1.00");
        for turn in schedule.series() {
            assert!((25..=26).contains(&taken.iter().filter(|t| **t == turn).count()), "{turn:?}");
        }
        assert_eq!(schedule.series().len(), 4);
    }

    #[test]
    fn late_requests_keep_the_time_at_which_they_were_due() {
        let mut schedule = Schedule::udp(10.0, &[Family::V4]);
        assert_eq!(schedule.due(), Some(Duration::ZERO));
        let dues: Vec<_> =
            std::iter::from_fn(|| schedule.take(Duration::from_millis(350))).map(|t| t.0).collect();
        assert_eq!(dues, [0, 100, 200, 300].map(Duration::from_millis));
        assert_eq!(schedule.due(), Some(Duration::from_millis(400)));
    }

    #[test]
    fn without_rate_or_target_nothing_is_due() {
        assert_eq!(Schedule::http(0.0, &Family::ALL).due(), None);
        assert_eq!(Schedule::http(5.0, &[]).take(Duration::MAX), None);
        assert!(Schedule::udp(0.0, &Family::ALL).series().is_empty());
    }
}
