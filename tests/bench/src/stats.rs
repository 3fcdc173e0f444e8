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
    fn without_a_pair_there_is_no_ratio() {
        assert_eq!(ratio(&[(0, 1.0)], &[(1, 1.0)]), None);
        assert_eq!(ratio(&[(0, 1.0)], &[(0, 0.0)]), None, "of nothing");
    }
}
