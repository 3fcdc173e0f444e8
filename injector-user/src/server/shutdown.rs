//! Ends sessions: at a drain deadline, and when the daemon shuts down.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::{
    state::{Server, Shared},
    worker::Worker,
};
use crate::{session::registry::SessionRegistry, telemetry::log::target};

/// How long sessions may take to end after they were aborted.
const ABORT_GRACE: Duration = Duration::from_secs(3);

/// Inline connections are reset once more after this time: the engine may not have followed a drain
/// yet, and handshakes may have finished meanwhile.
const INLINE_FOLLOWS: Duration = Duration::from_secs(1);

impl Server {
    /// Stops accepting, lets sessions finish until the deadline or a second signal, then aborts the
    /// rest.
    pub async fn shutdown(self, deadline: Duration, second_signal: impl Future<Output = ()>) {
        let Shared { stop_accepting, abort_sessions: abort, stop_workers, acceptors, sessions, .. } =
            self.shared;
        stop_accepting.cancel();
        acceptors.close();
        acceptors.wait().await;
        sessions.close();
        let left = sessions.len();
        tracing::info!(target: target::DAEMON,
            sessions = left,
            ?deadline,
            "shutting down: no new connections; a second signal aborts the remaining sessions"
        );
        let finished = tokio::select! {
            () = sessions.wait() => true,
            () = tokio::time::sleep(deadline) => false,
            () = second_signal => false,
        };
        let mut count = 0;
        if !finished {
            count = sessions.len();
            abort_sessions(&abort, self.workers.iter().map(Worker::sessions));
            if tokio::time::timeout(ABORT_GRACE, sessions.wait()).await.is_err() {
                tracing::warn!(target: target::DAEMON, sessions = sessions.len(), "sessions are still open after they were aborted; they end with the process");
            }
        }
        stop_workers.cancel();
        self.workers.into_iter().for_each(Worker::join);
        let completed = left.saturating_sub(count);
        tracing::info!(target: target::DAEMON,
            completed,
            aborted = count,
            "stopped: {completed} sessions completed, {count} aborted"
        );
    }

    /// Resets the inline connections of a listener that takes no new ones, at `deadline`. Those of
    /// its name that are opened after it takes connections again are not affected.
    pub(super) fn reset_inline_at(&mut self, deadline: Instant, listener: &str) {
        let Some(usage) = self.inline_usage.clone() else { return };
        let listener = listener.to_owned();
        let reopened = self.closed_to_inline.entry(listener.clone()).or_default().clone();
        tokio::spawn(async move {
            for at in [deadline, deadline + INLINE_FOLLOWS] {
                tokio::time::sleep_until(at.into()).await;
                usage.reset(&listener, reopened.opened_before());
            }
        });
    }

    /// Aborts the sessions of a token at `deadline`.
    pub(super) fn abort_at(&self, deadline: Instant, abort: CancellationToken) {
        let registries: Vec<_> = self.workers.iter().map(|worker| worker.sessions().clone()).collect();
        tokio::spawn(async move {
            tokio::time::sleep_until(deadline.into()).await;
            abort_sessions(&abort, &registries);
        });
    }
}

/// Cancels the token and wakes all sessions, because a sleeping session does not check it.
fn abort_sessions<'a>(abort: &CancellationToken, registries: impl IntoIterator<Item = &'a SessionRegistry>) {
    abort.cancel();
    registries.into_iter().for_each(SessionRegistry::wake_all);
}
