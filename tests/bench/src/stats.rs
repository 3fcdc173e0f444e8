//! Medians, spread, and ratios pair by pair.
//!
//! A virtual machine's speed changes from minute to minute. Measurements of one repeat are close
//! together in time, so a ratio is taken within each repeat, and the median of these ratios is
//! reported.

/// A median with the smallest and the largest value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle value, or the mean of the two middle values.
    pub median: f64,
    /// The smallest value.
    pub min: f64,
    /// The largest value.
    pub max: f64,
}

impl Spread {
    /// `None` if there are no values.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let upper = sorted.len() / 2;
        let lower = (sorted.len() - 1) / 2;
        let median = f64::midpoint(*sorted.get(lower)?, *sorted.get(upper)?);
        Some(Self { median, min, max })
    }

    /// Half the distance from min to max, as a share of the median: 0.05 reads as "± 5 %".
    #[must_use]
    pub fn half_width(&self) -> f64 {
        if self.median == 0.0 { 0.0 } else { (self.max - self.min) / 2.0 / self.median.abs() }
    }
}

/// A median with the interval that contains what it estimates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The median of the values.
    pub median: f64,
    /// From here
    pub low: f64,
    /// to here: the interval that contains the true median with a probability of 95 %, or, with
    /// too few values for that, all values.
    pub high: f64,
    /// Whether there were values enough.
    pub confident: bool,
}

impl Estimate {
    /// `None` if there are no values.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        let Spread { median, min, max } = Spread::of(values)?;
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let without = outside_of_interval(sorted.len());
        let (low, high) = match without.and_then(|without| sorted.get(without..sorted.len() - without)) {
            Some([low, .., high]) => (*low, *high),
            _ => (min, max),
        };
        Some(Self { median, low, high, confident: without.is_some() })
    }
}

/// How many of so many sorted values may be left out at each end so that the rest spans the median
/// of what they were drawn from with a probability of at least 95 %, whatever its distribution; `None`
/// if even all of them do not. Each value is above that median with a probability of one half (sign
/// test).
fn outside_of_interval(count: usize) -> Option<usize> {
    const TAIL: f64 = 0.025;
    // The probability that exactly `left` values are below the median.
    let mut exactly = 0.5_f64.powi(i32::try_from(count).ok()?);
    let (mut at_most, mut left) = (exactly, 0_usize);
    if at_most > TAIL {
        return None;
    }
    loop {
        #[expect(clippy::cast_precision_loss, reason = "repeats")]
        let factor = (count - left) as f64 / (left + 1) as f64;
        exactly *= factor;
        if at_most + exactly > TAIL {
            return Some(left);
        }
        (at_most, left) = (at_most + exactly, left + 1);
    }
}

/// A value of one repeat.
pub type Sample = (usize, f64);

/// `combine(ours, theirs)` within each repeat that has both.
#[must_use]
pub fn pairwise(ours: &[Sample], theirs: &[Sample], combine: impl Fn(f64, f64) -> f64) -> Option<Spread> {
    let partner = |repeat| theirs.iter().find(|(other, _)| *other == repeat).map(|(_, value)| *value);
    let combined: Vec<f64> = ours
        .iter()
        .filter_map(|(repeat, value)| partner(*repeat).map(|other| combine(*value, other)))
        .filter(|value| value.is_finite())
        .collect();
    Spread::of(&combined)
}

/// The ratio to a reference.
#[must_use]
pub fn ratio(ours: &[Sample], theirs: &[Sample]) -> Option<Spread> {
    pairwise(ours, theirs, |ours, theirs| ours / theirs)
}

/// The difference to a reference.
#[must_use]
pub fn above(ours: &[Sample], theirs: &[Sample]) -> Option<Spread> {
    pairwise(ours, theirs, |ours, theirs| ours - theirs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(left: f64, right: f64) -> bool {
        (left - right).abs() < 1e-9
    }

    #[test]
    fn medians_of_odd_and_even_counts() {
        assert_eq!(Spread::of(&[]), None);
        let odd = Spread::of(&[3.0, 1.0, 2.0]).unwrap();
        assert!(near(odd.median, 2.0) && near(odd.min, 1.0) && near(odd.max, 3.0));
        assert!(near(odd.half_width(), 0.5));
        assert!(near(Spread::of(&[4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5));
        assert!(near(Spread::of(&[7.0]).unwrap().half_width(), 0.0));
    }

    #[test]
    fn ratios_are_taken_within_a_repeat() {
        // The machine was twice as slow in repeat 1; in repeat 2 one of them failed.
        let ours = [(0, 150.0), (1, 75.0), (3, 160.0)];
        let theirs = [(0, 100.0), (1, 50.0), (2, 100.0), (3, 100.0)];
        let ratio = ratio(&ours, &theirs).unwrap();
        assert!(near(ratio.median, 1.5) && near(ratio.min, 1.5) && near(ratio.max, 1.6));
        assert!(near(above(&ours, &theirs).unwrap().max, 60.0));
    }

    #[test]
    fn the_interval_leaves_out_what_the_sign_test_allows() {
        // Tables of the sign test, two-sided, 5 %.
        let table = [(5, None), (6, Some(0)), (8, Some(0)), (9, Some(1)), (15, Some(3)), (30, Some(9))];
        for (count, left_out) in table {
            assert_eq!(outside_of_interval(count), left_out, "{count}");
        }
        assert_eq!(outside_of_interval(0), None);
    }

    #[test]
    fn an_estimate_has_an_interval_once_there_are_values_enough() {
        let values: Vec<f64> = (0_u8..15).map(f64::from).collect();
        let estimate = Estimate::of(&values).unwrap();
        assert!(near(estimate.median, 7.0) && estimate.confident, "{estimate:?}");
        assert!(near(estimate.low, 3.0) && near(estimate.high, 11.0), "{estimate:?}");
        let few = Estimate::of(&values[..3]).unwrap();
        assert!(near(few.low, 0.0) && near(few.high, 2.0) && !few.confident, "{few:?}");
        assert_eq!(Estimate::of(&[]), None);
    }

    #[test]
    fn without_a_pair_there_is_no_ratio() {
        assert_eq!(ratio(&[(0, 1.0)], &[(1, 1.0)]), None);
        assert_eq!(ratio(&[(0, 1.0)], &[(0, 0.0)]), None, "of nothing");
    }
}
