//! Carries both directions of a connection from the header to the end.

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

/// How often the counters of a long connection are brought up to date.
const ACCOUNTING_INTERVAL: Duration = Duration::from_secs(5);

/// How long a peer may take what it was sent last, before it is told by a reset that its own words found nobody.
const LINGER_TIMEOUT: Duration = Duration::from_secs(30);

/// So many steps are made for each look at the clock, where there is always one to make.
const STEPS_PER_TIMER_POLL: u8 = 32;

/// A connection whose header is sent.
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
    accounted: (Bytes, Bytes),
    backend_finished_first: bool,
    closed: PeerClosed,
    /// The kernel knows when to give up a backend that does not answer. Of the client it knows from the beginning.
    timeouts_set: bool,
    /// Counts steps.
    turn: u8,
}

/// Which socket takes nothing any more, its peer having closed for good. What the peer sent before its FIN is still
/// delivered to the other side.
#[derive(Debug, Default)]
struct PeerClosed {
    client: bool,
    backend: bool,
    /// Why, where a write was told: the kernel tells once, and whoever reads then sees an end without a reason.
    client_error: Option<io::Error>,
    backend_error: Option<io::Error>,
}

/// How the pump stopped.
#[derive(Debug)]
pub(super) struct CloseOutcome {
    pub(super) reason: CloseReason,
    pub(super) error: Option<io::Error>,
    pub(super) to_backend: Bytes,
    pub(super) to_client: Bytes,
    /// Still open where the client can be told something in its own protocol.
    pub(super) client: Option<Endpoint>,
}

impl Duplex {
    /// `read` bytes of the client were read before, of which `held` are not written yet.
    pub(super) fn new(
        context: Arc<Context>,
        session: SessionHandle,
        client: Endpoint,
        backend: Endpoint,
        read: u64,
        held: BytesMut,
        awaiting_check: bool,
    ) -> Self {
        let now = Instant::now();
        Self {
            to_backend: HalfDuplex::new(read, held, awaiting_check, &context),
            to_client: HalfDuplex::new(0, BytesMut::new(), false, &context),
            context,
            session,
            client,
            backend,
            header_sent: now,
            last_relayed: now,
            accounted: Default::default(),
            backend_finished_first: false,
            closed: PeerClosed::default(),
            timeouts_set: false,
            turn: 0,
        }
    }

    /// What it shares with others.
    pub(super) fn context(&self) -> Arc<Context> {
        Arc::clone(&self.context)
    }

    /// Until both directions are finished or something breaks.
    pub(super) async fn run(&mut self) -> (CloseReason, Option<io::Error>) {
        let first_look =
            ACCOUNTING_INTERVAL.min(self.idle_limit()).min(self.context.timeouts.user_timeout / 2);
        self.session.schedule(first_look);
        loop {
            if let Err(ended) = self.prepare() {
                return ended;
            }
            if self.finished() {
                let first = if self.backend_finished_first {
                    CloseReason::BackendClosed
                } else {
                    CloseReason::ClientClosed
                };
                return (first, None);
            }
            let stepped = poll_fn(|task| self.poll_step(task)).await;
            match self.classify_hangup(stepped) {
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
                Step::ToBackend(Ok(progress)) => self.record_outcome(progress),
                Step::ToClient(Ok(progress)) => {
                    self.record_first_byte(progress);
                    self.record_outcome(progress);
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
                        return self.failure(
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
                        return self.failure(
                            ForwardError::Target(error),
                            CloseReason::BackendReset,
                            CloseReason::ClientReset,
                        );
                    }
                    self.closed.client_error = Some(error);
                }
                // Both have said their last, without an error: what was received is still passed on.
                Step::BackendClosed(None) => self.closed.backend = true,
                Step::ClientClosed(None) => self.closed.client = true,
                Step::ToBackend(Err(failure)) => {
                    let failure = with_reported_error(failure, self.closed.client_error.take());
                    return self.failure(failure, CloseReason::ClientReset, CloseReason::BackendReset);
                }
                Step::ToClient(Err(failure)) => {
                    let failure = with_reported_error(failure, self.closed.backend_error.take());
                    return self.failure(failure, CloseReason::BackendReset, CloseReason::ClientReset);
                }
                Step::TimerFired if self.context.abort.is_cancelled() => return (CloseReason::Aborted, None),
                Step::TimerFired => {
                    self.set_backend_timeouts();
                    self.update_counters();
                    if let Err(failure) = self.check_backlog() {
                        return self.failure(failure, CloseReason::Overload, CloseReason::Overload);
                    }
                    if let Some(reason) = self.idle_reason() {
                        return (reason, None);
                    }
                    let left = (self.last_activity() + self.idle_limit()).duration_since(Instant::now());
                    self.session.schedule(ACCOUNTING_INTERVAL.min(left));
                }
            }
        }
    }

