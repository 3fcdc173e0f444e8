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

/// Bytes of the buffer that user space reads into.
const SCRATCH_SIZE: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH_SIZE].into_boxed_slice());
}

impl Endpoint {
    /// Waits for payload and hands it to `take`, as [`Endpoint::poll_read`]. Cancel safe.
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

    /// Hands payload to `take`, out of a buffer that all connections of the thread share; empty is the peer's FIN. `None`: there
    /// will be more, but nothing tells when; look again [`RETRY_DELAY`].
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
                // A short read has emptied the queue: the next one would only say EAGAIN.
                let emptied = count < scratch.len();
                self.recv_drained.store(emptied, Ordering::Relaxed);
                self.fin_follows.store(emptied && closed && !broken, Ordering::Relaxed);
                if count > 0 && emptied {
                    ready.clear_ready_matching(Ready::READABLE);
                }
                Ok::<_, io::Error>(Some(take(scratch.get(..count).unwrap_or_default())))
            })?;
            // Readiness stays after a FIN; but a socket that has been in a program's hands may have its last bytes still with a
            // worker, and says EAGAIN until then.
            if taken.is_some() || closed {
                return Poll::Ready(Ok(taken));
            }
        }
    }

    /// Moves payload into one of the pipes. `None` if there is none to be had, or nothing went into it but the peer's FIN:
    /// [`Endpoint::poll_read`] then.
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
                // There may be more, in the middle of a segment even.
                self.recv_drained.store(false, Ordering::Relaxed);
                return Poll::Ready(Ok((count > 0).then_some((pipe, count))));
            }
        }
    }

    /// Whether there is something to read, or an end.
    ///
    /// # Errors
    /// When the runtime no longer polls.
    pub fn poll_readable(&self, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(io) = &self.io else { return Poll::Pending };
        ready!(io.poll_read_ready(task))?.retain_ready();
        Poll::Ready(Ok(()))
    }

    /// Whether the last read took all that had been received. Otherwise it may have ended in the middle of a segment, of which
    /// the program would have to cut off more than it can: the kernel joins segments that wait in a queue into one.
    #[must_use]
    pub fn recv_drained(&self) -> bool {
        self.recv_drained.load(Ordering::Relaxed)
    }

    /// Whether behind what was read last comes the peer's FIN, as far as is known. Another may not be known of yet.
    #[must_use]
    pub fn fin_follows(&self) -> bool {
        self.fin_follows.load(Ordering::Relaxed)
    }

    /// Whether an end of file that a read has found is the peer's FIN for certain. After an error that somebody else was told
    /// of it may be that error's.
    #[must_use]
    pub fn eof_is_fin(&self) -> bool {
        !self.error_reported.load(Ordering::Relaxed)
    }
}
