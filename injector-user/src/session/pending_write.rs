//! Payload that user space has read and not yet written.

use std::{
    io,
    task::{self, Poll, ready},
    time::Instant,
};

use bytes::{Buf as _, BytesMut};
use injector_common::proxy::{Forgery, forgery};

use super::{
    direction::{Direction, NextAction},
    step::{ForwardError, StepOutcome},
};
use crate::net::{socket::Endpoint, splice_pipe::Pipe};

/// Payload that the target has not accepted yet. It is never empty between two steps.
#[derive(Debug)]
pub(super) struct PendingWrite {
    pub(super) bytes: BytesMut,
    /// Follows the bytes.
    pub(super) pipe: Option<Pipe>,
    /// Since when there is something pending.
    pub(super) since: Instant,
}

impl PendingWrite {
    pub(super) fn new(bytes: BytesMut) -> Self {
        Self { bytes, pipe: None, since: Instant::now() }
    }

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

/// Writes `payload`, which was just read, as far as the target accepts it now; the rest becomes the
/// pending write. If the peer's FIN follows `payload`, it is held back, to leave in one segment
/// with the FIN. Until the check for a forged header has passed, everything becomes the pending
/// write.
pub(super) fn write_through(
    direction: &mut Direction,
    pending_write: &mut Option<Box<PendingWrite>>,
    payload: &[u8],
    fin_follows: bool,
    target: &Endpoint,
) -> Result<StepOutcome, ForwardError> {
    let awaiting_check = direction.next_action() == NextAction::Read;
    // While there is more to read, bytes are pending only because of the check.
    let mut earlier = pending_write.take();
    if let Some(earlier) = &mut earlier {
        earlier.bytes.extend_from_slice(payload);
    }
    let all = earlier.as_ref().map_or(payload, |earlier| &earlier.bytes);
    let written = match if awaiting_check { forgery(all) } else { Forgery::No } {
        Forgery::Yes => return Err(ForwardError::Forged),
        Forgery::Undecided => 0,
        Forgery::No => {
            direction.check_passed();
            let written = if fin_follows { target.try_write_more(all) } else { target.try_write(all) };
            let written = written.map_err(ForwardError::Target)?;
            direction.wrote(written);
            written
        }
    };
    if written < all.len() {
        let mut rest = earlier.unwrap_or_else(|| Box::new(PendingWrite::new(payload.into())));
        rest.bytes.advance(written);
        *pending_write = Some(rest);
    }
    Ok(StepOutcome::Read)
}

/// Checks `payload` for a forged header of which `prefix` was forwarded. What may still become one
/// is the next prefix.
pub(super) fn check_behind(
    prefix: Box<[u8]>,
    payload: &[u8],
    next: &mut Option<Box<[u8]>>,
) -> Result<(), ForwardError> {
    let all = [&prefix, payload].concat();
    match forgery(&all) {
        Forgery::Yes => return Err(ForwardError::Forged),
        Forgery::Undecided => *next = Some(all.into()),
        Forgery::No => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forged_header_is_found_behind_a_released_prefix() {
        let signature = b"\r\n\r\n\0\r\nQUIT\n\x21";
        for at in 1..signature.len() - 1 {
            let (first, rest) = signature.split_at(at);
            let mut next = None;
            let forged = check_behind(first.into(), rest, &mut next);
            assert!(matches!(forged, Err(ForwardError::Forged)) && next.is_none(), "{first:?}");
        }
        let mut next = None;
        check_behind(b"\r".as_slice().into(), b"\n", &mut next).unwrap();
        assert_eq!(next.as_deref(), Some(&b"\r\n"[..]));
        check_behind(next.take().unwrap(), b"EHLO client\r\n", &mut next).unwrap();
        assert_eq!(next, None);
    }
}
