//! One direction of a connection, carried out: the wishes of [`Direction`] as reads, writes and enrolments.

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
    direction::{DataPath, Direction, NextAction},
    enrolment::{Enrolment, should_enrol},
    pending_write::{PendingWrite, take},
    step::{DirectionIo, ForwardError, StepOutcome},
};
use crate::{
    engine::{ResumeOutcome, SplicedDirection},
    net::{
        socket::{Endpoint, RETRY_DELAY},
        splice_pipe::Pipe,
    },
    os::sockopt,
    telemetry::{backlog::BacklogShare, outcome::Bytes},
};

/// Longest pause between two looks whether a finished direction has been delivered.
const MAX_DELIVERY_BACKOFF: Duration = Duration::from_millis(4);
/// Ends of file in a row, a millisecond apart, after which one is believed to be a reset.
const MAX_SPURIOUS_EOFS: u32 = 2000;
/// Longest pause between two looks whether a target has caught up.
const MAX_DRAIN_BACKOFF: Duration = Duration::from_millis(16);

/// Payload of at least so many bytes is bulk, which a pipe carries better than a buffer.
const BULK_SIZE: usize = 16 * 1024;
/// So many of these in a row, and a pipe is taken for the next.
const MIN_BULK_READS: u32 = 2;

/// One direction.
///
/// There are two to a connection, and most connections are idle: what is seldom there is on the heap.
#[derive(Debug)]
pub(super) struct HalfDuplex {
    direction: Direction,
    /// Holds something, if it is there.
    pending_write: Option<Box<PendingWrite>>,
    /// Bytes that went into pipes.
    piped: u64,
    /// Large payloads in a row.
    bulk_reads: u32,
    /// Payloads read in user space that were not bulk.
    messages: u32,
    /// Once the kernel has had the direction.
    spliced_state: Option<Box<SplicedState>>,
    /// The engine refused this direction once, or never carries any.
    splice_disabled: bool,
    /// Given up before its end: the source has been told that bytes arrived which nobody took.
    truncated: bool,
    /// Until the next look at what nothing tells of.
    backoff: Backoff,
    /// What waits in the kernel for the target.
    backlog_share: BacklogShare,
}

/// A direction in the kernel's hands.
#[derive(Debug)]
struct SplicedState {
    spliced: Box<dyn SplicedDirection>,
    /// What user space had read when the kernel first took over.
    read_before: u64,
    /// What user space had read when it last offered the direction to the kernel. Once is enough for what was read: if
    /// the offer came to nothing, there is more to read.
    proposed_at: u64,
    /// How often in a row there was an end of file, and then there was none.
    spurious_eofs: u32,
}

