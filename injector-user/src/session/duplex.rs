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
    Context,
    direction::NextAction,
    half_duplex::{DirectionIo, Enrolment, ForwardError, HalfDuplex, StepOutcome},
    registry::Handle,
};
use crate::{
    net::socket::{Endpoint, Interest},
    telemetry::{
        log::target,
        outcome::{Bytes, CloseReason},
    },
};

/// How often the counters of a long connection are brought up to date.
const ACCOUNT_EVERY: Duration = Duration::from_secs(5);

/// How long a peer may take what it was sent last, before it is told by a reset that its own words found nobody.
const LAST_WORDS: Duration = Duration::from_secs(30);

/// So many steps are made for each look at the clock, where there is always one to make.
const CLOCK_EVERY: u8 = 32;

/// A connection whose header is sent.
#[derive(Debug)]
pub(super) struct Pump {
    context: Arc<Context>,
    row: Handle,
    client: Endpoint,
    backend: Endpoint,
    to_backend: HalfDuplex,
    to_client: HalfDuplex,
    header_sent: Instant,
    /// When payload last passed through user space.
    last: Instant,
    accounted: (Bytes, Bytes),
    backend_finished_first: bool,
    gone: Gone,
    /// The kernel knows when to give up a backend that does not answer. Of the client it knows from the beginning.
    lasts: bool,
    /// Counts steps.
    turn: u8,
}

/// Which socket takes nothing any more, its peer having closed for good. What the peer sent before its FIN is still
/// delivered to the other side.
#[derive(Debug, Default)]
struct Gone {
    client: bool,
    backend: bool,
    /// Why, where a write was told: the kernel tells once, and whoever reads then sees an end without a reason.
    client_error: Option<io::Error>,
    backend_error: Option<io::Error>,
}

/// How the pump stopped.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) reason: CloseReason,
    pub(super) error: Option<io::Error>,
    pub(super) to_backend: Bytes,
    pub(super) to_client: Bytes,
    /// Still open where the client can be told something in its own protocol.
    pub(super) client: Option<Endpoint>,
}

