//! One direction of a connection: carries out the actions of [`Direction`] as reads, writes and
//! enrolments.

mod read;

use std::{
    io,
    task::{self, Poll, ready},
    time::Duration,
};

use bytes::BytesMut;

use super::{
    backlog::{BackpressureAction, decide_backpressure},
    backoff::Backoff,
    context::Context,
    dialogue::{ServerLines, is_text},
    direction::{DataPath, Direction, NextAction},
    enrolment::{Enrolment, should_enrol},
    pending_write::PendingWrite,
    step::{DirectionIo, ForwardError, StepOutcome},
};
use crate::{
    engine::{ResumeOutcome, SplicedDirection},
    net::socket::Endpoint,
    os::sockopt,
    protocol::{FirstSpeaker, Protocol},
    telemetry::{backlog::BacklogShare, outcome::Bytes},
};

/// The longest pause between two checks whether a finished direction was delivered.
const MAX_DELIVERY_BACKOFF: Duration = Duration::from_millis(4);
/// The longest pause between two checks whether a target has caught up.
const MAX_DRAIN_BACKOFF: Duration = Duration::from_millis(16);

/// Whether the target has acknowledged most of what was written to it.
fn keeps_up(context: &Context, target: &Endpoint) -> io::Result<bool> {
    Ok(sockopt::unacknowledged(target)? <= context.watermarks.low)
}

/// One direction of a connection.
///
/// Most connections are idle, so state that exists seldom is on the heap.
#[derive(Debug)]
pub(super) struct HalfDuplex {
    direction: Direction,
    /// Never empty.
    pending_write: Option<Box<PendingWrite>>,
    /// Bytes that were read into pipes.
    piped: u64,
    /// Bulk reads in a row.
    bulk_reads: u32,
    /// Reads in user space that were not bulk.
    messages: u32,
    /// Set once the direction was enrolled, and kept.
    spliced_state: Option<Box<SplicedState>>,
    /// The engine has refused the direction, or never enrols.
    splice_disabled: bool,
    /// The client's first bytes, which were forwarded although they begin like a PROXY header: no
    /// more came in time. The check continues with what follows.
    released_prefix: Option<Box<[u8]>>,
    /// Every payload that was not bulk was text, and so may this one be: not TLS.
    is_text: bool,
    /// The lines of a server that speaks first, in clear text.
    server: Option<Box<ServerLines>>,
    /// The protocol of a client that sends commands in clear text.
    commands: Option<Protocol>,
    /// The last payload that user space read ended with the command that ends the session.
    has_quit: bool,
    /// Abandoned before its end: the source's peer believes that bytes were delivered that were
    /// not.
    truncated: bool,
    /// The pause before the next check of a condition that the kernel does not notify of.
    backoff: Backoff,
    /// The direction's backlog in the kernel.
    backlog_share: BacklogShare,
}

/// The state of a direction that was enrolled in the kernel.
#[derive(Debug)]
struct SplicedState {
    spliced: Box<dyn SplicedDirection>,
    /// Bytes that user space had read at the enrolment.
    read_before: u64,
    /// Bytes that user space had read when it last proposed to resume. It proposes once for the
    /// same count: if the kernel did not resume, there is more to read.
    proposed_at: u64,
    /// Spurious ends of file in a row.
    spurious_eofs: u32,
}

impl HalfDuplex {
    /// A direction of which `read` bytes were read before and `pending` is not yet written. While
    /// it is `awaiting_check`, the first bytes are checked for a forged header.
    pub(super) fn new(read: u64, pending: BytesMut, awaiting_check: bool, context: &Context) -> Self {
        let is_text = is_text(&pending);
        Self {
            direction: Direction::new(read, pending.len(), awaiting_check),
            pending_write: (!pending.is_empty()).then(|| Box::new(PendingWrite::new(pending))),
            piped: 0,
            bulk_reads: 0,
            messages: u32::from(read > 0),
            spliced_state: None,
            splice_disabled: false,
            released_prefix: None,
            is_text,
            server: None,
            commands: None,
            has_quit: false,
            truncated: false,
            backoff: Backoff::default(),
            backlog_share: context.backlog_total.share(),
        }
    }

    pub(super) fn next_action(&self) -> NextAction {
        self.direction.next_action()
    }

    pub(super) fn source_ended(&self) -> bool {
        self.direction.source_ended()
    }

    /// Whether the direction was abandoned before its end.
    pub(super) fn is_truncated(&self) -> bool {
        self.truncated
    }