    /// The next thing that happens. It is polled: futures for all that may happen would be most of the memory of an idle
    /// connection.
    fn poll_step(&mut self, task: &mut task::Context<'_>) -> Poll<Step> {
        // A direction that always has something to do must not keep the other from its turn, nor the clock.
        self.turn = self.turn.wrapping_add(1);
        let turn = self.turn;
        if turn.is_multiple_of(STEPS_PER_TIMER_POLL) && self.session.poll_timer(task).is_ready() {
            return Poll::Ready(Step::TimerFired);
        }
        let Self { context, session, client, backend, to_backend, to_client, closed, .. } = self;
        // Of a socket that user space reads, reading says how it ended, after its last byte.
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
        for up_now in [turn.is_multiple_of(2), !turn.is_multiple_of(2)] {
            let stepped = if up_now {
                to_backend.poll_step(task, up).map(Step::ToBackend)
            } else {
                to_client.poll_step(task, down).map(Step::ToClient)
            };
            if stepped.is_ready() {
                return stepped;
            }
        }
        session.poll_timer(task).map(|()| Step::TimerFired)
    }

    /// Takes leave of both sides.
    pub(super) async fn finish(mut self, reason: CloseReason, error: Option<io::Error>) -> CloseOutcome {
        self.update_counters();
        let (to_backend, to_client) = self.accounted;
        let (client_truncated, backend_truncated) =
            (self.to_backend.is_truncated(), self.to_client.is_truncated());
        let Self { client, backend, to_backend: up, to_client: down, .. } = self;
        // The directions leave the kernel's maps before their sockets close.
        drop((up, down));
        let mut left = None;
        match reason {
            CloseReason::NoBanner => {
                backend.reset();
                left = Some(client);
            }
            // Whose words found nobody is told by a reset, after the last of what it was sent.
            _ if reason.clean() => {
                for (endpoint, truncated) in [(client, client_truncated), (backend, backend_truncated)] {
                    if truncated {
                        endpoint.wait_acked(LINGER_TIMEOUT).await;
                        endpoint.reset();
                    }
                }
            }
            // After a loss, or what may be one, neither side may take what it got for the whole. But it gets what there was: what
            // seemed to be the last of it may be waiting for the FIN.
            _ => {
                backend.push_and_reset();
                client.push_and_reset();
            }
        }
        CloseOutcome { reason, error, to_backend, to_client, client: left }
    }

