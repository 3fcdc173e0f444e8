//! Reads the source of a relayed direction, and writes what was read as far as the target accepts it.

use std::{
    io,
    task::{self, Poll, ready},
    time::Instant,
};

use bytes::BytesMut;

use super::HalfDuplex;
use crate::{
    net::{
        socket::{Endpoint, RETRY_DELAY},
        splice_pipe::Pipe,
    },
    os::sockopt,
    session::{
        dialogue,
        pending_write::{PendingWrite, check_behind, write_through},
        step::{DirectionIo, ForwardError, StepOutcome},
    },
};

/// After this many spurious ends of file in a row, a millisecond apart, the next counts as a reset.
const MAX_SPURIOUS_EOFS: u32 = 2000;

/// A read of at least this size is bulk data, which a pipe forwards faster than a buffer.
const BULK_SIZE: usize = 16 * 1024;
/// After this many bulk reads in a row, the next read goes through a pipe.
const MIN_BULK_READS: u32 = 2;

impl HalfDuplex {
    pub(super) fn poll_read(
        &mut self,
        task: &mut task::Context<'_>,
        io: DirectionIo<'_>,
    ) -> Poll<Result<StepOutcome, ForwardError>> {
        let DirectionIo { context, source, target } = io;
        if self.is_bulk()
            && let Some((pipe, count)) =
                ready!(source.poll_fill(task, &context.pipes)).map_err(ForwardError::Source)?
        {
            return Poll::Ready(self.forward_pipe(pipe, count, target));
        }
        let Self {
            direction,
            pending_write,
            messages,
            bulk_reads,
            spliced_state,
            released_prefix,
            is_text,
            server,
            commands,
            has_quit,
            ..
        } = self;
        let outcome = source.poll_read(task, |payload| {
            if payload.is_empty() {
                return None;
            }
            direction.read(payload.len());
            if let Some(prefix) = released_prefix.take()
                && let Err(error) = check_behind(prefix, payload, released_prefix)
            {
                return Some(Err(error));
            }
            if let Some(server) = server
                && let Some(line) = server.read(payload, Instant::now)
            {
                return Some(Err(ForwardError::HeaderMisread(line)));
            }
            *has_quit = commands.is_some_and(|protocol| dialogue::ends_with_quit(protocol, payload));
            if payload.len() >= BULK_SIZE {
                *bulk_reads += 1;
            } else {
                *is_text = *is_text && dialogue::is_text(payload);
                (*bulk_reads, *messages) = (0, messages.saturating_add(1));
            }
            if let Some(spliced_state) = spliced_state {
                spliced_state.spurious_eofs = 0;
            }
            // If the FIN follows, the payload leaves in one segment with it, unless the FIN is held back.
            let fin_follows = !*has_quit && spliced_state.is_none() && source.fin_follows();
            Some(write_through(direction, pending_write, payload, fin_follows, target))
        });
        match ready!(outcome).map_err(ForwardError::Source)? {
            Some(Some(outcome)) => Poll::Ready(outcome),
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

    /// Whether to read through a pipe. Never after the source was enrolled: what `verdict` passes
    /// is on a list of its own, which splice(2) does not read (tcp_splice_read, net/ipv4/tcp.c).
    fn is_bulk(&self) -> bool {
        self.bulk_reads >= MIN_BULK_READS && self.spliced_state.is_none() && self.direction.can_splice()
    }

    /// Writes what was just read into a pipe, as far as the target accepts it now.
    fn forward_pipe(
        &mut self,
        mut pipe: Pipe,
        count: usize,
        target: &Endpoint,
    ) -> Result<StepOutcome, ForwardError> {
        self.direction.read(count);
        self.piped += count as u64;
        if let Some(server) = &mut self.server {
            server.skip();
        }
        if count < BULK_SIZE {
            self.bulk_reads = 0;
        }
        let drained = target.try_drain(&mut pipe);
        if pipe.held() > 0 {
            self.pending_write.get_or_insert_with(|| Box::new(PendingWrite::new(BytesMut::new()))).pipe =
                Some(pipe);
        }
        self.direction.wrote(drained.map_err(ForwardError::Target)?);
        Ok(StepOutcome::Read)
    }

    /// Whether an end of file comes too early. On a socket that was enrolled, recv(2) returns 0
    /// after the FIN although a kernel worker has not yet queued the bytes before it
    /// (tcp_bpf_recvmsg_parser, net/ipv4/tcp_bpf.c).
    fn eof_is_spurious(&mut self, source: &Endpoint) -> bool {
        let Some(spliced_state) = &mut self.spliced_state else { return false };
        let Ok(info) = sockopt::tcp_info(source) else { return false };
        let redirected = spliced_state.spliced.flow().map_or(0, |flow| flow.redirected);
        spliced_state.spurious_eofs += 1;
        info.bytes_received > self.direction.read_bytes() + redirected + 1
            && spliced_state.spurious_eofs < MAX_SPURIOUS_EOFS
    }
}
