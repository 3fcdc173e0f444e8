//! Forwards both directions of a connection, from the header to the close.

mod close;
mod timeouts;

use std::{
    future::poll_fn,
    io,
    sync::Arc,
    task::{self, Poll},
    time::Duration,
};

use bytes::BytesMut;
use tokio::time::Instant;

use super::{
    context::Context,
    direction::NextAction,
    enrolment::Enrolment,
    fin_wait::FinWait,
    half_duplex::HalfDuplex,
    registry::SessionHandle,
    step::{DirectionIo, ForwardError, StepOutcome},
};
use crate::{
    net::socket::{Endpoint, Interest},
    telemetry::{
        log::target,
        outcome::{Bytes, CloseReason},
    },
};

/// How often the counters of a long connection are updated.
const ACCOUNTING_INTERVAL: Duration = Duration::from_secs(5);

/// How many steps a connection makes between two polls of its timer if there is always a step to
/// make.
const STEPS_PER_TIMER_POLL: u8 = 32;

/// Both directions of a connection whose header was sent.
#[derive(Debug)]
pub(super) struct Duplex {
    context: Arc<Context>,
    session: SessionHandle,
    client: Endpoint,
    backend: Endpoint,
    to_backend: HalfDuplex,
    to_client: HalfDuplex,
    header_sent: Instant,
    /// When payload last passed through user space.
    last_relayed: Instant,
    /// The bytes to the backend and to the client that the counters have.
    counted: (Bytes, Bytes),
    backend_finished_first: bool,
    closed: PeerClosed,
    /// Whether the kernel detects a dead backend. It detects a dead client from the accept on.
    timeouts_set: bool,
    /// Set once one side has finished.
    fin_wait: Option<Box<FinWait>>,
    /// The timer knows of the client's held bytes.
    prefix_held: bool,
    /// Counts the steps.
    steps: u8,
}

/// Which peers have closed both ways, so that their sockets accept nothing any more. What a peer
/// sent before its FIN is still delivered to the other side.
#[derive(Debug, Default)]
struct PeerClosed {
    client: bool,
    backend: bool,
    /// The socket's error, if a write has fetched it. The kernel reports it once; a later read
    /// returns an end of file without a reason.
    client_error: Option<io::Error>,
    backend_error: Option<io::Error>,
}

impl Duplex {
    /// `read` bytes of the client were read before, and `pending` is not yet written.
    pub(super) fn new(
        context: Arc<Context>,
        session: SessionHandle,
        client: Endpoint,
        backend: Endpoint,
        read: u64,
        pending: BytesMut,
        awaiting_check: bool,
    ) -> Self {
        let now = Instant::now();
        Self {
            to_backend: HalfDuplex::new(read, pending, awaiting_check, &context)
                .with_client(context.protocol),
            to_client: HalfDuplex::new(0, BytesMut::new(), false, &context).with_server(context.protocol),
            context,
            session,
            client,
            backend,
            header_sent: now,
            last_relayed: now,
            counted: Default::default(),
            backend_finished_first: false,
            closed: PeerClosed::default(),
            timeouts_set: false,
            fin_wait: None,
            prefix_held: false,
            steps: 0,
        }
    }

    /// What the connection shares with others of its listener.
    pub(super) fn context(&self) -> Arc<Context> {
        Arc::clone(&self.context)
    }