    /// Whether nothing was read from the source so far. The first bytes are always read in user
    /// space.
    pub(super) fn has_read_nothing(&self) -> bool {
        self.direction.read_bytes() == 0
    }

    /// Reads the lines of the source, a server, if it speaks first.
    pub(super) fn with_server(mut self, protocol: Protocol) -> Self {
        if protocol.speaks_first() == FirstSpeaker::Server {
            self.server = Some(Box::new(ServerLines::new(protocol)));
        }
        self
    }

    /// Looks for the command of the source, a client, that ends the session, if the server speaks first.
    pub(super) fn with_client(mut self, protocol: Protocol) -> Self {
        self.commands = (protocol.speaks_first() == FirstSpeaker::Server).then_some(protocol);
        self
    }

    /// Whether the source, a client, has ended the session by a command. Not known of what the kernel
    /// forwarded.
    pub(super) fn has_quit(&self) -> bool {
        self.has_quit
    }

    /// The client has sent a byte.
    pub(super) fn client_spoke(&mut self) {
        if let Some(server) = &mut self.server {
            server.client_spoke();
        }
    }

    /// Whether everything that user space has read is text, and it has read everything.
    pub(super) fn is_text(&self) -> bool {
        self.is_text && !self.was_spliced()
    }

    /// Whether the target may get a line of the injector behind what it was sent.
    pub(super) fn may_be_followed(&self) -> bool {
        self.pending_write.is_none()
            && !self.was_spliced()
            && self.server.as_ref().is_some_and(|server| server.may_be_followed())
    }

    /// How long bytes have been held that may be the start of a forged header.
    pub(super) fn held_for(&self) -> Option<Duration> {
        let pending_write = self.pending_write.as_ref().filter(|_| self.direction.is_awaiting_check())?;
        Some(pending_write.since.elapsed())
    }

    /// Forwards the bytes that were held. What follows is still checked together with them.
    pub(super) fn release_prefix(&mut self) {
        self.released_prefix =
            self.pending_write.as_ref().map(|pending_write| (&*pending_write.bytes).into());
        self.direction.check_passed();
    }

    /// Whether the kernel has forwarded payload of this direction.
    pub(super) fn was_spliced(&self) -> bool {
        self.spliced_state.is_some()
    }

    /// Gives up the direction, because the target accepts nothing any more.
    pub(super) fn abandon(&mut self) {
        self.truncated |= self.next_action() != NextAction::Finished;
        self.direction.abandon();
        self.pending_write = None;
        self.backoff.reset();
        self.backlog_share.set(0);
    }

    /// Whether the end of file that a read has just returned is the source's FIN, behind everything
    /// that it sent.
    fn eof_is_fin(&self, source: &Endpoint) -> bool {
        // Reading the kernel's counts is expensive for short sessions.
        (self.spliced_state.is_none() && source.eof_is_fin()) || self.is_complete(source)
    }

    /// Whether `source` has received a FIN and this direction has taken every byte before it. A
    /// reset looks like an end of file to epoll, and to recv(2) once its error was fetched. Only
    /// the byte count distinguishes them: a FIN counts as one byte.
    pub(super) fn is_complete(&self, source: &Endpoint) -> bool {
        // The kernel may still process the last segment although it has reported the FIN. This call
        // waits for that; only then is the flow's count final.
        let Ok(info) = sockopt::tcp_info(source) else { return false };
        info.bytes_received == self.direction.read_bytes() + self.flow().redirected + 1
    }

    /// Whether the kernel redirects what the source receives. Then no read can report how the
    /// source ended.
    pub(super) fn is_spliced(&self) -> bool {
        self.direction.path() == DataPath::Spliced
    }

    pub(super) fn reads_source(&self) -> bool {
        self.wants_readable() && !self.direction.source_ended()
    }

    /// Whether user space polls the source for data. It need not after the FIN, but to deregister
    /// would gain nothing.
    pub(super) fn wants_readable(&self) -> bool {
        matches!(self.direction.path(), DataPath::Relayed | DataPath::Resuming)
    }

    /// Whether user space polls the target for room.
    pub(super) fn wants_writable(&self) -> bool {
        self.direction.path() == DataPath::Relayed
    }

    /// Bytes forwarded so far.
    pub(super) fn bytes(&self) -> Bytes {
        let relayed = self.direction.read_bytes().saturating_sub(self.piped);
        Bytes { relayed, piped: self.piped, spliced: self.flow().redirected }
    }

    /// When the kernel last forwarded payload: nanoseconds of `CLOCK_MONOTONIC`, 0 for never.
    pub(super) fn last_spliced_ns(&self) -> u64 {
        self.flow().last_ns
    }

