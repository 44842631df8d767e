//! Medians of blocks and how sure they are; pure.

use serde::Serialize;

/// How often the blocks are drawn anew for an interval.
const DRAWS: usize = 2000;

/// One block in the order A, B, B, A or B, A, A, B: what drifts steadily meanwhile touches both alike.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Block {
    /// What was compared with.
    pub(crate) a: [f64; 2],
    /// What was compared.
    pub(crate) b: [f64; 2],
}

impl Block {
    /// B in relation to A.
    pub(crate) fn ratio(&self) -> f64 {
        let (a, b) = (self.a[0] + self.a[1], self.b[0] + self.b[1]);
        b / a
    }

    /// B beyond A.
    pub(crate) fn difference(&self) -> f64 {
        (self.b[0] + self.b[1] - self.a[0] - self.a[1]) / 2.0
    }
}

/// Measures blocks, in turn A, B, B, A and B, A, A, B: whatever comes of being first or last touches both as often. What
/// is measured before the first block does not count: whoever has rested until then begins slowly.
pub(crate) fn abba<const N: usize>(
    blocks: usize,
    a: &mut dyn FnMut() -> anyhow::Result<[f64; N]>,
    b: &mut dyn FnMut() -> anyhow::Result<[f64; N]>,
) -> anyhow::Result<[Vec<Block>; N]> {
    let mut found = [const { Vec::new() }; N];
    a()?;
    b()?;
    for number in 0..blocks {
        let (a1, b1, b2, a2) = if number % 2 == 0 {
            (a()?, b()?, b()?, a()?)
        } else {
            let (b1, a1, a2, b2) = (b()?, a()?, a()?, b()?);
            (a1, b1, b2, a2)
        };
        for (index, blocks) in found.iter_mut().enumerate() {
            blocks.push(Block { a: [a1[index], a2[index]], b: [b1[index], b2[index]] });
        }
    }
    Ok(found)
}

/// How many events are to be expected at most, with a confidence of 95 %, where so many were seen: 3.0 for none. Of the
/// Poisson distribution, by the approximation of Wilson and Hilferty.
pub(crate) fn at_most(seen: usize) -> f64 {
    const Z: f64 = 1.645;
    let next = seen as f64 + 1.0;
    next * (1.0 - 1.0 / (9.0 * next) + Z / (3.0 * next.sqrt())).powi(3)
}

/// The median of some values, and between which limits it lies with a confidence of 95 %.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Interval {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Interval {
    /// By the bootstrap: values are drawn with replacement, and the medians of the draws tell how far it could have been
    /// another one. The draws are the same every time.
    pub(crate) fn of(values: &[f64]) -> Self {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut medians: Vec<f64> = (0..DRAWS)
            .map(|_| {
                let draw: Vec<f64> = values.iter().map(|_| values[random.below(values.len())]).collect();
                median(&draw)
            })
            .collect();
        medians.sort_by(f64::total_cmp);
        Self { median: median(values), low: quantile(&medians, 0.025), high: quantile(&medians, 0.975) }
    }
}

/// The value in the middle; of nothing not a number.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// The smallest value of a sorted list that at least this share of it does not exceed; of nothing not a number.
pub(crate) fn quantile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(f64::NAN)
}

/// Numbers without a pattern that matters here (xorshift64*).
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 33) as usize % limit.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_drift_cancels_in_a_block() {
        let mut clock = 10.0;
        let mut slot = |factor: f64| {
            clock += 1.0;
            clock * factor
        };
        let slot = std::cell::RefCell::new(&mut slot);
        let mut a = || Ok([(slot.borrow_mut())(1.0), 5.0]);
        let mut b = || Ok([(slot.borrow_mut())(3.0), 4.0]);
        let [drifting, steady] = abba(4, &mut a, &mut b).unwrap();
        assert_eq!(drifting.iter().map(Block::ratio).collect::<Vec<_>>(), [3.0; 4]);
        // The clock has struck twice before the first block; the second begins with the other.
        assert_eq!(drifting[0], Block { a: [13.0, 16.0], b: [42.0, 45.0] });
        assert_eq!(drifting[1], Block { a: [18.0, 19.0], b: [51.0, 60.0] });
        assert_eq!(steady.iter().map(Block::difference).collect::<Vec<_>>(), [-1.0; 4]);
    }

    #[test]
    fn being_first_or_after_a_rest_is_nobodys_advantage() {
        // Whoever has the first slot of a block is a tenth slower, whoever has the very first slots twice as slow.
        let slots = std::cell::Cell::new(0);
        let slot = || {
            let number = slots.replace(slots.get() + 1);
            Ok([if number < 2 {
                0.5
            } else if (number - 2) % 4 == 0 {
                0.9
            } else {
                1.0
            }])
        };
        let [blocks] = abba(20, &mut || slot(), &mut || slot()).unwrap();
        let Interval { median, low, high } =
            Interval::of(&blocks.iter().map(Block::ratio).collect::<Vec<_>>());
        assert!((median - 1.0).abs() < 0.01 && low < 1.0 && high > 1.0, "{low} {median} {high}");
    }

    #[test]
    fn medians_and_quantiles() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan() && quantile(&[], 0.5).is_nan());
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(
            [0.0, 0.5, 0.99, 0.999, 1.0].map(|q| quantile(&hundred, q)),
            [1.0, 50.0, 99.0, 100.0, 100.0]
        );
    }

    #[test]
    fn an_interval_holds_the_median_and_is_wide_where_values_are() {
        let narrow = Interval::of(&[1.0, 1.01, 0.99, 1.0, 1.02, 0.98]);
        let wide = Interval::of(&[1.0, 2.0, 0.5, 1.5, 0.8, 1.2]);
        for interval in [narrow, wide] {
            assert!(interval.low <= interval.median && interval.median <= interval.high, "{interval:?}");
        }
        assert!(narrow.high - narrow.low < 0.05 && wide.high - wide.low > 0.3);
        let one = Interval::of(&[7.0]);
        assert_eq!((one.median, one.low, one.high), (7.0, 7.0, 7.0));
        assert_eq!(wide, Interval::of(&[1.0, 2.0, 0.5, 1.5, 0.8, 1.2]), "the same every time");
    }

    #[test]
    fn what_was_seen_says_what_is_to_be_expected() {
        // From tables of the Poisson distribution: 3.00, 4.74, 6.30, 15.71 for 9.
        for (seen, limit) in [(0, 3.0), (1, 4.74), (2, 6.30), (9, 15.71)] {
            assert!((at_most(seen) - limit).abs() < 0.05, "{seen}: {}", at_most(seen));
        }
    }
}