    /// Hands to the kernel what is ripe for it, and asks of the sockets only what is needed.
    fn prepare(&mut self) -> Result<(), (CloseReason, Option<io::Error>)> {
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
                Enrolment::Refused(refused) => {
                    tracing::debug!(target: target::SESSION,
                        direction,
                        reason = refused.reason,
                        detail = refused.detail,
                        "stays relayed"
                    );
                    context.metrics.enrolment_failed(refused.reason);
                }
            }
        }
        let monitor = &context.hangups;
        let client_needs = Interest { read: to_backend.wants_readable(), write: to_client.wants_writable() };
        let backend_needs = Interest { read: to_client.wants_readable(), write: to_backend.wants_writable() };
        client
            .set_interest(client_needs, monitor)
            .and_then(|()| backend.set_interest(backend_needs, monitor))
            .map_err(|error| (CloseReason::Internal, Some(error)))
    }

    /// Four system calls, which a short session does not need. What the backend was sent before counts as well: the kernel
    /// looks how old it is (tcp_write_timeout, net/ipv4/tcp_timer.c).
    fn set_backend_timeouts(&mut self) {
        if self.timeouts_set {
            return;
        }
        self.timeouts_set = true;
        let timeouts = &self.context.timeouts;
        if let Err(error) = self.backend.set_peer_timeouts(timeouts.user_timeout, timeouts.keepalive) {
            let listener = &*self.context.listener;
            tracing::warn!(target: target::SESSION, listener, %error, "cannot set TCP user timeout on the backend socket; only the idle timeout detects a dead backend");
        }
    }

    fn finished(&self) -> bool {
        self.to_backend.next_action() == NextAction::Finished
            && self.to_client.next_action() == NextAction::Finished
    }

    /// A socket that hangs up without an error has finished both ways; but one to which no FIN was sent yet cannot have. It was
    /// reset, and a worker of the kernel that was about to write to it was told, and not we (sk_psock_backlog,
    /// net/core/skmsg.c).
    fn classify_hangup(&self, stepped: Step) -> Step {
        let reset = || Some(io::ErrorKind::ConnectionReset.into());
        match stepped {
            Step::ClientClosed(None) if self.to_client.next_action() != NextAction::Finished => {
                Step::ClientClosed(reset())
            }
            Step::BackendClosed(None) if self.to_backend.next_action() != NextAction::Finished => {
                Step::BackendClosed(reset())
            }
            stepped => stepped,
        }
    }

    fn record_outcome(&mut self, progress: StepOutcome) {
        match progress {
            StepOutcome::Read => self.last_relayed = Instant::now(),
            StepOutcome::Paused => self.context.metrics.held(),
            StepOutcome::MovedToUserSpace => self.context.metrics.moved_to_user_space(),
            StepOutcome::Resumed => self.context.metrics.resumed(),
            StepOutcome::Other => {}
        }
    }

    /// Now and then, without being rung for: a direction that rang too early to be held may have stalled since.
    fn check_backlog(&mut self) -> Result<(), ForwardError> {
        let Self { context, client, backend, to_backend, to_client, .. } = self;
        let (up, down) = both_directions(context, client, backend);
        let outcomes = [to_backend.check_backlog(up)?, to_client.check_backlog(down)?];
        outcomes.into_iter().for_each(|progress| self.record_outcome(progress));
        Ok(())
    }

    /// The first byte of a backend always passes through user space.
    fn record_first_byte(&mut self, progress: StepOutcome) {
        if progress == StepOutcome::Read
            && self.accounted.1 == Bytes::default()
            && !self.to_client.has_read_nothing()
        {
            self.context.metrics.first_byte(self.header_sent.elapsed());
            self.update_counters();
        }
    }

    /// The backend ended before its first byte, while the client still had something to say or to wait for.
    fn lacks_banner(&self) -> bool {
        self.to_client.source_ended()
            && self.to_client.has_read_nothing()
            && !self.client_finished()
            && self.context.expects_banner
    }

    /// Whether the client has said its last; a direction that was given up says nothing of that.
    fn client_finished(&self) -> bool {
        self.to_backend.source_ended() && !self.to_backend.is_truncated()
    }

    fn failure(
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
        };
        let refused = reason == CloseReason::BackendReset
            && self.to_client.has_read_nothing()
            && !self.client_finished()
            && self.context.expects_banner;
        (if refused { CloseReason::NoBanner } else { reason }, error)
    }

    fn idle_limit(&self) -> Duration {
        let half_closed = self.to_backend.source_ended() || self.to_client.source_ended();
        let timeouts = &self.context.timeouts;
        if half_closed { timeouts.half_closed } else { timeouts.idle }
    }

    fn idle_reason(&self) -> Option<CloseReason> {
        if self.last_activity().elapsed() < self.idle_limit() {
            return None;
        }
        let half_closed = self.to_backend.source_ended() || self.to_client.source_ended();
        Some(if half_closed { CloseReason::HalfClosed } else { CloseReason::Idle })
    }

    /// When payload last passed, in whichever plane.
    fn last_activity(&self) -> Instant {
        let spliced = self.to_backend.last_spliced_ns().max(self.to_client.last_spliced_ns());
        let since = crate::os::clock::monotonic_ns().saturating_sub(spliced);
        let spliced = Instant::now().checked_sub(Duration::from_nanos(since));
        spliced.map_or(self.last_relayed, |spliced| spliced.max(self.last_relayed))
    }

    /// Brings the byte counters up to date.
    fn update_counters(&mut self) {
        let (to_backend, to_client) = (self.to_backend.bytes(), self.to_client.bytes());
        self.context
            .metrics
            .bytes(bytes_since(to_backend, self.accounted.0), bytes_since(to_client, self.accounted.1));
        self.session.set_bytes(to_backend.total(), to_client.total());
        self.accounted = (to_backend, to_client);
    }
}

enum Step {
    ToBackend(Result<StepOutcome, ForwardError>),
    ToClient(Result<StepOutcome, ForwardError>),
    ClientClosed(Option<io::Error>),
    BackendClosed(Option<io::Error>),
    /// By the clock, or because all are cut.
    TimerFired,
}

/// A source that is broken for the reason that a write to the same socket was told.
fn with_reported_error(failure: ForwardError, reason: Option<io::Error>) -> ForwardError {
    match (failure, reason) {
        (ForwardError::Source(error), Some(reason)) if error.raw_os_error().is_none() => {
            ForwardError::Source(reason)
        }
        (failure, _) => failure,
    }
}

/// To the backend, and to the client.
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