    /// Forwards until both directions are finished or something fails.
    pub(super) async fn run(&mut self) -> (CloseReason, Option<io::Error>) {
        let first_check =
            ACCOUNTING_INTERVAL.min(self.idle_limit()).min(self.context.timeouts.user_timeout / 2);
        self.session.schedule(first_check);
        loop {
            if self.left_unspoken() {
                return (CloseReason::ClientClosed, None);
            }
            if let Err(failure) = self.enrol_and_set_interest() {
                return failure;
            }
            if self.is_finished() {
                if let Some(failure) = self.both_failed() {
                    return failure;
                }
                let reason = if self.backend_finished_first {
                    CloseReason::BackendClosed
                } else {
                    CloseReason::ClientClosed
                };
                return (reason, None);
            }
            self.schedule_new_timeouts();
            let step = poll_fn(|task| self.poll_step(task)).await;
            match self.classify_hangup(step) {
                Step::ToBackend(Ok(StepOutcome::Resumed))
                    if self.closed.client && !self.to_backend.is_complete(&self.client) =>
                {
                    return (CloseReason::ClientReset, None);
                }
                Step::ToClient(Ok(StepOutcome::Resumed))
                    if self.closed.backend && !self.to_client.is_complete(&self.backend) =>
                {
                    return (CloseReason::BackendReset, None);
                }
                Step::ToBackend(Ok(outcome)) => {
                    if outcome == StepOutcome::Read {
                        self.to_client.client_spoke();
                    }
                    self.record_outcome(outcome);
                }
                Step::ToClient(Ok(outcome)) => {
                    self.record_first_byte(outcome);
                    self.record_outcome(outcome);
                    if self.lacks_banner() {
                        return (CloseReason::NoBanner, None);
                    }
                    self.backend_finished_first |=
                        self.to_client.source_ended() && !self.to_backend.source_ended();
                }
                Step::ToBackend(Err(ForwardError::Target(error))) | Step::BackendClosed(Some(error)) => {
                    self.closed.backend = true;
                    self.backend_finished_first |= !self.to_backend.source_ended();
                    self.to_backend.abandon();
                    if self.to_client.is_spliced() && !self.to_client.is_complete(&self.backend) {
                        return self.close_reason(
                            ForwardError::Target(error),
                            CloseReason::ClientReset,
                            CloseReason::BackendReset,
                        );
                    }
                    self.closed.backend_error = Some(error);
                }
                Step::ToClient(Err(ForwardError::Target(error))) | Step::ClientClosed(Some(error)) => {
                    self.closed.client = true;
                    self.to_client.abandon();
                    if self.to_backend.is_spliced() && !self.to_backend.is_complete(&self.client) {
                        return self.close_reason(
                            ForwardError::Target(error),
                            CloseReason::BackendReset,
                            CloseReason::ClientReset,
                        );
                    }
                    self.closed.client_error = Some(error);
                }
                // Both sides have sent a FIN: what was received is still forwarded.
                Step::BackendClosed(None) => self.closed.backend = true,
                Step::ClientClosed(None) => self.closed.client = true,
                Step::ToBackend(Err(failure)) => {
                    let failure = with_reported_error(failure, self.closed.client_error.take());
                    return self.close_reason(failure, CloseReason::ClientReset, CloseReason::BackendReset);
                }
                Step::ToClient(Err(failure)) => {
                    let failure = with_reported_error(failure, self.closed.backend_error.take());
                    return self.close_reason(failure, CloseReason::BackendReset, CloseReason::ClientReset);
                }
                Step::TimerFired if self.context.abort.is_cancelled() => return (CloseReason::Aborted, None),
                Step::TimerFired if self.session.is_ended() => return (CloseReason::EndedByOperator, None),
                Step::TimerFired => {
                    self.set_backend_timeouts();
                    self.update_counters();
                    if let Err(failure) = self.check_backlog() {
                        return self.close_reason(failure, CloseReason::Overload, CloseReason::Overload);
                    }
                    if let Some(reason) = self.expired() {
                        return (reason, None);
                    }
                    self.release_held_prefix();
                    self.session.schedule(self.next_check());
                }
            }
        }
    }

