//! Connections that carry no mail: scrapes, readiness probes, commands.
//!
//! They are few and short, so that they never take file descriptors that mail needs. Other programs
//! may hold connections open, or stop reading.

use std::{collections::VecDeque, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{timeout, timeout_at},
};

/// How many connections one socket serves at a time.
pub const MAX_OPERATOR_CONNECTIONS: usize = 16;

/// Pause after a failed accept(2), for instance because no file descriptor is left.
pub const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// The open connections of one socket, the oldest first.
#[derive(Debug, Default)]
pub struct OperatorConnections(VecDeque<JoinHandle<()>>);

impl OperatorConnections {
    /// Serves a connection, and closes it after `limit`. If [`MAX_OPERATOR_CONNECTIONS`] are open,
    /// the oldest is closed first: a readiness probe must be answered however many connections are
    /// idle.
    pub async fn serve(&mut self, limit: Duration, connection: impl Future<Output = ()> + Send + 'static) {
        self.0.retain(|open| !open.is_finished());
        if self.0.len() >= MAX_OPERATOR_CONNECTIONS
            && let Some(oldest) = self.0.pop_front()
        {
            oldest.abort();
            // Its descriptor is free once the task is gone. The result says that it was aborted.
            let _ = oldest.await;
        }
        self.0.push_back(tokio::spawn(async move {
            // The connection is dropped, and with it closed.
            let _ = timeout(limit, connection).await;
        }));
    }

    /// Lets the open connections finish for at most `grace`, then closes them.
    pub async fn finish(self, grace: Duration) {
        let deadline = tokio::time::Instant::now() + grace;
        for mut open in self.0 {
            if timeout_at(deadline, &mut open).await.is_err() {
                open.abort();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    /// Counts the connections that are open.
    struct Open(Arc<AtomicUsize>);

    impl Open {
        fn new(count: &Arc<AtomicUsize>) -> Self {
            count.fetch_add(1, Ordering::Relaxed);
            Self(Arc::clone(count))
        }
    }

    impl Drop for Open {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    async fn idle(open: Open) {
        std::future::pending::<()>().await;
        drop(open);
    }

    #[tokio::test]
    async fn the_newest_replaces_the_oldest() {
        let (mut connections, count) = (OperatorConnections::default(), Arc::new(AtomicUsize::new(0)));
        for number in 1..=3 * MAX_OPERATOR_CONNECTIONS {
            connections.serve(Duration::from_secs(60), idle(Open::new(&count))).await;
            assert_eq!(count.load(Ordering::Relaxed), number.min(MAX_OPERATOR_CONNECTIONS));
        }
        let (served, answered) = tokio::sync::oneshot::channel();
        let answer = async move { served.send(()).unwrap() };
        connections.serve(Duration::from_secs(60), answer).await;
        answered.await.unwrap();
    }

    #[tokio::test]
    async fn a_connection_that_ended_takes_no_place() {
        let (mut connections, count) = (OperatorConnections::default(), Arc::new(AtomicUsize::new(0)));
        connections.serve(Duration::from_secs(60), idle(Open::new(&count))).await;
        for _ in 0..2 * MAX_OPERATOR_CONNECTIONS {
            connections.serve(Duration::from_secs(60), async {}).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn an_idle_connection_is_closed_after_its_limit() {
        let (mut connections, count) = (OperatorConnections::default(), Arc::new(AtomicUsize::new(0)));
        connections.serve(Duration::from_millis(20), idle(Open::new(&count))).await;
        let closed = async {
            while count.load(Ordering::Relaxed) > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(10), closed).await.unwrap();
    }

    #[tokio::test]
    async fn the_end_waits_for_no_idle_connection() {
        let (mut connections, count) = (OperatorConnections::default(), Arc::new(AtomicUsize::new(0)));
        connections.serve(Duration::from_secs(600), idle(Open::new(&count))).await;
        connections.serve(Duration::from_secs(600), async {}).await;
        let finish = connections.finish(Duration::from_millis(20));
        timeout(Duration::from_secs(10), finish).await.unwrap();
        tokio::task::yield_now().await;
        assert_eq!(count.load(Ordering::Relaxed), 0);
    }
}
