//! Which places of a map are used, and for what. Pure.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    ops::Range,
    time::{Duration, Instant},
};

/// How long a place is not used again: far longer than a program runs.
pub(super) const REST: Duration = Duration::from_secs(1);

/// No place is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

/// The places of a map, and for what they are used.
#[derive(Debug)]
pub(super) struct Pool<K> {
    all: Range<u32>,
    used: HashMap<K, Range<u32>>,
    /// Not used again before a while after this moment; `None`: in use until the next plan.
    resting: Vec<(Option<Instant>, Range<u32>)>,
}

/// Where something stands.
pub(super) struct Place {
    pub(super) first: u32,
    /// It must be written there.
    pub(super) new: bool,
}

impl<K: Clone + Eq + Hash> Pool<K> {
    pub(super) fn new(all: Range<u32>, in_use: impl Iterator<Item = Range<u32>>) -> Self {
        Self { all, used: HashMap::new(), resting: in_use.map(|range| (None, range)).collect() }
    }

    /// The place for this, which is `len` entries long: the one that it has, or a free one.
    pub(super) fn place(&mut self, key: &K, len: u32, now: Instant) -> Result<Place, Full> {
        if let Some(range) = self.used.get(key) {
            return Ok(Place { first: range.start, new: false });
        }
        self.resting.retain(|(since, _)| since.is_none_or(|since| now.duration_since(since) < REST));
        let mut taken: Vec<_> =
            self.used.values().chain(self.resting.iter().map(|(_, range)| range)).collect();
        taken.sort_by_key(|range| range.start);
        let mut first = self.all.start;
        for range in taken {
            if range.start.saturating_sub(first) >= len {
                break;
            }
            first = first.max(range.end);
        }
        if self.all.end.saturating_sub(first) < len {
            return Err(Full);
        }
        self.used.insert(key.clone(), first..first + len);
        Ok(Place { first, new: true })
    }

    /// Frees all places that are not used for one of these.
    pub(super) fn keep(&mut self, keys: &HashSet<K>, now: Instant) {
        for (since, _) in &mut self.resting {
            since.get_or_insert(now);
        }
        let resting = &mut self.resting;
        self.used.retain(|key, range| {
            let keep = keys.contains(key);
            if !keep {
                resting.push((Some(now), range.clone()));
            }
            keep
        });
    }
}