    /// The next step. It is polled, because a future for each possible step would be most of the
    /// memory of an idle connection.
    fn poll_step(&mut self, task: &mut task::Context<'_>) -> Poll<Step> {
        // A direction that always has something to do must not starve the other, nor the timer.
        self.steps = self.steps.wrapping_add(1);
        let steps = self.steps;
        if steps.is_multiple_of(STEPS_PER_TIMER_POLL) && self.session.poll_timer(task).is_ready() {
            return Poll::Ready(Step::TimerFired);
        }
        let holds_fin = self.holds_fin();
        let Self { context, session, client, backend, to_backend, to_client, closed, .. } = self;
        // A socket that user space reads needs no such poll: its reads report the close, after the
        // last byte.
        let (await_client_close, await_backend_close) =
            (!to_backend.reads_source(), !to_client.reads_source());
        if await_client_close
            && !closed.client
            && let Poll::Ready(error) = client.poll_closed(task)
        {
            return Poll::Ready(Step::ClientClosed(error));
        }
        if await_backend_close
            && !closed.backend
            && let Poll::Ready(error) = backend.poll_closed(task)
        {
            return Poll::Ready(Step::BackendClosed(error));
        }
        let (up, down) = both_directions(context, client, backend);
        for upstream in [steps.is_multiple_of(2), !steps.is_multiple_of(2)] {
            let step = if upstream && holds_fin {
                Poll::Pending
            } else if upstream {
                to_backend.poll_step(task, up).map(Step::ToBackend)
            } else {
                to_client.poll_step(task, down).map(Step::ToClient)
            };
            if step.is_ready() {
                return step;
            }
        }
        session.poll_timer(task).map(|()| Step::TimerFired)
    }

    /// Enrols the directions for which it is time, and sets the events to wait for on both sockets.
    fn enrol_and_set_interest(&mut self) -> Result<(), (CloseReason, Option<io::Error>)> {
        let Self { client, backend, to_backend, to_client, context, header_sent, .. } = self;
        let age = || header_sent.elapsed();
        let (up, down) = both_directions(context, client, backend);
        let enrolments = [
            ("client_to_backend", to_backend.enrol(up, age)),
            ("backend_to_client", to_client.enrol(down, age)),
        ];
        for (direction, enrolment) in enrolments {
            match enrolment {
                Enrolment::NotNow => {}
                Enrolment::Lost(error) => return Err((CloseReason::Lost, Some(error))),
                Enrolment::Done => context.metrics.enrolled(),
                Enrolment::Refused(refusal) => {
                    tracing::debug!(target: target::SESSION,
                        direction,
                        reason = refusal.reason,
                        detail = refusal.detail,
                        "stays relayed"
                    );
                    context.metrics.enrolment_failed(refusal.reason);
                }
            }
        }
        let monitor = &context.hangups;
        let client_interest =
            Interest { read: to_backend.wants_readable(), write: to_client.wants_writable() };
        let backend_interest =
            Interest { read: to_client.wants_readable(), write: to_backend.wants_writable() };
        client
            .set_interest(client_interest, monitor)
            .and_then(|()| backend.set_interest(backend_interest, monitor))
            .map_err(|error| (CloseReason::Internal, Some(error)))
    }

    /// Why the connection ended, if both directions were abandoned because their targets failed: neither
    /// side has everything, and no acknowledgement is worth waiting for.
    fn both_failed(&mut self) -> Option<(CloseReason, Option<io::Error>)> {
        if !self.to_client.is_truncated() || !self.to_backend.is_truncated() {
            return None;
        }
        let PeerClosed { client_error, backend_error, .. } = &mut self.closed;
        Some(match (client_error.take(), backend_error.take()) {
            (None, Some(error)) => (CloseReason::BackendReset, Some(error)),
            (error, _) => (CloseReason::ClientReset, error),
        })
    }

    fn is_finished(&self) -> bool {
        self.to_backend.next_action() == NextAction::Finished
            && self.to_client.next_action() == NextAction::Finished
    }

    /// A hang-up without an error means that both sides have sent a FIN, or that the socket was
    /// reset and a kernel worker has fetched the error when it wrote (sk_psock_backlog,
    /// net/core/skmsg.c). If this side has not sent its FIN, it was a reset.
    fn classify_hangup(&self, step: Step) -> Step {
        let reset = || Some(io::ErrorKind::ConnectionReset.into());
        match step {
            Step::ClientClosed(None) if self.to_client.next_action() != NextAction::Finished => {
                Step::ClientClosed(reset())
            }
            Step::BackendClosed(None) if self.to_backend.next_action() != NextAction::Finished => {
                Step::BackendClosed(reset())
            }
            step => step,
        }
    }

    fn record_outcome(&mut self, outcome: StepOutcome) {
        match outcome {
            StepOutcome::Read => self.last_relayed = Instant::now(),
            StepOutcome::Paused => self.context.metrics.paused(),
            StepOutcome::MovedToUserSpace => self.context.metrics.moved_to_user_space(),
            StepOutcome::Resumed => self.context.metrics.resumed(),
            StepOutcome::Other => {}
        }
    }

