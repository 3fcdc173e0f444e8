//! The counts of connections that the program and the daemon share in memory.

use std::{
    collections::BTreeMap,
    mem::offset_of,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use injector_common::{
    guard::{Rate, SourceCounts, SourceLimits},
    inline::Usage,
};

use super::{maps::Maps, places::Places};
use crate::{
    config::Network,
    engine::{bpf::lock, usage::UsageCounts},
};

/// The counts of one listener, which may have several places: see [`super::places`].
#[derive(Debug)]
pub(super) struct ListenerCounts {
    maps: Arc<Maps>,
    /// A bit for each place, the lowest one for place 1.
    places: AtomicU64,
    sessions: AtomicU32,
    limit: AtomicU32,
    source_limits: Mutex<SourceLimits>,
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
            source_limits: Mutex::default(),
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

    fn set_source_limits(&self, limits: SourceLimits, _: [u8; 2]) {
        *lock(&self.source_limits) = limits;
        self.places().for_each(|id| set_source_limits(&self.maps, id, limits));
    }

    fn of_source(&self, source: Network) -> (SourceCounts, Rate) {
        let add = |(all, rate): (SourceCounts, Rate), (counts, of_place): (SourceCounts, Rate)| {
            let pending = all.pending.saturating_add(counts.pending);
            let established = all.established.saturating_add(counts.established);
            let arrival_ns = rate.arrival_ns.max(of_place.arrival_ns);
            (SourceCounts { pending, established, sessions: 0 }, Rate { arrival_ns })
        };
        self.places().map(|id| self.maps.by_source.read(source, id)).fold(Default::default(), add)
    }

    fn set_sessions_of_source(&self, source: Network, sessions: u32) {
        self.maps.by_source.set_sessions(source, sessions, || self.places());
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

    fn set_source_limits(&self, limits: SourceLimits, prefixes: [u8; 2]) {
        set_source_limits(&self.0, Usage::ALL, limits);
        self.0.set_source_prefixes(prefixes);
    }

    fn of_source(&self, source: Network) -> (SourceCounts, Rate) {
        self.0.by_source.read(source, Usage::ALL)
    }

    fn set_sessions_of_source(&self, source: Network, sessions: u32) {
        self.0.by_source.set_sessions(source, sessions, || [Usage::ALL]);
    }
}

/// Sets the limit of a listener, or of all.
pub(super) fn set_limit(maps: &Maps, id: u32, limit: u32) {
    store(maps, id, offset_of!(Usage, limit), limit);
}

/// Sets the limits on each source of a listener, or of all.
fn set_source_limits(maps: &Maps, id: u32, limits: SourceLimits) {
    const AT: usize = offset_of!(Usage, source_limits);

    maps.set_usage_word(id, AT + offset_of!(SourceLimits, interval_ns), limits.interval_ns);
    store(maps, id, AT + offset_of!(SourceLimits, connections), limits.connections);
    store(maps, id, AT + offset_of!(SourceLimits, burst), limits.burst);
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
    maps.by_source.clear_sessions();
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
            set_source_limits(maps, *id, *lock(&usage.source_limits));
        }
        let (before, now) = (usage.places.load(Ordering::Relaxed), mask(&ids_of_name));
        if before != now {
            let accepted = |id: u32| maps.usage(id).accepted;
            let left = ids(before & !now).map(accepted).fold(0, u64::wrapping_add);
            let joined = ids(now & !before).map(accepted).fold(0, u64::wrapping_add);
            usage.accepted_before.fetch_add(left.wrapping_sub(joined), Ordering::Relaxed);
            let (left, joined) =
                (ids(before & !now).collect::<Vec<_>>(), ids(now & !before).collect::<Vec<_>>());
            let switch = || usage.places.store(now, Ordering::Release);
            maps.by_source.move_sessions(ids(before).next(), &joined, &left, switch);
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
