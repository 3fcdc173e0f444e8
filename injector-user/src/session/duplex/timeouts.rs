//! The timeouts of a connection that is forwarded.

use std::time::{Duration, Instant as StdInstant};

use tokio::time::Instant;

use super::{ACCOUNTING_INTERVAL, Duplex};
use crate::{
    os::sockopt,
    protocol::FirstSpeaker,
    session::{direction::NextAction, fin_wait::FinWait},
    telemetry::{log::target, outcome::CloseReason},
};

/// How long bytes of a client may be held because they begin like a PROXY header. A client that
/// forges one sends it in one piece; a bare line end begins like one, too.
const PREFIX_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a server may take to close after the client's QUIT or LOGOUT, until it gets the client's
/// FIN as well.
const QUIT_TIMEOUT: Duration = Duration::from_secs(1);

impl Duplex {
    /// Makes the kernel detect a dead backend. A short session does not need these four system
    /// calls. Bytes that were sent before count as well, because the kernel compares the age of the
    /// oldest unacknowledged one (tcp_write_timeout, net/ipv4/tcp_timer.c).
    pub(super) fn set_backend_timeouts(&mut self) {
        if self.timeouts_set {
            return;
        }
        self.timeouts_set = true;
        let timeouts = &self.context.timeouts;
        if let Err(error) = self.backend.set_peer_timeouts(timeouts.user_timeout, timeouts.keepalive) {
            let listener = &*self.context.listener;
            tracing::warn!(
                target: target::SESSION,
                listener,
                %error,
                "cannot set TCP user timeout on the backend socket; only the idle timeout detects a \
                 dead backend"
            );
        }
    }

    /// Schedules the timer anew when something has begun that ends before its next check.
    pub(super) fn schedule_new_timeouts(&mut self) {
        let half_closed = self.is_half_closed() && self.fin_wait.is_none();
        if half_closed {
            let limit = self.context.timeouts.client_fin;
            self.fin_wait = Some(Box::new(FinWait::new(StdInstant::now(), limit)));
        }
        let held = self.to_backend.held_for().is_some();
        let newly_held = held && !std::mem::replace(&mut self.prefix_held, held);
        if half_closed || newly_held {
            self.session.schedule(self.next_check());
        }
    }

    /// The time until something may be over, or is to be counted.
    pub(super) fn next_check(&self) -> Duration {
        let idle = (self.last_activity() + self.idle_limit()).saturating_duration_since(Instant::now());
        let mut next = ACCOUNTING_INTERVAL.min(idle);
        if !self.timeouts_set {
            next = next.min(self.context.timeouts.user_timeout / 2);
        }
        if let Some(fin_wait) = &self.fin_wait {
            next = next.min(fin_wait.next_check());
        }
        if let (Some(limit), Some(fin_wait)) = (self.fin_hold(), &self.fin_wait) {
            next = next.min(limit.saturating_sub(fin_wait.age(StdInstant::now())));
        }
        if let Some(held) = self.to_backend.held_for() {
            next = next.min(PREFIX_TIMEOUT.saturating_sub(held));
        }
        next
    }

    /// Whether a timeout has expired that ends the connection.
    pub(super) fn expired(&mut self) -> Option<CloseReason> {
        if self.client_fin_expired() {
            return Some(CloseReason::ClientFin);
        }
        if self.last_activity().elapsed() < self.idle_limit() {
            return None;
        }
        Some(if self.is_half_closed() { CloseReason::HalfClosed } else { CloseReason::Idle })
    }

    /// Forwards bytes that were held for too long.
    pub(super) fn release_held_prefix(&mut self) {
        if self.to_backend.held_for().is_some_and(|held| held >= PREFIX_TIMEOUT) {
            self.to_backend.release_prefix();
        }
    }

