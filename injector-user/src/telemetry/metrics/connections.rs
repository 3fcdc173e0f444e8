//! Connections that no session counts, because the kernel forwards their packets: read at every
//! scrape.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, PoisonError},
};

use super::{
    families::Families,
    labels::{ListenerLabels, ServedLabels},
};

/// The connections of a listener at a scrape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionCounts {
    /// Open connections.
    pub active: u64,
    /// Connections so far, including those before the daemon started.
    pub accepted: u64,
}

type Read = Box<dyn Fn() -> ConnectionCounts + Send + Sync>;

/// The sources by listener and engine.
#[derive(Default)]
pub(super) struct ConnectionSources(Mutex<BTreeMap<(String, &'static str), Source>>);

struct Source {
    read: Read,
    /// How many accepted connections have been counted.
    accepted: u64,
    /// The listener was removed: drop the source with its last connection.
    removed: bool,
}

impl ConnectionSources {
    /// Adds a source, or replaces it.
    pub(super) fn watch(&self, listener: &str, engine: &'static str, read: Read) {
        let accepted = read().accepted;
        let source = Source { read, accepted, removed: false };
        self.sources().insert((listener.to_owned(), engine), source);
    }

    /// Drops the sources of a listener once it has no connection left.
    pub(super) fn forget(&self, listener: &str) {
        for ((_, _), source) in self.sources().iter_mut().filter(|((name, _), _)| name == listener) {
            source.removed = true;
        }
    }

    /// Brings the metrics up to date.
    pub(super) fn refresh(&self, families: &Families) {
        self.sources().retain(|(listener, engine), source| {
            let now = (source.read)();
            let plain = ListenerLabels { listener: listener.as_str().into() };
            let served = ServedLabels { listener: listener.as_str().into(), engine };
            families.accepted.get_or_create(&plain).inc_by(now.accepted.saturating_sub(source.accepted));
            families.active.get_or_create(&served).set(i64::try_from(now.active).unwrap_or(i64::MAX));
            source.accepted = now.accepted;
            now.active > 0 || !source.removed
        });
    }

    fn sources(&self) -> std::sync::MutexGuard<'_, BTreeMap<(String, &'static str), Source>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for ConnectionSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionSources").finish_non_exhaustive()
    }
}
