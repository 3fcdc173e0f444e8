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

/// [`SessionRecord::due`] of a connection that is to be called no more, and of one that was called and has not noticed.
const NEVER: u64 = u64::MAX;
const FIRED: u64 = 0;

/// The connections of a worker. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct SessionRegistry(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    next: AtomicU64,
    records: Mutex<HashMap<u64, Arc<SessionRecord>>>,
}

#[derive(Debug)]
struct SessionRecord {
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
pub struct Registration {
    registry: SessionRegistry,
    id: u64,
    record: Arc<SessionRecord>,
}

/// What a connection counts its payload by, and is called by the clock.
#[derive(Debug)]
pub struct SessionHandle(Arc<SessionRecord>);

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

impl SessionRegistry {
    /// Adds a connection.
    #[must_use]
    pub fn register(
        &self,
        listener: &Arc<str>,
        engine: &'static str,
        client: SocketAddr,
        local: SocketAddr,
    ) -> Registration {
        let record = Arc::new(SessionRecord {
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
        self.records().insert(id, Arc::clone(&record));
        Registration { registry: self.clone(), id, record }
    }

    /// All there are, in no order.
    #[must_use]
    pub fn snapshot(&self) -> Vec<Snapshot> {
        // The rows are read after the lock is given back: whoever looks must not hold up who comes and goes.
        let records: Vec<_> = self.records().values().cloned().collect();
        let snapshot = |record: Arc<SessionRecord>| Snapshot {
            listener: Arc::clone(&record.listener),
            engine: record.engine,
            client: record.client,
            local: record.local,
            age: record.since.elapsed(),
            backend: record.backend.get().copied(),
            to_backend: record.to_backend.load(Ordering::Relaxed),
            to_client: record.to_client.load(Ordering::Relaxed),
        };
        records.into_iter().map(snapshot).collect()
    }

    /// Calls connections that are due, until it is dropped.
    pub async fn run_timer(&self) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let now = monotonic_ns();
            self.wake(|due| due <= now);
        }
    }

    /// Calls all connections.
    pub fn wake_all(&self) {
        self.wake(|_| true);
    }

    fn wake(&self, is_due: impl Fn(u64) -> bool) {
        let fire = |record: &Arc<SessionRecord>| {
            if !is_due(record.due.load(Ordering::Relaxed)) {
                return None;
            }
            record.due.store(FIRED, Ordering::Release);
            record.task.take()
        };
        // They are woken after the lock is given back: who is woken may end at once.
        let woken: Vec<_> = self.records().values().filter_map(fire).collect();
        woken.into_iter().for_each(std::task::Waker::wake);
    }

    fn records(&self) -> MutexGuard<'_, HashMap<u64, Arc<SessionRecord>>> {
        self.0.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registration {
    /// It has a backend.
    pub fn set_backend(&self, backend: SocketAddr) {
        // Once in its life.
        let _ = self.record.backend.set(backend);
    }

    /// The client.
    #[must_use]
    pub fn client(&self) -> SocketAddr {
        self.record.client
    }

    /// Where it connected to.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.record.local
    }

    /// Once one was reached.
    #[must_use]
    pub fn backend(&self) -> Option<SocketAddr> {
        self.record.backend.get().copied()
    }

    /// Since it was accepted.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.record.since.elapsed()
    }

    /// For who carries it.
    #[must_use]
    pub fn handle(&self) -> SessionHandle {
        SessionHandle(Arc::clone(&self.record))
    }
}

impl SessionHandle {
    /// To be called after so long, or up to a quarter of a second later; what was said before is forgotten, but not that it
    /// was called.
    pub fn schedule(&self, delay: Duration) {
        let delay = u64::try_from(delay.as_nanos()).unwrap_or(NEVER);
        let due = monotonic_ns().saturating_add(delay);
        let unless_fired = |before| (before != FIRED).then_some(due);
        // Called already: then that stays.
        let _ = self.0.due.fetch_update(Ordering::Relaxed, Ordering::Relaxed, unless_fired);
    }

    /// Whether it has been called.
    pub fn poll_timer(&self, task: &mut Context<'_>) -> Poll<()> {
        // Registered before the look: a call in between is not missed.
        self.0.task.register(task.waker());
        match self.0.due.compare_exchange(FIRED, NEVER, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => Poll::Ready(()),
            Err(_) => Poll::Pending,
        }
    }

    /// So much payload has passed so far.
    pub fn set_bytes(&self, to_backend: u64, to_client: u64) {
        self.0.to_backend.store(to_backend, Ordering::Relaxed);
        self.0.to_client.store(to_client, Ordering::Relaxed);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.registry.records().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[test]
    fn a_connection_is_listed_until_it_ends() {
        let registry = SessionRegistry::default();
        let [client, local, backend] =
            ["192.0.2.1:40000", "192.0.2.10:25", "10.0.0.2:2525"].map(|text| text.parse().unwrap());
        let (one, other) = (
            registry.register(&"smtp".into(), "relay", client, local),
            registry.register(&"imap".into(), "relay", client, local),
        );
        one.set_backend(backend);
        one.handle().set_bytes(7, 9);
        let mut records = registry.snapshot();
        records.sort_by(|one, other| other.listener.cmp(&one.listener));
        assert_eq!(
            (&*records[0].listener, records[0].backend, records[0].to_backend, records[0].to_client),
            ("smtp", Some(backend), 7, 9)
        );
        assert_eq!((&*records[1].listener, records[1].backend), ("imap", None));
        drop(other);
        assert_eq!(registry.snapshot().len(), 1);
        drop(one);
        assert_eq!(registry.snapshot(), []);
    }

    #[tokio::test]
    async fn the_clock_calls_who_is_due_and_a_call_is_not_lost() {
        let registry = SessionRegistry::default();
        let [client, local] = ["192.0.2.1:40000", "192.0.2.10:25"].map(|text| text.parse().unwrap());
        let entries = ["soon", "later"].map(|name| registry.register(&name.into(), "relay", client, local));
        let [soon, later] = entries.each_ref().map(Registration::handle);
        soon.schedule(Duration::from_millis(1));
        later.schedule(Duration::from_secs(3600));
        let woken = poll_fn(|task| {
            assert_eq!(later.poll_timer(task), Poll::Pending);
            soon.poll_timer(task)
        });
        tokio::select! {
            () = woken => {}
            () = registry.run_timer() => {}
        }
        // Called while nobody waits, and then told a time: the call counts.
        registry.wake_all();
        later.schedule(Duration::from_secs(3600));
        poll_fn(|task| later.poll_timer(task)).await;
        poll_fn(|task| {
            assert_eq!(later.poll_timer(task), Poll::Pending, "once");
            Poll::Ready(())
        })
        .await;
    }
}
