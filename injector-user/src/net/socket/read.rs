//! Reading from an [`Endpoint`], into a buffer or into a pipe.

use std::{
    cell::RefCell,
    future::poll_fn,
    io::{self, Read as _},
    sync::atomic::Ordering,
    task::{Context, Poll, ready},
};

use tokio::io::Ready;

use super::{Endpoint, RETRY_DELAY};
use crate::net::splice_pipe::{Pipe, Pipes};

/// The size of the read buffer.
const SCRATCH_SIZE: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH_SIZE].into_boxed_slice());
}

impl Endpoint {
    /// Waits for payload and passes it to `take`, as [`Endpoint::poll_read`]. Cancel safe.
    ///
    /// # Errors
    /// As recv(2).
    pub async fn read<T>(&self, mut take: impl FnMut(&[u8]) -> T) -> io::Result<T> {
        loop {
            if let Some(taken) = poll_fn(|task| self.poll_read(task, &mut take)).await? {
                return Ok(taken);
            }
            tokio::time::sleep(RETRY_DELAY).await;
        }
    }

    /// Passes payload to `take`, in a buffer that all connections of the thread share. Empty
    /// payload is the peer's FIN. `None`: more data will come without an event; read again after
    /// [`RETRY_DELAY`].
    ///
    /// # Errors
    /// As recv(2).
    pub fn poll_read<T>(
        &self,
        task: &mut Context<'_>,
        mut take: impl FnMut(&[u8]) -> T,
    ) -> Poll<io::Result<Option<T>>> {
        let Some(io) = &self.io else { return Poll::Pending };
        loop {
            let mut ready = ready!(io.poll_read_ready(task))?;
            let state = ready.ready();
            let closed = state.is_read_closed();
            let broken = state.is_write_closed() || state.is_error();
            let taken = SCRATCH.with_borrow_mut(|scratch| {
                let count = match ready.try_io(|io| (&**io.get_ref()).read(scratch)) {
                    Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => return Ok(None),
                    Ok(result) => result?,
                    Err(_would_block) => return Ok(None),
                };
                // A short read has drained the queue: the next read would return EAGAIN.
                let emptied = count < scratch.len();
                self.recv_drained.store(emptied, Ordering::Relaxed);
                self.fin_follows.store(emptied && closed && !broken, Ordering::Relaxed);
                if count > 0 && emptied {
                    ready.clear_ready_matching(Ready::READABLE);
                }
                Ok::<_, io::Error>(Some(take(scratch.get(..count).unwrap_or_default())))
            })?;
            // The readiness remains after a FIN. The last bytes of a previously spliced socket may
            // still be queued in a kernel worker; until they arrive, reads return EAGAIN.
            if taken.is_some() || closed {
                return Poll::Ready(Ok(taken));
            }
        }
    }

    /// Moves payload into a pipe of the pool. `None` if no pipe is available or only the peer's FIN
    /// was received: call [`Endpoint::poll_read`] then.
    ///
    /// # Errors
    /// As splice(2).
    pub fn poll_fill(
        &self,
        task: &mut Context<'_>,
        pipes: &Pipes,
    ) -> Poll<io::Result<Option<(Pipe, usize)>>> {
        let Some(io) = &self.io else { return Poll::Pending };
        loop {
            let mut ready = ready!(io.poll_read_ready(task))?;
            let Some(mut pipe) = pipes.borrow() else {
                ready.retain_ready();
                return Poll::Ready(Ok(None));
            };
            if let Ok(filled) = ready.try_io(|io| pipe.fill(&**io.get_ref())) {
                let count = filled?;
                // More data may be available, even of the same segment.
                self.recv_drained.store(false, Ordering::Relaxed);
                return Poll::Ready(Ok((count > 0).then_some((pipe, count))));
            }
        }
    }

    /// Ready when data or an end can be read.
    ///
    /// # Errors
    /// When the runtime shuts down.
    pub fn poll_readable(&self, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(io) = &self.io else { return Poll::Pending };
        ready!(io.poll_read_ready(task))?.retain_ready();
        Poll::Ready(Ok(()))
    }

    /// Whether the last read drained the receive queue. If not, the read may have ended within a
    /// segment, because the kernel merges queued segments, and the program cannot skip that much of
    /// it.
    #[must_use]
    pub fn recv_drained(&self) -> bool {
        self.recv_drained.load(Ordering::Relaxed)
    }

    /// Whether the peer's FIN follows the data that was read last, as far as is known. `false` is
    /// not certain: the FIN may not have been reported yet.
    #[must_use]
    pub fn fin_follows(&self) -> bool {
        self.fin_follows.load(Ordering::Relaxed)
    }

    /// Whether an end of file found by a read is certainly the peer's FIN. After an error that
    /// another call reported, it may stand for that error.
    #[must_use]
    pub fn eof_is_fin(&self) -> bool {
        !self.error_reported.load(Ordering::Relaxed)
    }
}