    fn flow(&self) -> injector_common::splice::Flow {
        self.spliced_state
            .as_ref()
            .and_then(|spliced_state| spliced_state.spliced.flow().ok())
            .unwrap_or_default()
    }

    /// Enrols the direction in the kernel if the policy says so and no byte is pending. A refusal
    /// is returned once; after it the direction stays in user space.
    pub(super) fn enrol(&mut self, io: DirectionIo<'_>, age: impl FnOnce() -> Duration) -> Enrolment {
        let DirectionIo { context, source, target } = io;
        if self.splice_disabled || self.released_prefix.is_some() || !self.direction.can_splice() {
            return Enrolment::NotNow;
        }
        if !should_enrol(&context.enrolment, self.messages.into(), self.direction.read_bytes(), age) {
            return Enrolment::NotNow;
        }
        if self.spliced_state.is_some() {
            return self.propose_resume(context, target).map_or_else(Enrolment::Lost, |()| Enrolment::NotNow);
        }
        // What a fast source has on its way would wait in the kernel for a target that does not keep up.
        if !source.recv_drained() || !keeps_up(context, target).unwrap_or(false) {
            return Enrolment::NotNow;
        }
        let read = self.direction.read_bytes();
        match context.engine.enrol(source, target, read) {
            Some(Ok(spliced)) => {
                let spliced_state =
                    SplicedState { spliced, read_before: read, proposed_at: 0, spurious_eofs: 0 };
                self.spliced_state = Some(Box::new(spliced_state));
                self.direction.spliced();
                Enrolment::Done
            }
            Some(Err(refused)) => {
                self.splice_disabled = true;
                Enrolment::Refused(refused)
            }
            None => {
                self.splice_disabled = true;
                Enrolment::NotNow
            }
        }
    }

    /// Proposes to the kernel to resume, once the target has acknowledged most of what user space
    /// wrote.
    fn propose_resume(&mut self, context: &Context, target: &Endpoint) -> io::Result<()> {
        let Some(spliced_state) = &mut self.spliced_state else { return Ok(()) };
        let read = self.direction.read_bytes();
        if read == spliced_state.proposed_at || !keeps_up(context, target)? {
            return Ok(());
        }
        spliced_state.proposed_at = read;
        if spliced_state.spliced.propose_resume(read - spliced_state.read_before)? {
            self.direction.resume_proposed();
        }
        Ok(())
    }

    /// Carries out the direction's next action once it is possible.
    pub(super) fn poll_step(
        &mut self,
        task: &mut task::Context<'_>,
        io: DirectionIo<'_>,
    ) -> Poll<Result<StepOutcome, ForwardError>> {
        let target = io.target;
        ready!(self.backoff.poll_elapsed(task));
        match self.direction.next_action() {
            NextAction::Read => return self.poll_read(task, io),
            NextAction::Write => {
                let Some(pending_write) = &mut self.pending_write else { return Poll::Pending };
                let written = ready!(pending_write.poll_write(task, target)).map_err(ForwardError::Target)?;
                self.pending_write.take_if(|pending_write| pending_write.is_empty());
                self.direction.wrote(written);
            }
            NextAction::AwaitFin => return self.poll_spliced(task, io),
            NextAction::AwaitDrain => return self.poll_drain(task, io),
            NextAction::AwaitResume => return self.poll_resume(task, io),
            NextAction::AwaitDelivery => return self.poll_delivered(task, io),
            NextAction::SendFin => {
                target.finish().map_err(ForwardError::Target)?;
                self.direction.fin_sent();
                self.backlog_share.set(0);
            }
            NextAction::Finished => return Poll::Pending,
        }
        Poll::Ready(Ok(StepOutcome::Other))
    }

    fn spliced(&self) -> Result<&dyn SplicedDirection, ForwardError> {
        let missing = || ForwardError::Lost(io::ErrorKind::NotFound.into());
        self.spliced_state.as_ref().map(|spliced_state| &*spliced_state.spliced).ok_or_else(missing)
    }

    /// While the kernel forwards: waits for the source's FIN, and checks the backlog when notified.
    fn poll_spliced(
        &mut self,
        task: &mut task::Context<'_>,
        io: DirectionIo<'_>,
    ) -> Poll<Result<StepOutcome, ForwardError>> {
        if self.spliced()?.backlog_notify().poll_notified(task).is_ready() {
            return Poll::Ready(self.check_backlog(io));
        }
        ready!(io.source.poll_finished(task));
        self.direction.source_finished();
        Poll::Ready(Ok(StepOutcome::Other))
    }

