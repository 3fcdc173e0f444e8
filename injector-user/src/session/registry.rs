//! Which connections there are now, for `injector sessions`, and the clock that all connections of a worker go by: one table for
//! each worker, so that threads do not wait for each other.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use atomic_waker::AtomicWaker;
use tokio::time::MissedTickBehavior;

use crate::os::clock::monotonic_ns;

/// How late a call may come. What connections are called for is told in seconds; a timer for each would take more memory than
/// anything else of an idle connection, and more time than is left in a short one.
const TICK: Duration = Duration::from_millis(250);

/// [`Row::due`] of a connection that is to be called no more, and of one that was called and has not noticed.
const NEVER: u64 = u64::MAX;
const CALLED: u64 = 0;

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
    /// When the connection is to be called, `CLOCK_MONOTONIC`, in nanoseconds.
    due: AtomicU64,
    task: AtomicWaker,
}

/// A connection's row, until it is dropped. What is known of a connection stands there alone.
#[derive(Debug)]
pub struct Entry {
    table: Table,
    id: u64,
    row: Arc<Row>,
}

/// What a connection counts its payload by, and is called by the clock.
#[derive(Debug)]
pub struct Handle(Arc<Row>);

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
            due: AtomicU64::new(NEVER),
            task: AtomicWaker::new(),
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

    /// Calls connections that are due, until it is dropped.
    pub async fn keep_time(&self) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let now = monotonic_ns();
            self.call(|due| due <= now);
        }
    }

    /// Calls all connections.
    pub fn call_all(&self) {
        self.call(|_| true);
    }

    fn call(&self, is_due: impl Fn(u64) -> bool) {
        let call = |row: &Arc<Row>| {
            if !is_due(row.due.load(Ordering::Relaxed)) {
                return None;
            }
            row.due.store(CALLED, Ordering::Release);
            row.task.take()
        };
        // They are woken after the lock is given back: who is woken may end at once.
        let called: Vec<_> = self.rows().values().filter_map(call).collect();
        called.into_iter().for_each(std::task::Waker::wake);
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

    /// For who carries it.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.row))
    }
}

impl Handle {
    /// To be called after so long, or up to a quarter of a second later; what was said before is forgotten, but not that it
    /// was called.
    pub fn call_in(&self, delay: Duration) {
        let delay = u64::try_from(delay.as_nanos()).unwrap_or(NEVER);
        let due = monotonic_ns().saturating_add(delay);
        let unless_called = |before| (before != CALLED).then_some(due);
        // Called already: then that stays.
        let _ = self.0.due.fetch_update(Ordering::Relaxed, Ordering::Relaxed, unless_called);
    }

    /// Whether it has been called.
    pub fn poll_called(&self, task: &mut Context<'_>) -> Poll<()> {
        // Registered before the look: a call in between is not missed.
        self.0.task.register(task.waker());
        match self.0.due.compare_exchange(CALLED, NEVER, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => Poll::Ready(()),
            Err(_) => Poll::Pending,
        }
    }

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
    use std::future::poll_fn;

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
        one.handle().carried(7, 9);
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

    #[tokio::test]
    async fn the_clock_calls_who_is_due_and_a_call_is_not_lost() {
        let table = Table::default();
        let [client, local] = ["192.0.2.1:40000", "192.0.2.10:25"].map(|text| text.parse().unwrap());
        let entries = ["soon", "later"].map(|name| table.add(&name.into(), "relay", client, local));
        let [soon, later] = entries.each_ref().map(Entry::handle);
        soon.call_in(Duration::from_millis(1));
        later.call_in(Duration::from_secs(3600));
        let called = poll_fn(|task| {
            assert_eq!(later.poll_called(task), Poll::Pending);
            soon.poll_called(task)
        });
        tokio::select! {
            () = called => {}
            () = table.keep_time() => {}
        }
        // Called while nobody waits, and then told a time: the call counts.
        table.call_all();
        later.call_in(Duration::from_secs(3600));
        poll_fn(|task| later.poll_called(task)).await;
        poll_fn(|task| {
            assert_eq!(later.poll_called(task), Poll::Pending, "once");
            Poll::Ready(())
        })
        .await;
    }
}
