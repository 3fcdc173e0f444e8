//! Payload that was read and not yet written.

use std::{
    io,
    task::{self, Poll, ready},
};

use bytes::{Buf as _, BytesMut};
use injector_common::proxy::{Forgery, forgery};

use super::{
    direction::{Direction, NextAction},
    step::{ForwardError, StepOutcome},
};
use crate::net::{socket::Endpoint, splice_pipe::Pipe};

/// Read and not yet written.
#[derive(Debug, Default)]
pub(super) struct PendingWrite {
    pub(super) bytes: BytesMut,
    /// Comes behind them.
    pub(super) pipe: Option<Pipe>,
}

impl PendingWrite {
    pub(super) fn poll_write(
        &mut self,
        task: &mut task::Context<'_>,
        target: &Endpoint,
    ) -> Poll<io::Result<usize>> {
        match &mut self.pipe {
            Some(pipe) if self.bytes.is_empty() => target.poll_drain(task, pipe),
            _ => {
                let written = ready!(target.poll_write(task, &self.bytes))?;
                self.bytes.advance(written);
                Poll::Ready(Ok(written))
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.pipe.as_ref().is_none_or(|pipe| pipe.held() == 0)
    }
}

/// Passes on what was just read, as far as the target takes it now; the rest waits. The `last` of it is sent with what follows.
pub(super) fn take(
    direction: &mut Direction,
    pending_write: &mut Option<Box<PendingWrite>>,
    payload: &[u8],
    last: bool,
    target: &Endpoint,
) -> Result<StepOutcome, ForwardError> {
    let awaiting_check = direction.next_action() == NextAction::Read;
    // Only at the gate anything waits while there is more to read.
    let mut held = pending_write.take();
    if let Some(held) = &mut held {
        held.bytes.extend_from_slice(payload);
    }
    let all = held.as_ref().map_or(payload, |held| &held.bytes);
    let written = match if awaiting_check { forgery(all) } else { Forgery::No } {
        Forgery::Yes => return Err(ForwardError::Forged),
        Forgery::Undecided => 0,
        Forgery::No => {
            direction.check_passed();
            let written = if last { target.try_write_more(all) } else { target.try_write(all) };
            let written = written.map_err(ForwardError::Target)?;
            direction.wrote(written);
            written
        }
    };
    if written < all.len() {
        let mut left = held.unwrap_or_else(|| Box::new(PendingWrite { bytes: payload.into(), pipe: None }));
        left.bytes.advance(written);
        *pending_write = Some(left);
    }
    Ok(StepOutcome::Read)
}
