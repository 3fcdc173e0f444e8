//! Writing to an [`Endpoint`], from a buffer or from a pipe.

use std::{
    io::{self, IoSlice},
    task::{Context, Poll, ready},
};

use socket2::Socket;
use tokio::io::Ready;

use super::Endpoint;
use crate::net::splice_pipe::Pipe;

impl Endpoint {
    /// Moves data out of the pipe as soon as some fits.
    ///
    /// # Errors
    /// As splice(2).
    pub fn poll_drain(&self, task: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<usize>> {
        self.poll_room(task, || self.try_drain(pipe))
    }

    /// Moves data out of the pipe without waiting; 0 if none fits.
    ///
    /// # Errors
    /// As splice(2).
    pub fn try_drain(&self, pipe: &mut Pipe) -> io::Result<usize> {
        match pipe.drain(&*self.socket) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            drained => self.record_error(drained),
        }
    }

    /// Writes without waiting; 0 if nothing fits.
    ///
    /// # Errors
    /// As send(2).
    pub fn try_write(&self, payload: &[u8]) -> io::Result<usize> {
        self.try_now(|socket| socket.send_with_flags(payload, libc::MSG_NOSIGNAL))
    }

    /// Writes several pieces with one call, so that they share a segment if possible.
    ///
    /// # Errors
    /// As sendmsg(2).
    pub fn try_write_all(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.try_now(|socket| socket.send_vectored_with_flags(pieces, libc::MSG_NOSIGNAL))
    }

    /// Writes without waiting. [`Endpoint::push`], [`Endpoint::finish`] or
    /// [`Endpoint::push_and_reset`] sends the data, unless it fills a segment.
    ///
    /// # Errors
    /// As send(2).
    pub fn try_write_more(&self, payload: &[u8]) -> io::Result<usize> {
        self.try_now(|socket| socket.send_with_flags(payload, libc::MSG_NOSIGNAL | libc::MSG_MORE))
    }

    fn try_now(&self, write: impl Fn(&Socket) -> io::Result<usize>) -> io::Result<usize> {
        loop {
            match write(&self.socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return self.record_error(result),
            }
        }
    }

    /// Writes as soon as some data fits.
    ///
    /// # Errors
    /// As send(2).
    pub fn poll_write(&self, task: &mut Context<'_>, payload: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_room(task, || self.try_write(payload))
    }

    /// Waits until `write` succeeds; it returns 0 if nothing fits. `write` is called before the
    /// runtime is asked, because [`Endpoint::poll_closed`] clears the runtime's write readiness.
    fn poll_room(
        &self,
        task: &mut Context<'_>,
        mut write: impl FnMut() -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let Some(io) = &self.io else { return Poll::Pending };
        loop {
            let written = write()?;
            if written > 0 {
                return Poll::Ready(Ok(written));
            }
            let mut ready = ready!(io.poll_write_ready(task))?;
            let written = write()?;
            if written > 0 {
                return Poll::Ready(Ok(written));
            }
            ready.clear_ready_matching(Ready::WRITABLE);
        }
    }
}