    /// Whether the backend has finished, and the client has had its time to finish, too.
    fn client_fin_expired(&mut self) -> bool {
        let last_activity = self.last_activity();
        let Some(fin_wait) = &mut self.fin_wait else { return false };
        let acked =
            [&self.client, &self.backend].map(|end| sockopt::tcp_info(end).map_or(0, |it| it.bytes_acked));
        if fin_wait.progress(acked[0].wrapping_add(acked[1])) {
            self.last_relayed = Instant::now();
        }
        if self.to_client.next_action() != NextAction::Finished || self.to_backend.source_ended() {
            return false;
        }
        // In a mail protocol a server that has finished reads nothing more. Elsewhere it may.
        let active = (!self.context.expects_banner).then(|| last_activity.into_std());
        let unacknowledged = sockopt::unacknowledged(&self.client).unwrap_or(0);
        let limit = self.context.timeouts.client_fin;
        fin_wait.is_over(StdInstant::now(), unacknowledged, active, limit)
    }

    /// Whether the backend gets no FIN yet, although the client has finished.
    pub(super) fn holds_fin(&self) -> bool {
        let age = self.fin_wait.as_ref().map_or(Duration::ZERO, |it| it.age(StdInstant::now()));
        self.fin_hold().is_some_and(|limit| age < limit)
    }

    /// For how long the backend gets no FIN after the client has finished, unless the backend finishes
    /// before; `None` if there is no reason to wait.
    ///
    /// - The client has finished without a byte, and has yet to get the banner: an early end terminates
    ///   Postfix's smtpd up to 3.10 while it reads the header.
    /// - The client has ended the session by a command: the server closes by itself. If the injector
    ///   did so first, the connection would stay in TIME_WAIT on this host, which takes a source port
    ///   for a minute.
    fn fin_hold(&self) -> Option<Duration> {
        if self.to_backend.next_action() != NextAction::SendFin || self.to_client.source_ended() {
            return None;
        }
        if !self.to_backend.has_read_nothing() {
            return self.to_backend.has_quit().then_some(QUIT_TIMEOUT);
        }
        let awaits_banner = self.context.protocol.speaks_first() == FirstSpeaker::Server
            && (self.to_client.has_read_nothing() || self.to_client.next_action() == NextAction::Write);
        awaits_banner.then_some(self.context.timeouts.client_fin)
    }

    /// Whether the client has finished without a byte and has what the backend has sent. Then the
    /// backend is reset. It has got nothing but the header, and a FIN would leave the connection in
    /// TIME_WAIT on this host, which takes a source port for a minute.
    pub(super) fn left_unspoken(&self) -> bool {
        if !self.finished_unspoken() {
            return false;
        }
        let backend_waits = match self.context.protocol.speaks_first() {
            FirstSpeaker::Server => !self.to_client.has_read_nothing(),
            FirstSpeaker::Client => self.to_client.has_read_nothing(),
            // The FIN may be the client's request.
            FirstSpeaker::Unknown => false,
        };
        let written = match self.to_client.next_action() {
            NextAction::Read => true,
            NextAction::Finished => self.to_client.is_truncated(),
            _ => false,
        };
        backend_waits && written && !self.to_client.was_spliced()
    }

    fn finished_unspoken(&self) -> bool {
        self.to_backend.next_action() == NextAction::SendFin && self.to_backend.has_read_nothing()
    }

    fn is_half_closed(&self) -> bool {
        self.to_backend.source_ended() || self.to_client.source_ended()
    }

    pub(super) fn idle_limit(&self) -> Duration {
        let timeouts = &self.context.timeouts;
        if self.is_half_closed() { timeouts.half_closed } else { timeouts.idle }
    }

    /// When payload was last forwarded, in user space or in the kernel.
    fn last_activity(&self) -> Instant {
        let spliced = self.to_backend.last_spliced_ns().max(self.to_client.last_spliced_ns());
        let since = crate::os::clock::monotonic_ns().saturating_sub(spliced);
        let spliced = Instant::now().checked_sub(Duration::from_nanos(since));
        spliced.map_or(self.last_relayed, |spliced| spliced.max(self.last_relayed))
    }
}