impl Pump {
    /// `read` bytes of the client were read before, of which `held` are not written yet.
    pub(super) fn new(
        context: Arc<Context>,
        row: Handle,
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
            row,
            client,
            backend,
            header_sent: now,
            last: now,
            accounted: Default::default(),
            backend_finished_first: false,
            gone: Gone::default(),
            lasts: false,
            turn: 0,
        }
    }

    /// What it shares with others.
    pub(super) fn context(&self) -> Arc<Context> {
        Arc::clone(&self.context)
    }

    /// Until both directions are finished or something breaks.
    pub(super) async fn carry(&mut self) -> (CloseReason, Option<io::Error>) {
        let first_look =
            ACCOUNT_EVERY.min(self.silence_allowed()).min(self.context.timeouts.user_timeout / 2);
        self.row.call_in(first_look);
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
            match self.explained(stepped) {
                Step::ToBackend(Ok(StepOutcome::Resumed))
                    if self.gone.client && !self.to_backend.is_complete(&self.client) =>
                {
                    return (CloseReason::ClientReset, None);
                }
                Step::ToClient(Ok(StepOutcome::Resumed))
                    if self.gone.backend && !self.to_client.is_complete(&self.backend) =>
                {
                    return (CloseReason::BackendReset, None);
                }
                Step::ToBackend(Ok(progress)) => self.note(progress),
                Step::ToClient(Ok(progress)) => {
                    self.note_first_byte(progress);
                    self.note(progress);
                    if self.no_banner() {
                        return (CloseReason::NoBanner, None);
                    }
                    self.backend_finished_first |=
                        self.to_client.source_ended() && !self.to_backend.source_ended();
                }
                Step::ToBackend(Err(ForwardError::Target(error))) | Step::BackendGone(Some(error)) => {
                    self.gone.backend = true;
                    self.backend_finished_first |= !self.to_backend.source_ended();
                    self.to_backend.abandon();
                    if self.to_client.is_spliced() && !self.to_client.is_complete(&self.backend) {
                        return self.broken(
                            ForwardError::Target(error),
                            CloseReason::ClientReset,
                            CloseReason::BackendReset,
                        );
                    }
                    self.gone.backend_error = Some(error);
                }
                Step::ToClient(Err(ForwardError::Target(error))) | Step::ClientGone(Some(error)) => {
                    self.gone.client = true;
                    self.to_client.abandon();
                    if self.to_backend.is_spliced() && !self.to_backend.is_complete(&self.client) {
                        return self.broken(
                            ForwardError::Target(error),
                            CloseReason::BackendReset,
                            CloseReason::ClientReset,
                        );
                    }
                    self.gone.client_error = Some(error);
                }
                // Both have said their last, without an error: what was received is still passed on.
                Step::BackendGone(None) => self.gone.backend = true,
                Step::ClientGone(None) => self.gone.client = true,
                Step::ToBackend(Err(broken)) => {
                    let broken = known(broken, self.gone.client_error.take());
                    return self.broken(broken, CloseReason::ClientReset, CloseReason::BackendReset);
                }
                Step::ToClient(Err(broken)) => {
                    let broken = known(broken, self.gone.backend_error.take());
                    return self.broken(broken, CloseReason::BackendReset, CloseReason::ClientReset);
                }
                Step::Called if self.context.cut.is_cancelled() => return (CloseReason::Aborted, None),
                Step::Called => {
                    self.give_up_in_time();
                    self.account();
                    if let Err(broken) = self.check_backlog() {
                        return self.broken(broken, CloseReason::Overload, CloseReason::Overload);
                    }
                    if let Some(reason) = self.silent_too_long() {
                        return (reason, None);
                    }
                    let left = (self.last_activity() + self.silence_allowed()).duration_since(Instant::now());
                    self.row.call_in(ACCOUNT_EVERY.min(left));
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
        if turn.is_multiple_of(CLOCK_EVERY) && self.row.poll_called(task).is_ready() {
            return Poll::Ready(Step::Called);
        }
        let Self { context, row, client, backend, to_backend, to_client, gone, .. } = self;
        // Of a socket that user space reads, reading says how it ended, after its last byte.
        let (hear_client, hear_backend) = (!to_backend.reads_source(), !to_client.reads_source());
        if hear_client
            && !gone.client
            && let Poll::Ready(error) = client.poll_closed(task)
        {
            return Poll::Ready(Step::ClientGone(error));
        }
        if hear_backend
            && !gone.backend
            && let Poll::Ready(error) = backend.poll_closed(task)
        {
            return Poll::Ready(Step::BackendGone(error));
        }
        let (up, down) = both_ways(context, client, backend);
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
        row.poll_called(task).map(|()| Step::Called)
    }

    /// Takes leave of both sides.
    pub(super) async fn finish(mut self, reason: CloseReason, error: Option<io::Error>) -> Outcome {
        self.account();
        let (to_backend, to_client) = self.accounted;
        let (client_cut, backend_cut) = (self.to_backend.is_truncated(), self.to_client.is_truncated());
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
                for (endpoint, cut) in [(client, client_cut), (backend, backend_cut)] {
                    if cut {
                        endpoint.wait_acked(LAST_WORDS).await;
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
        Outcome { reason, error, to_backend, to_client, client: left }
    }

    /// Hands to the kernel what is ripe for it, and asks of the sockets only what is needed.
    fn prepare(&mut self) -> Result<(), (CloseReason, Option<io::Error>)> {
        let Self { client, backend, to_backend, to_client, context, header_sent, .. } = self;
        let age = || header_sent.elapsed();
        let (up, down) = both_ways(context, client, backend);
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
        let of_client = Interest { read: to_backend.wants_readable(), write: to_client.wants_writable() };
        let of_backend = Interest { read: to_client.wants_readable(), write: to_backend.wants_writable() };
        client
            .set_interest(of_client, monitor)
            .and_then(|()| backend.set_interest(of_backend, monitor))
            .map_err(|error| (CloseReason::Internal, Some(error)))
    }

    /// Four system calls, which a short session does not need. What the backend was sent before counts as well: the kernel
    /// looks how old it is (tcp_write_timeout, net/ipv4/tcp_timer.c).
    fn give_up_in_time(&mut self) {
        if self.lasts {
            return;
        }
        self.lasts = true;
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
    fn explained(&self, stepped: Step) -> Step {
        let reset = || Some(io::ErrorKind::ConnectionReset.into());
        match stepped {
            Step::ClientGone(None) if self.to_client.next_action() != NextAction::Finished => {
                Step::ClientGone(reset())
            }
            Step::BackendGone(None) if self.to_backend.next_action() != NextAction::Finished => {
                Step::BackendGone(reset())
            }
            stepped => stepped,
        }
    }

    fn note(&mut self, progress: StepOutcome) {
        match progress {
            StepOutcome::Read => self.last = Instant::now(),
            StepOutcome::Paused => self.context.metrics.held(),
            StepOutcome::MovedToUserSpace => self.context.metrics.moved_to_user_space(),
            StepOutcome::Resumed => self.context.metrics.resumed(),
            StepOutcome::Other => {}
        }
    }

    /// Now and then, without being rung for: a direction that rang too early to be held may have stalled since.
    fn check_backlog(&mut self) -> Result<(), ForwardError> {
        let Self { context, client, backend, to_backend, to_client, .. } = self;
        let (up, down) = both_ways(context, client, backend);
        let outcomes = [to_backend.check_backlog(up)?, to_client.check_backlog(down)?];
        outcomes.into_iter().for_each(|progress| self.note(progress));
        Ok(())
    }

    /// The first byte of a backend always passes through user space.
    fn note_first_byte(&mut self, progress: StepOutcome) {
        if progress == StepOutcome::Read
            && self.accounted.1 == Bytes::default()
            && !self.to_client.has_read_nothing()
        {
            self.context.metrics.first_byte(self.header_sent.elapsed());
            self.account();
        }
    }

    /// The backend ended before its first byte, while the client still had something to say or to wait for.
    fn no_banner(&self) -> bool {
        self.to_client.source_ended()
            && self.to_client.has_read_nothing()
            && !self.client_finished()
            && self.context.expects_banner
    }

    /// Whether the client has said its last; a direction that was given up says nothing of that.
    fn client_finished(&self) -> bool {
        self.to_backend.source_ended() && !self.to_backend.is_truncated()
    }

    fn broken(
        &self,
        broken: ForwardError,
        source: CloseReason,
        target: CloseReason,
    ) -> (CloseReason, Option<io::Error>) {
        let (reason, error) = match broken {
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

    fn silence_allowed(&self) -> Duration {
        let half_closed = self.to_backend.source_ended() || self.to_client.source_ended();
        let timeouts = &self.context.timeouts;
        if half_closed { timeouts.half_closed } else { timeouts.idle }
    }

    fn silent_too_long(&self) -> Option<CloseReason> {
        if self.last_activity().elapsed() < self.silence_allowed() {
            return None;
        }
        let half_closed = self.to_backend.source_ended() || self.to_client.source_ended();
        Some(if half_closed { CloseReason::HalfClosed } else { CloseReason::Idle })
    }

    /// When payload last passed, in whichever plane.
    fn last_activity(&self) -> Instant {
        let carried = self.to_backend.last_spliced_ns().max(self.to_client.last_spliced_ns());
        let since = crate::os::clock::monotonic_ns().saturating_sub(carried);
        let carried = Instant::now().checked_sub(Duration::from_nanos(since));
        carried.map_or(self.last, |carried| carried.max(self.last))
    }

    /// Brings the byte counters up to date.
    fn account(&mut self) {
        let (to_backend, to_client) = (self.to_backend.bytes(), self.to_client.bytes());
        self.context
            .metrics
            .bytes(difference(to_backend, self.accounted.0), difference(to_client, self.accounted.1));
        self.row.carried(to_backend.total(), to_client.total());
        self.accounted = (to_backend, to_client);
    }
}

enum Step {
    ToBackend(Result<StepOutcome, ForwardError>),
    ToClient(Result<StepOutcome, ForwardError>),
    ClientGone(Option<io::Error>),
    BackendGone(Option<io::Error>),
    /// By the clock, or because all are cut.
    Called,
}

/// A source that is broken for the reason that a write to the same socket was told.
fn known(broken: ForwardError, reason: Option<io::Error>) -> ForwardError {
    match (broken, reason) {
        (ForwardError::Source(error), Some(reason)) if error.raw_os_error().is_none() => {
            ForwardError::Source(reason)
        }
        (broken, _) => broken,
    }
}

/// To the backend, and to the client.
fn both_ways<'a>(
    context: &'a Context,
    client: &'a Endpoint,
    backend: &'a Endpoint,
) -> (DirectionIo<'a>, DirectionIo<'a>) {
    let io = |source, target| DirectionIo { context, source, target };
    (io(client, backend), io(backend, client))
}

fn difference(now: Bytes, before: Bytes) -> Bytes {
    Bytes {
        relayed: now.relayed.saturating_sub(before.relayed),
        piped: now.piped.saturating_sub(before.piped),
        spliced: now.spliced.saturating_sub(before.spliced),
    }
}
