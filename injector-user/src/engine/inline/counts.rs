//! The counts of connections that the program and the daemon share in memory.

use std::{
    collections::BTreeMap,
    mem::offset_of,
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use injector_common::inline::Usage;

use super::{maps::Maps, places::Places};
use crate::engine::usage::UsageCounts;

/// The counts of one listener, which may have several places: see [`super::places`].
#[derive(Debug)]
pub(super) struct ListenerCounts {
    maps: Arc<Maps>,
    /// A bit for each place, the lowest one for place 1.
    places: AtomicU64,
    sessions: AtomicU32,
    limit: AtomicU32,
    /// What was accepted on former places, less what others had accepted on the present ones;
    /// modulo 2^64.
    accepted_before: AtomicU64,
}

const _: () = assert!(Usage::COUNT - 1 == u64::BITS);

fn mask(places: &[u32]) -> u64 {
    places.iter().filter(|id| (1..Usage::COUNT).contains(*id)).fold(0, |mask, id| mask | 1 << (id - 1))
}

fn ids(mask: u64) -> impl Iterator<Item = u32> {
    (1..Usage::COUNT).filter(move |id| mask & 1 << (id - 1) != 0)
}

impl ListenerCounts {
    /// The counts of a listener with these places.
    pub(super) fn new(maps: &Arc<Maps>, places: &[u32]) -> Self {
        Self {
            maps: Arc::clone(maps),
            places: AtomicU64::new(mask(places)),
            sessions: AtomicU32::new(0),
            limit: AtomicU32::new(0),
            accepted_before: AtomicU64::new(0),
        }
    }

    fn places(&self) -> impl Iterator<Item = u32> + use<> {
        ids(self.places.load(Ordering::Acquire))
    }
}

impl UsageCounts for ListenerCounts {
    fn established(&self) -> u32 {
        let count = |id| load(&self.maps, id, offset_of!(Usage, established));
        self.places().map(count).fold(0, u32::saturating_add)
    }

    fn accepted(&self) -> u64 {
        let before = self.accepted_before.load(Ordering::Relaxed);
        self.places().map(|id| self.maps.usage(id).accepted).fold(before, u64::wrapping_add)
    }

    fn add_session(&self) {
        self.sessions.fetch_add(1, Ordering::Relaxed);
        self.places().for_each(|id| add_session(&self.maps, id));
    }

    fn remove_session(&self) {
        self.sessions.fetch_sub(1, Ordering::Relaxed);
        self.places().for_each(|id| remove_session(&self.maps, id));
    }

    fn set_limit(&self, limit: u32) {
        self.limit.store(limit, Ordering::Relaxed);
        self.places().for_each(|id| set_limit(&self.maps, id, limit));
    }
}

/// The counts of all listeners.
#[derive(Debug)]
pub(super) struct TotalCounts(Arc<Maps>);

impl TotalCounts {
    pub(super) fn new(maps: &Arc<Maps>) -> Self {
        Self(Arc::clone(maps))
    }
}

impl UsageCounts for TotalCounts {
    fn established(&self) -> u32 {
        load(&self.0, Usage::ALL, offset_of!(Usage, established))
    }

    fn accepted(&self) -> u64 {
        self.0.usage(Usage::ALL).accepted
    }

    fn add_session(&self) {
        add_session(&self.0, Usage::ALL);
    }

    fn remove_session(&self) {
        remove_session(&self.0, Usage::ALL);
    }

    fn set_limit(&self, limit: u32) {
        set_limit(&self.0, Usage::ALL, limit);
    }
}

/// Sets the limit of a listener, or of all.
pub(super) fn set_limit(maps: &Maps, id: u32, limit: u32) {
    store(maps, id, offset_of!(Usage, limit), limit);
}

fn load(maps: &Maps, id: u32, offset: usize) -> u32 {
    maps.usage_field(id, offset).map_or(0, |count| count.load(Ordering::Relaxed))
}

fn store(maps: &Maps, id: u32, offset: usize, value: u32) {
    if let Some(count) = maps.usage_field(id, offset) {
        count.store(value, Ordering::Relaxed);
    }
}

fn add_session(maps: &Maps, id: u32) {
    if let Some(count) = maps.usage_field(id, offset_of!(Usage, sessions)) {
        count.fetch_add(1, Ordering::Relaxed);
    }
}

fn remove_session(maps: &Maps, id: u32) {
    if let Some(count) = maps.usage_field(id, offset_of!(Usage, sessions)) {
        // Never below zero, which would be above every limit.
        let less = |sessions: u32| Some(sessions.saturating_sub(1));
        let _ = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }
}

/// Clears the counts of sessions of an earlier daemon. Its limits hold until this one sets its own, so that
/// the program goes on opening connections.
pub(super) fn clear_sessions(maps: &Maps) {
    for id in 0..Usage::COUNT {
        store(maps, id, offset_of!(Usage, sessions), 0);
    }
}

/// Makes the counts of each listener, by name, those of all its places. Connections on a former
/// place use up the limit of the present one.
pub(super) fn sync(maps: &Maps, places: &Places, counted: &BTreeMap<String, Weak<ListenerCounts>>) {
    for (name, usage) in counted {
        let Some(usage) = usage.upgrade() else { continue };
        let ids_of_name = places.of(name);
        let established = |id: &u32| load(maps, *id, offset_of!(Usage, established));
        let all = ids_of_name.iter().map(established).fold(0, u32::saturating_add);
        let (sessions, limit) = (usage.sessions.load(Ordering::Relaxed), usage.limit.load(Ordering::Relaxed));
        for id in &ids_of_name {
            let others = all.saturating_sub(established(id));
            store(maps, *id, offset_of!(Usage, sessions), sessions);
            let limit = if limit == u32::MAX { limit } else { limit.saturating_sub(others) };
            set_limit(maps, *id, limit);
        }
        let (before, now) = (usage.places.load(Ordering::Relaxed), mask(&ids_of_name));
        if before != now {
            let accepted = |id: u32| maps.usage(id).accepted;
            let left = ids(before & !now).map(accepted).fold(0, u64::wrapping_add);
            let joined = ids(now & !before).map(accepted).fold(0, u64::wrapping_add);
            usage.accepted_before.fetch_add(left.wrapping_sub(joined), Ordering::Relaxed);
            usage.places.store(now, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_has_a_bit() {
        assert_eq!((mask(&[1]), mask(&[64]), mask(&[1, 3])), (1, 1 << 63, 5));
        assert_eq!(mask(&[0, 65]), 0);
        assert_eq!(mask(&(1..=64).collect::<Vec<_>>()), u64::MAX);
        assert_eq!(ids(mask(&[1, 7, 64])).collect::<Vec<_>>(), [1, 7, 64]);
    }
}
