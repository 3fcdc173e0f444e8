//! The open sessions of a worker, for `injector sessions` and for the timers of all sessions. Each
//! worker has its own registry, so that threads do not wait for each other.

use std::{
    collections::HashMap,
    future::poll_fn,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use tokio::time::MissedTickBehavior;

use super::timer::{SessionTimer, TICK};
use crate::os::clock::monotonic_ns;

/// The number of the next session, of all workers.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// The sessions of a worker. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct SessionRegistry(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    records: Mutex<HashMap<u64, Arc<SessionRecord>>>,
}

#[derive(Debug)]
struct SessionRecord {
    id: u64,
    listener: Arc<str>,
    engine: &'static str,
    client: SocketAddr,
    local: SocketAddr,
    since: Instant,
    backend: OnceLock<SocketAddr>,
    to_backend: AtomicU64,
    to_client: AtomicU64,
    /// The operator has ended it.
    ended: AtomicBool,
    timer: SessionTimer,
}

/// A session's place in the registry, until it is dropped. It holds the only copy of the session's
/// addresses.
#[derive(Debug)]
pub struct Registration {
    registry: SessionRegistry,
    record: Arc<SessionRecord>,
}

/// The part of a registration that the forwarding of the session uses.
#[derive(Debug)]
pub struct SessionHandle(Arc<SessionRecord>);

/// What is known of a session now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its number, of all sessions since the start of the daemon.
    pub id: u64,
    /// The listener's name.
    pub listener: Arc<str>,
    /// The engine's name.
    pub engine: &'static str,
    /// The client's address.
    pub client: SocketAddr,
    /// The address that the client connected to.
    pub local: SocketAddr,
    /// Time since the client was accepted.
    pub age: Duration,
    /// The backend's address, once it is connected.
    pub backend: Option<SocketAddr>,
    /// Payload bytes to the backend. Updated at the backend's first byte and then every few
    /// seconds.
    pub to_backend: u64,
    /// Payload bytes to the client, updated at the same times.
    pub to_client: u64,
}

impl SessionRegistry {
    /// Adds a session.
    #[must_use]
    pub fn register(
        &self,
        listener: &Arc<str>,
        engine: &'static str,
        client: SocketAddr,
        local: SocketAddr,
    ) -> Registration {
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let record = Arc::new(SessionRecord {
            id,
            listener: Arc::clone(listener),
            engine,
            client,
            local,
            since: Instant::now(),
            backend: OnceLock::new(),
            to_backend: AtomicU64::new(0),
            to_client: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            timer: SessionTimer::new(),
        });
        self.records().insert(id, Arc::clone(&record));
        Registration { registry: self.clone(), record }
    }

    /// All sessions, in no order.
    #[must_use]
    pub fn snapshot(&self) -> Vec<Snapshot> {
        // The records are read without the lock: a reader must not delay sessions that start or
        // end.
        let records: Vec<_> = self.records().values().cloned().collect();
        let snapshot = |record: Arc<SessionRecord>| Snapshot {
            id: record.id,
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

    /// Ends these sessions, by number, client and listener. Returns how many there are.
    pub fn end(&self, which: impl Fn(u64, SocketAddr, &str) -> bool) -> usize {
        let all: Vec<_> = self.records().values().cloned().collect();
        let chosen = all.iter().filter(|record| which(record.id, record.client, &record.listener));
        let end = |record: &Arc<SessionRecord>| {
            record.ended.store(true, Ordering::Release);
            // Without the lock: a woken session may end at once.
            if let Some(waker) = record.timer.fire() {
                waker.wake();
            }
        };
        chosen.map(end).count()
    }

    /// Fires the timers that are due, until the future is dropped.
    pub async fn run_timer(&self) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let now = monotonic_ns();
            self.wake(|timer| timer.is_due(now));
        }
    }

    /// Fires the timers of all sessions.
    pub fn wake_all(&self) {
        self.wake(|_| true);
    }

    fn wake(&self, is_due: impl Fn(&SessionTimer) -> bool) {
        let fire = |record: &Arc<SessionRecord>| {
            if is_due(&record.timer) { record.timer.fire() } else { None }
        };
        // Sessions are woken without the lock: a woken session may end at once.
        let woken: Vec<_> = self.records().values().filter_map(fire).collect();
        woken.into_iter().for_each(Waker::wake);
    }