    /// Checks the backlog without a notification: a direction may have stalled since its last one.
    fn check_backlog(&mut self) -> Result<(), ForwardError> {
        let Self { context, client, backend, to_backend, to_client, .. } = self;
        let (up, down) = both_directions(context, client, backend);
        let outcomes = [to_backend.check_backlog(up)?, to_client.check_backlog(down)?];
        outcomes.into_iter().for_each(|outcome| self.record_outcome(outcome));
        Ok(())
    }

    /// Records the time to the backend's first byte, which user space always reads.
    fn record_first_byte(&mut self, outcome: StepOutcome) {
        if outcome == StepOutcome::Read
            && self.counted.1 == Bytes::default()
            && !self.to_client.has_read_nothing()
        {
            self.context.metrics.first_byte(self.header_sent.elapsed());
            self.update_counters();
        }
    }

    /// Whether the backend has sent its FIN before its first byte, while the client was still
    /// there.
    fn lacks_banner(&self) -> bool {
        self.to_client.source_ended()
            && self.to_client.has_read_nothing()
            && !self.client_finished()
            && self.context.expects_banner
    }

    /// Whether the client has sent its FIN. An abandoned direction does not show that.
    fn client_finished(&self) -> bool {
        self.to_backend.source_ended() && !self.to_backend.is_truncated()
    }

    /// The close reason of `failure`; `source` and `target` are those of a failed socket.
    fn close_reason(
        &self,
        failure: ForwardError,
        source: CloseReason,
        target: CloseReason,
    ) -> (CloseReason, Option<io::Error>) {
        let (reason, error) = match failure {
            ForwardError::Source(error) => (source, Some(error)),
            ForwardError::Target(error) => (target, Some(error)),
            ForwardError::Lost(error) => (CloseReason::Lost, Some(error)),
            ForwardError::Forged => (CloseReason::Forged, None),
            ForwardError::Overload => (CloseReason::Overload, None),
            ForwardError::HeaderMisread(line) => (CloseReason::HeaderMisread, Some(io::Error::other(line))),
        };
        let header_refused = reason == CloseReason::BackendReset
            && self.to_client.has_read_nothing()
            && !self.client_finished()
            && self.context.expects_banner;
        (if header_refused { CloseReason::NoBanner } else { reason }, error)
    }

    /// Updates the byte counters.
    fn update_counters(&mut self) {
        let (to_backend, to_client) = (self.to_backend.bytes(), self.to_client.bytes());
        self.context
            .metrics
            .bytes(bytes_since(to_backend, self.counted.0), bytes_since(to_client, self.counted.1));
        self.session.set_bytes(to_backend.total(), to_client.total());
        self.counted = (to_backend, to_client);
    }
}

/// What has happened to a connection.
enum Step {
    ToBackend(Result<StepOutcome, ForwardError>),
    ToClient(Result<StepOutcome, ForwardError>),
    ClientClosed(Option<io::Error>),
    BackendClosed(Option<io::Error>),
    /// On schedule, or because all sessions are aborted.
    TimerFired,
}

/// Replaces a source's unspecific error by the one that a write to the same socket has fetched.
fn with_reported_error(failure: ForwardError, reason: Option<io::Error>) -> ForwardError {
    match (failure, reason) {
        (ForwardError::Source(error), Some(reason)) if error.raw_os_error().is_none() => {
            ForwardError::Source(reason)
        }
        (failure, _) => failure,
    }
}

/// The direction to the backend and the one to the client.
fn both_directions<'a>(
    context: &'a Context,
    client: &'a Endpoint,
    backend: &'a Endpoint,
) -> (DirectionIo<'a>, DirectionIo<'a>) {
    let io = |source, target| DirectionIo { context, source, target };
    (io(client, backend), io(backend, client))
}

fn bytes_since(now: Bytes, before: Bytes) -> Bytes {
    Bytes {
        relayed: now.relayed.saturating_sub(before.relayed),
        piped: now.piped.saturating_sub(before.piped),
        spliced: now.spliced.saturating_sub(before.spliced),
    }
}