impl HalfDuplex {
    /// A direction of which `held` was read before and not yet written. While `gated`, the first bytes are examined
    /// for a forged header.
    pub(super) fn new(read: u64, held: BytesMut, awaiting_check: bool, context: &Context) -> Self {
        Self {
            direction: Direction::new(read, held.len(), awaiting_check),
            pending_write: (!held.is_empty()).then(|| Box::new(PendingWrite { bytes: held, pipe: None })),
            piped: 0,
            bulk_reads: 0,
            messages: u32::from(read > 0),
            spliced_state: None,
            splice_disabled: false,
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

    /// Whether it was given up before its end.
    pub(super) fn is_truncated(&self) -> bool {
        self.truncated
    }

    /// Whether the source has ever been read in user space; it is, before the kernel takes over.
    pub(super) fn has_read_nothing(&self) -> bool {
        self.direction.read_bytes() == 0
    }

    /// The target takes nothing any more.
    pub(super) fn abandon(&mut self) {
        self.truncated |= self.next_action() != NextAction::Finished;
        self.direction.abandon();
        self.pending_write = None;
        self.backoff.reset();
        self.backlog_share.set(0);
    }

    /// Whether the end of file that `source` was just read to is its FIN, behind all that it sent.
    fn eof_is_fin(&self, source: &Endpoint) -> bool {
        // Asking the kernel for its counts is dear where sessions are short.
        (self.spliced_state.is_none() && source.eof_is_fin()) || self.is_complete(source)
    }

    /// Whether `source` has sent a FIN, and all before it has passed on through this lane. A reset looks like an end
    /// of file to epoll, and to recv(2) once its error was fetched; only the count tells, in which a FIN is one.
    pub(super) fn is_complete(&self, source: &Endpoint) -> bool {
        // The kernel may be working on the last segment, having announced its FIN already: asking waits for that, and
        // only then is the flow's count final.
        let Ok(info) = sockopt::tcp_info(source) else { return false };
        info.bytes_received == self.direction.read_bytes() + self.flow().redirected + 1
    }

    /// Whether the kernel takes what the source sends away at once: then nothing waits to be read that could say how it
    /// ended.
    pub(super) fn is_spliced(&self) -> bool {
        self.direction.path() == DataPath::Spliced
    }

    pub(super) fn reads_source(&self) -> bool {
        self.wants_readable() && !self.direction.source_ended()
    }

    /// Whether user space is to be told of what the source sends. When that has finished there is nothing more to be told, but
    /// nothing to be gained either by asking for less.
    pub(super) fn wants_readable(&self) -> bool {
        matches!(self.direction.path(), DataPath::Relayed | DataPath::Resuming)
    }

    /// Whether user space is to be told of room at the target.
    pub(super) fn wants_writable(&self) -> bool {
        self.direction.path() == DataPath::Relayed
    }

    /// Bytes so far.
    pub(super) fn bytes(&self) -> Bytes {
        let relayed = self.direction.read_bytes().saturating_sub(self.piped);
        Bytes { relayed, piped: self.piped, spliced: self.flow().redirected }
    }

    /// `CLOCK_MONOTONIC` of the last payload that the kernel carried, in nanoseconds; 0 if none.
    pub(super) fn last_spliced_ns(&self) -> u64 {
        self.flow().last_ns
    }

    fn flow(&self) -> injector_common::splice::Flow {
        self.spliced_state
            .as_ref()
            .and_then(|spliced_state| spliced_state.spliced.flow().ok())
            .unwrap_or_default()
    }

    /// Hands the direction to the kernel if it is the moment: enough has gone through user space for it to pay, and
    /// nothing is held. Returns why the engine refused, the once that it does.
    pub(super) fn enrol(&mut self, io: DirectionIo<'_>, age: impl FnOnce() -> Duration) -> Enrolment {
        let DirectionIo { context, source, target } = io;
        if self.splice_disabled || !self.direction.can_splice() {
            return Enrolment::NotNow;
        }
        if !should_enrol(&context.enrolment, self.messages.into(), self.direction.read_bytes(), age) {
            return Enrolment::NotNow;
        }
        if self.spliced_state.is_some() {
            return self.propose_resume(context, target).map_or_else(Enrolment::Lost, |()| Enrolment::NotNow);
        }
        if !source.recv_drained() {
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

    /// Offers the kernel to carry again, once the target has taken all but a little of what user space wrote.
    fn propose_resume(&mut self, context: &Context, target: &Endpoint) -> io::Result<()> {
        let Some(spliced_state) = &mut self.spliced_state else { return Ok(()) };
        let read = self.direction.read_bytes();
        if read == spliced_state.proposed_at || sockopt::unacknowledged(target)? > context.watermarks.low {
            return Ok(());
        }
        spliced_state.proposed_at = read;
        if spliced_state.spliced.propose_resume(read - spliced_state.read_before)? {
            self.direction.resume_proposed();
        }
        Ok(())
    }

    /// Does what the direction wants next, once it can be done.
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

    fn poll_read(
        &mut self,
        task: &mut task::Context<'_>,
        io: DirectionIo<'_>,
    ) -> Poll<Result<StepOutcome, ForwardError>> {
        let DirectionIo { context, source, target } = io;
        if self.is_bulk()
            && let Some((pipe, count)) =
                ready!(source.poll_fill(task, &context.pipes)).map_err(ForwardError::Source)?
        {
            return Poll::Ready(self.pass(pipe, count, target));
        }
        let Self { direction, pending_write, messages, bulk_reads, spliced_state, .. } = self;
        let taken = source.poll_read(task, |payload| {
            if payload.is_empty() {
                return None;
            }
            direction.read(payload.len());
            if payload.len() >= BULK_SIZE {
                *bulk_reads += 1;
            } else {
                (*bulk_reads, *messages) = (0, messages.saturating_add(1));
            }
            if let Some(spliced_state) = spliced_state {
                spliced_state.spurious_eofs = 0;
            }
            // Its FIN then leaves in one segment with it.
            let last = spliced_state.is_none() && source.fin_follows();
            Some(take(direction, pending_write, payload, last, target))
        });
        match ready!(taken).map_err(ForwardError::Source)? {
            Some(Some(taken)) => Poll::Ready(taken),
            Some(None) if self.eof_is_fin(source) => {
                self.direction.source_finished();
                Poll::Ready(Ok(StepOutcome::Other))
            }
            Some(None) if !self.eof_is_spurious(source) => {
                Poll::Ready(Err(ForwardError::Source(io::ErrorKind::ConnectionReset.into())))
            }
            Some(None) | None => {
                self.backoff.start(RETRY_DELAY, task);
                Poll::Pending
            }
        }
    }

    /// Whether a pipe serves better than a buffer. Never again where `verdict` has had the source: what it passes is on a list
    /// of its own, which splice(2) does not look at (tcp_splice_read, net/ipv4/tcp.c).
    fn is_bulk(&self) -> bool {
        self.bulk_reads >= MIN_BULK_READS && self.spliced_state.is_none() && self.direction.can_splice()
    }

    /// Passes on what has just come into a pipe, as far as the target takes it now.
    fn pass(&mut self, mut pipe: Pipe, count: usize, target: &Endpoint) -> Result<StepOutcome, ForwardError> {
        self.direction.read(count);
        self.piped += count as u64;
        if count < BULK_SIZE {
            self.bulk_reads = 0;
        }
        let drained = target.try_drain(&mut pipe);
        if pipe.held() > 0 {
            self.pending_write.get_or_insert_default().pipe = Some(pipe);
        }
        self.direction.wrote(drained.map_err(ForwardError::Target)?);
        Ok(StepOutcome::Read)
    }

    /// Whether an end of file comes too early: of a socket that has been in the program's hands, recv(2) says 0 after the
    /// FIN although a worker has yet to queue some of what came before (tcp_bpf_recvmsg_parser, net/ipv4/tcp_bpf.c).
    fn eof_is_spurious(&mut self, source: &Endpoint) -> bool {
        let Some(spliced_state) = &mut self.spliced_state else { return false };
        let Ok(info) = sockopt::tcp_info(source) else { return false };
        let redirected = spliced_state.spliced.flow().map_or(0, |flow| flow.redirected);
        spliced_state.spurious_eofs += 1;
        info.bytes_received > self.direction.read_bytes() + redirected + 1
            && spliced_state.spurious_eofs < MAX_SPURIOUS_EOFS
    }

    fn spliced(&self) -> Result<&dyn SplicedDirection, ForwardError> {
        let missing = || ForwardError::Lost(io::ErrorKind::NotFound.into());
        self.spliced_state.as_ref().map(|spliced_state| &*spliced_state.spliced).ok_or_else(missing)
    }

    /// While the kernel carries: until the source finishes, or what waits for the target has to be looked at.
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

    /// Looks at what waits for the target, and holds the source if it is too much.
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
                spliced.grant(backlog.queued).map_err(ForwardError::Lost)?;
                return Ok(StepOutcome::Other);
            }
            BackpressureAction::Continue | BackpressureAction::Pause => {}
        }
        self.direction.paused();
        Ok(StepOutcome::Paused)
    }

    /// While the source is held: until the target has taken all that is on its way. Then user space goes on, and keeps
    /// the direction.
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

    /// While the kernel is offered the direction: until it has taken it, or there is more for user space to read.
    fn poll_resume(
        &mut self,
        task: &mut task::Context<'_>,
        io: DirectionIo<'_>,
    ) -> Poll<Result<StepOutcome, ForwardError>> {
        let DirectionIo { source, target, .. } = io;
        let spliced = self.spliced()?;
        let mut taken = false;
        // It may have been rung before the offer, when the direction was held.
        while !taken && spliced.backlog_notify().poll_notified(task).is_ready() {
            taken = spliced.flow().map_err(ForwardError::Lost)?.passing == 0;
        }
        if !taken {
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

    /// Looks until every byte of the finished source is queued at the target; or finds that the kernel has left some of
    /// them to user space.
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
        // The worker that fills the target's queue has most often been there already, or needs this processor.
        self.backoff.extend(2, MAX_DELIVERY_BACKOFF, task);
        Poll::Pending
    }
}