    /// Checks the backlog, and pauses the direction if it is too large.
    pub(super) fn check_backlog(&mut self, io: DirectionIo<'_>) -> Result<StepOutcome, ForwardError> {
        let DirectionIo { context, source, target } = io;
        let Some(spliced_state) = &self.spliced_state else { return Ok(StepOutcome::Other) };
        if self.direction.next_action() != NextAction::AwaitFin {
            return Ok(StepOutcome::Other);
        }
        let spliced = &spliced_state.spliced;
        let backlog = spliced.backlog(target).map_err(ForwardError::Lost)?;
        let total = self.backlog_share.set(backlog.bytes);
        match decide_backpressure(&context.watermarks, backlog.bytes, total) {
            BackpressureAction::Reset => return Err(ForwardError::Overload),
            BackpressureAction::Pause if !backlog.paused => {
                spliced.pause(source).map_err(ForwardError::Lost)?
            }
            BackpressureAction::Continue if !backlog.paused => {
                spliced.grant(source, target, backlog.queued).map_err(ForwardError::Lost)?;
                return Ok(StepOutcome::Other);
            }
            BackpressureAction::Continue | BackpressureAction::Pause => {}
        }
        self.direction.paused();
        Ok(StepOutcome::Paused)
    }

    /// While the direction is paused: waits until the backlog is in the target's send queue. Then
    /// user space forwards.
    fn poll_drain(
        &mut self,
        task: &mut task::Context<'_>,
        io: DirectionIo<'_>,
    ) -> Poll<Result<StepOutcome, ForwardError>> {
        let DirectionIo { context, target, .. } = io;
        let backlog = self.spliced()?.backlog(target).map_err(ForwardError::Lost)?;
        let total = self.backlog_share.set(backlog.bytes);
        if backlog.bytes == 0 {
            self.backoff.reset();
            self.direction.moved_to_user_space();
            return Poll::Ready(Ok(StepOutcome::MovedToUserSpace));
        }
        if decide_backpressure(&context.watermarks, backlog.bytes, total) == BackpressureAction::Reset {
            return Poll::Ready(Err(ForwardError::Overload));
        }
        self.backoff.extend(0, MAX_DRAIN_BACKOFF, task);
        Poll::Pending
    }

    /// After a proposal to resume: waits until the kernel has resumed, or there is more to read.
    fn poll_resume(
        &mut self,
        task: &mut task::Context<'_>,
        io: DirectionIo<'_>,
    ) -> Poll<Result<StepOutcome, ForwardError>> {
        let DirectionIo { source, target, .. } = io;
        let spliced = self.spliced()?;
        let mut resumed = false;
        // The notification may be from before the proposal, when the direction was paused.
        while !resumed && spliced.backlog_notify().poll_notified(task).is_ready() {
            resumed = spliced.flow().map_err(ForwardError::Lost)?.passing == 0;
        }
        if !resumed {
            ready!(source.poll_readable(task)).map_err(ForwardError::Source)?;
        }
        Poll::Ready(Ok(match spliced.cancel_resume(source, target).map_err(ForwardError::Lost)? {
            ResumeOutcome::Resumed => {
                self.direction.resumed();
                StepOutcome::Resumed
            }
            ResumeOutcome::Paused => {
                self.direction.paused();
                StepOutcome::Paused
            }
            ResumeOutcome::Cancelled => {
                self.direction.resume_cancelled();
                StepOutcome::Other
            }
        }))
    }

    /// After the source's FIN: waits until every byte is in the target's send queue, or the kernel
    /// has left some of them to user space.
    fn poll_delivered(
        &mut self,
        task: &mut task::Context<'_>,
        io: DirectionIo<'_>,
    ) -> Poll<Result<StepOutcome, ForwardError>> {
        let DirectionIo { source, target, .. } = io;
        let spliced = self.spliced()?;
        if spliced.delivered(source, target, self.direction.read_bytes()).map_err(ForwardError::Lost)? {
            self.backoff.reset();
            self.direction.delivered();
            return Poll::Ready(Ok(StepOutcome::Other));
        }
        if spliced.backlog(target).map_err(ForwardError::Lost)?.paused {
            self.backoff.reset();
            self.direction.paused();
            return Poll::Ready(Ok(StepOutcome::Paused));
        }
        // Most often the kernel worker has filled the target's queue by now, or needs this
        // processor.
        self.backoff.extend(2, MAX_DELIVERY_BACKOFF, task);
        Poll::Pending
    }
}
