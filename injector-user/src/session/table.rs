//! Which connections there are now, for `injector sessions`: one table for each worker, so that threads do not wait for each
//! other.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// The connections of a worker. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Table(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    next: AtomicU64,
    rows: Mutex<HashMap<u64, Arc<Row>>>,
}

#[derive(Debug)]
struct Row {
    listener: Arc<str>,
    engine: &'static str,
    client: SocketAddr,
    local: SocketAddr,
    since: Instant,
    backend: OnceLock<SocketAddr>,
    to_backend: AtomicU64,
    to_client: AtomicU64,
}

/// A connection's row, until it is dropped. What is known of a connection stands there alone.
#[derive(Debug)]
pub struct Entry {
    table: Table,
    id: u64,
    row: Arc<Row>,
}

/// Counts a connection's payload.
#[derive(Debug)]
pub struct Meter(Arc<Row>);

/// What is known of a connection now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The listener's name.
    pub listener: Arc<str>,
    /// The engine's name.
    pub engine: &'static str,
    /// The client.
    pub client: SocketAddr,
    /// Where it connected to.
    pub local: SocketAddr,
    /// Since it was accepted.
    pub age: Duration,
    /// Once one was reached.
    pub backend: Option<SocketAddr>,
    /// Payload, as last counted: at the first byte of the backend, and then every few seconds.
    pub to_backend: u64,
    /// The other way.
    pub to_client: u64,
}

impl Table {
    /// Adds a connection.
    #[must_use]
    pub fn add(
        &self,
        listener: &Arc<str>,
        engine: &'static str,
        client: SocketAddr,
        local: SocketAddr,
    ) -> Entry {
        let row = Arc::new(Row {
            listener: Arc::clone(listener),
            engine,
            client,
            local,
            since: Instant::now(),
            backend: OnceLock::new(),
            to_backend: AtomicU64::new(0),
            to_client: AtomicU64::new(0),
        });
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        self.rows().insert(id, Arc::clone(&row));
        Entry { table: self.clone(), id, row }
    }

    /// All there are, in no order.
    #[must_use]
    pub fn snapshot(&self) -> Vec<Snapshot> {
        // The rows are read after the lock is given back: whoever looks must not hold up who comes and goes.
        let rows: Vec<_> = self.rows().values().cloned().collect();
        let snapshot = |row: Arc<Row>| Snapshot {
            listener: Arc::clone(&row.listener),
            engine: row.engine,
            client: row.client,
            local: row.local,
            age: row.since.elapsed(),
            backend: row.backend.get().copied(),
            to_backend: row.to_backend.load(Ordering::Relaxed),
            to_client: row.to_client.load(Ordering::Relaxed),
        };
        rows.into_iter().map(snapshot).collect()
    }

    fn rows(&self) -> MutexGuard<'_, HashMap<u64, Arc<Row>>> {
        self.0.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    /// It has a backend.
    pub fn reached(&self, backend: SocketAddr) {
        // Once in its life.
        let _ = self.row.backend.set(backend);
    }

    /// The client.
    #[must_use]
    pub fn client(&self) -> SocketAddr {
        self.row.client
    }

    /// Where it connected to.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.row.local
    }

    /// Once one was reached.
    #[must_use]
    pub fn backend(&self) -> Option<SocketAddr> {
        self.row.backend.get().copied()
    }

    /// Since it was accepted.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.row.since.elapsed()
    }

    /// What its payload is counted by.
    #[must_use]
    pub fn meter(&self) -> Meter {
        Meter(Arc::clone(&self.row))
    }
}

impl Meter {
    /// So much payload has passed so far.
    pub fn carried(&self, to_backend: u64, to_client: u64) {
        self.0.to_backend.store(to_backend, Ordering::Relaxed);
        self.0.to_client.store(to_client, Ordering::Relaxed);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.table.rows().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_listed_until_it_ends() {
        let table = Table::default();
        let [client, local, backend] =
            ["192.0.2.1:40000", "192.0.2.10:25", "10.0.0.2:2525"].map(|text| text.parse().unwrap());
        let (one, other) = (
            table.add(&"smtp".into(), "relay", client, local),
            table.add(&"imap".into(), "relay", client, local),
        );
        one.reached(backend);
        one.meter().carried(7, 9);
        let mut rows = table.snapshot();
        rows.sort_by(|one, other| other.listener.cmp(&one.listener));
        assert_eq!(
            (&*rows[0].listener, rows[0].backend, rows[0].to_backend, rows[0].to_client),
            ("smtp", Some(backend), 7, 9)
        );
        assert_eq!((&*rows[1].listener, rows[1].backend), ("imap", None));
        drop(other);
        assert_eq!(table.snapshot().len(), 1);
        drop(one);
        assert_eq!(table.snapshot(), []);
    }
}
