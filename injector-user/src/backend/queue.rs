//! Clients that wait because every backend has as many sessions as it may (`max_connections`).

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Mutex, Notify},
    time::{Instant, timeout_at},
};

use crate::config::Listener;

/// How often the first client in the queue tries without a notification: a backend that comes up, or has
/// another address, has places of which no session's end tells.
const RETRY: Duration = Duration::from_secs(1);

/// The clients of one listener that wait for a backend. They get a place in the order in which they
/// began to wait: only the first one tries, and others wait behind it.
#[derive(Debug)]
pub(super) struct Queue {
    /// Notified when a session of a backend ends.
    pub(super) released: Arc<Notify>,
    /// Held by the first client in the queue. Others get it in the order in which they asked.
    head: Mutex<()>,
    waiting: AtomicUsize,
    max: usize,
    timeout: Duration,
}

/// Why a client does not wait any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPlace {
    /// As many as may wait do.
    QueueFull,
    /// `timeouts.queue` is over.
    TimedOut,
}

/// Counts as one of those that wait until it is dropped.
struct Waits<'a>(&'a AtomicUsize);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Display for NoPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::QueueFull => "max_queue clients wait already",
            Self::TimedOut => "no session ended within timeouts.queue",
        })
    }
}

impl Queue {
    /// The queue of a listener. Backends keep their sessions across a reload, and notify the same one.
    /// Clients that wait already keep their queue, and its settings.
    pub(super) fn new(listener: &Listener, before: Option<&Self>) -> Self {
        Self {
            released: before.map(|before| Arc::clone(&before.released)).unwrap_or_default(),
            head: Mutex::const_new(()),
            waiting: AtomicUsize::new(0),
            max: listener.max_queue,
            timeout: listener.timeouts.queue,
        }
    }

    /// How many clients wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Reserves a place: at once if one is free and no client waits, otherwise after those that wait.
    /// `reserve` returns `None` while no place is free.
    ///
    /// # Errors
    /// [`NoPlace`].
    pub(super) async fn wait<T>(&self, mut reserve: impl FnMut() -> Option<T>) -> Result<T, NoPlace> {
        if self.len() == 0
            && let Some(place) = reserve()
        {
            return Ok(place);
        }
        let deadline = Instant::now() + self.timeout;
        let _waits = self.enter().ok_or(NoPlace::QueueFull)?;
        let timed_out = |_| NoPlace::TimedOut;
        let _head = timeout_at(deadline, self.head.lock()).await.map_err(timed_out)?;
        loop {
            // Before the attempt: a session that ends meanwhile must not be missed.
            let released = self.released.notified();
            if let Some(place) = reserve() {
                return Ok(place);
            }
            let retry = Instant::now() + RETRY;
            match timeout_at(deadline.min(retry), released).await {
                Err(elapsed) if deadline <= retry => return Err(timed_out(elapsed)),
                _ => {}
            }
        }
    }

