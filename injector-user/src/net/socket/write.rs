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
    /// Moves out of the pipe what fits, once something does.
    ///
    /// # Errors
    /// As splice(2).
    pub fn poll_drain(&self, task: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<usize>> {
        self.poll_room(task, || self.try_drain(pipe))
    }

    /// Moves out of the pipe what fits now, without waiting; 0 when nothing fits.
    ///
    /// # Errors
    /// As splice(2).
    pub fn try_drain(&self, pipe: &mut Pipe) -> io::Result<usize> {
        match pipe.drain(&*self.socket) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            drained => self.record_error(drained),
        }
    }

    /// Writes what fits now, without waiting; 0 when nothing fits.
    ///
    /// # Errors
    /// As send(2).
    pub fn try_write(&self, payload: &[u8]) -> io::Result<usize> {
        self.try_now(|socket| socket.send_with_flags(payload, libc::MSG_NOSIGNAL))
    }

    /// Writes what fits of several pieces by one call, so that they leave in one segment where they can.
    ///
    /// # Errors
    /// As sendmsg(2).
    pub fn try_write_all(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.try_now(|socket| socket.send_vectored_with_flags(pieces, libc::MSG_NOSIGNAL))
    }

    /// Writes what fits now, to be sent with [`Endpoint::push`], [`Endpoint::finish`] or [`Endpoint::push_and_reset`] unless it
    /// fills a segment.
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

    /// Writes what fits, once something does.
    ///
    /// # Errors
    /// As send(2).
    pub fn poll_write(&self, task: &mut Context<'_>, payload: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_room(task, || self.try_write(payload))
    }

    /// Waits for room until `write`, which says 0 for no room, finds some. It is asked before the runtime is: what that knows
    /// of room is thrown away by [`Endpoint::poll_closed`].
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