    fn records(&self) -> MutexGuard<'_, HashMap<u64, Arc<SessionRecord>>> {
        self.0.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registration {
    /// Records the backend, once.
    pub fn set_backend(&self, backend: SocketAddr) {
        // It cannot fail, as a session connects to one backend.
        let _ = self.record.backend.set(backend);
    }

    /// The client's address.
    #[must_use]
    pub fn client(&self) -> SocketAddr {
        self.record.client
    }

    /// The address that the client connected to.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.record.local
    }

    /// The backend's address, once it is connected.
    #[must_use]
    pub fn backend(&self) -> Option<SocketAddr> {
        self.record.backend.get().copied()
    }

    /// Time since the client was accepted.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.record.since.elapsed()
    }

    /// A handle for the forwarding of the session.
    #[must_use]
    pub fn handle(&self) -> SessionHandle {
        SessionHandle(Arc::clone(&self.record))
    }
}

impl SessionHandle {
    /// Schedules the session's timer after `delay`, or up to a quarter of a second later, in place
    /// of an earlier schedule. A timer that has fired stays so.
    pub fn schedule(&self, delay: Duration) {
        self.0.timer.schedule(delay);
    }

    /// Ready once after the session's timer has fired.
    pub fn poll_timer(&self, task: &mut Context<'_>) -> Poll<()> {
        self.0.timer.poll_timer(task)
    }

    /// Whether the operator has ended the session.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.0.ended.load(Ordering::Acquire)
    }

    /// Resolves when the operator ends the session. For one that has no other use of its timer.
    pub async fn ended(&self) {
        while !self.is_ended() {
            poll_fn(|task| self.poll_timer(task)).await;
        }
    }

    /// Records how much payload has passed so far.
    pub fn set_bytes(&self, to_backend: u64, to_client: u64) {
        self.0.to_backend.store(to_backend, Ordering::Relaxed);
        self.0.to_client.store(to_client, Ordering::Relaxed);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.registry.records().remove(&self.record.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_listed_until_it_ends() {
        let registry = SessionRegistry::default();
        let [client, local, backend] =
            ["192.0.2.1:40000", "192.0.2.10:25", "10.0.0.2:2525"].map(|text| text.parse().unwrap());
        let (first, second) = (
            registry.register(&"smtp".into(), "relay", client, local),
            registry.register(&"imap".into(), "relay", client, local),
        );
        first.set_backend(backend);
        first.handle().set_bytes(7, 9);
        let mut records = registry.snapshot();
        records.sort_by(|first, second| second.listener.cmp(&first.listener));
        assert_eq!(
            (&*records[0].listener, records[0].backend, records[0].to_backend, records[0].to_client),
            ("smtp", Some(backend), 7, 9)
        );
        assert_eq!((&*records[1].listener, records[1].backend), ("imap", None));
        drop(second);
        assert_eq!(registry.snapshot().len(), 1);
        drop(first);
        assert_eq!(registry.snapshot(), []);
    }

    #[tokio::test]
    async fn chosen_sessions_are_ended() {
        let registry = SessionRegistry::default();
        let register = |client: &str| {
            registry.register(
                &"smtp".into(),
                "relay",
                client.parse().unwrap(),
                "192.0.2.10:25".parse().unwrap(),
            )
        };
        let (first, second) = (register("192.0.2.1:40000"), register("192.0.2.2:40000"));
        let (chosen, other) = (first.handle(), second.handle());
        let waiting = tokio::spawn(async move { chosen.ended().await });
        tokio::task::yield_now().await;
        assert_eq!(registry.end(|_, client, listener| client == first.client() && listener == "smtp"), 1);
        waiting.await.unwrap();
        assert!(first.handle().is_ended() && !other.is_ended());
        assert_eq!(registry.end(|id, _, _| id == u64::MAX), 0);
    }

    #[tokio::test]
    async fn a_due_timer_fires_and_a_wake_up_is_not_lost() {
        let registry = SessionRegistry::default();
        let [client, local] = ["192.0.2.1:40000", "192.0.2.10:25"].map(|text| text.parse().unwrap());
        let registrations =
            ["soon", "later"].map(|name| registry.register(&name.into(), "relay", client, local));
        let [soon, later] = registrations.each_ref().map(Registration::handle);
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
        // A timer that fires while its session does not wait stays fired when it is scheduled
        // again.
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