    fn enter(&self) -> Option<Waits<'_>> {
        let more = |waiting: usize| (waiting < self.max).then_some(waiting + 1);
        self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Waits(&self.waiting))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::Mutex as StdMutex};

    use proptest::prelude::*;
    use tokio::task::{JoinHandle, yield_now};

    use super::*;

    /// Places, and who got one in which order.
    #[derive(Debug)]
    struct Places {
        queue: Queue,
        free: AtomicUsize,
        served: StdMutex<Vec<usize>>,
    }

    impl Places {
        fn new(free: usize, max: usize, timeout: Duration) -> Arc<Self> {
            let released = Arc::default();
            let queue =
                Queue { released, head: Mutex::const_new(()), waiting: AtomicUsize::new(0), max, timeout };
            Arc::new(Self { queue, free: AtomicUsize::new(free), served: StdMutex::default() })
        }

        fn reserve(&self) -> Option<()> {
            let fewer = |free: usize| free.checked_sub(1);
            self.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer).ok().map(drop)
        }

        fn release(&self) {
            self.free.fetch_add(1, Ordering::Relaxed);
            self.queue.released.notify_waiters();
        }

        fn arrive(self: &Arc<Self>, number: usize) -> JoinHandle<Result<(), NoPlace>> {
            let places = Arc::clone(self);
            tokio::spawn(async move {
                places.queue.wait(|| places.reserve()).await?;
                places.served.lock().unwrap().push(number);
                Ok(())
            })
        }
    }

    /// Lets every task go as far as it can.
    async fn settle() {
        for _ in 0..50 {
            yield_now().await;
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Arrive,
        /// So many sessions end at once.
        Release(usize),
        /// A client that waits hangs up.
        Leave(prop::sample::Index),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => Just(Step::Arrive),
            3 => (1..4_usize).prop_map(Step::Release),
            1 => any::<prop::sample::Index>().prop_map(Step::Leave),
        ];
        prop::collection::vec(step, 1..60)
    }

    /// Whether each step is over before the next one begins, or several happen before any task runs.
    async fn check(places: usize, steps: &[Step], one_by_one: bool) {
        let all = Places::new(places, 1000, Duration::from_secs(3600));
        let mut clients = Vec::new();
        let mut left = BTreeSet::new();
        let mut taken = 0;
        for step in steps {
            match step {
                Step::Arrive => clients.push(all.arrive(clients.len())),
                Step::Release(count) => {
                    let served = all.served.lock().unwrap().len();
                    for _ in 0..*count.min(&(served - taken)) {
                        taken += 1;
                        all.release();
                    }
                }
                Step::Leave(index) if !clients.is_empty() => {
                    let number = index.index(clients.len());
                    if !clients[number].is_finished() {
                        clients[number].abort();
                        left.insert(number);
                    }
                }
                Step::Leave(_) => {}
            }
            if one_by_one {
                settle().await;
                let (free, waiting) = (all.free.load(Ordering::Relaxed), all.queue.len());
                assert!(free == 0 || waiting == 0, "{free} places are free, and {waiting} clients wait");
            }
        }
        settle().await;
        // Well before the first one tries again without a notification.
        let (free, waiting) = (all.free.load(Ordering::Relaxed), all.queue.len());
        assert!(free == 0 || waiting == 0, "{free} places are free, and {waiting} clients wait");
        let served = all.served.lock().unwrap();
        assert!(served.is_sorted(), "{served:?}");
        let gone = left.iter().filter(|number| !served.contains(number)).count();
        assert_eq!(served.len() + gone + waiting, clients.len());
    }

    proptest! {
        #[test]
        fn clients_get_places_in_the_order_in_which_they_came(
            places in 0..4_usize,
            steps in steps(),
            one_by_one: bool,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(check(places, &steps, one_by_one));
        }
    }

    #[tokio::test]
    async fn a_newcomer_does_not_overtake() {
        let all = Places::new(0, 10, Duration::from_secs(30));
        let first = all.arrive(0);
        settle().await;
        // The place is free, and the one who waits has not run yet.
        all.release();
        let newcomer = all.queue.wait(|| all.reserve());
        assert!(timeout_at(Instant::now() + Duration::from_millis(1), newcomer).await.is_err());
        first.await.unwrap().unwrap();
        assert_eq!(all.queue.len(), 0);
    }

    #[tokio::test]
    async fn each_waits_for_its_own_time_also_behind_the_first() {
        let all = Places::new(0, 2, Duration::from_millis(30));
        let first = all.arrive(0);
        settle().await;
        let second = all.arrive(1);
        settle().await;
        assert_eq!(all.queue.wait(|| all.reserve()).await, Err(NoPlace::QueueFull));
        assert_eq!(first.await.unwrap(), Err(NoPlace::TimedOut));
        assert_eq!(second.await.unwrap(), Err(NoPlace::TimedOut));
        assert_eq!(all.queue.len(), 0);
        // The next one is not behind them any more.
        all.release();
        assert_eq!(all.queue.wait(|| all.reserve()).await, Ok(()));
    }

    /// As when a backend comes up.
    #[tokio::test]
    async fn a_place_that_no_session_has_left_is_found_within_a_second() {
        let all = Places::new(0, 2, Duration::from_secs(30));
        let client = all.arrive(0);
        settle().await;
        all.free.store(1, Ordering::Relaxed);
        timeout_at(Instant::now() + RETRY * 10, client).await.unwrap().unwrap().unwrap();
    }
}
