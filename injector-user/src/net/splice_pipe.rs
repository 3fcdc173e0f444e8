//! Pipes for bulk data in user space. splice(2) moves payload between sockets by reference, while
//! read and write would copy it twice. A session borrows a pipe only while the pipe holds data, so
//! few pipes serve many connections.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

/// The capacity of a pipe: the most that an unprivileged process may set
/// (`/proc/sys/fs/pipe-max-size`).
const PIPE_CAPACITY: usize = 1024 * 1024;

/// The maximum number of pipes of a daemon. An unprivileged user may have large pipes of 64 MiB in
/// total (`/proc/sys/fs/pipe-user-pages-soft`), and other programs may use some.
pub const MAX_PIPES: usize = 32;

/// The pipes of a daemon. Clones share them.
#[derive(Clone, Debug)]
pub struct Pipes(Arc<Mutex<Pool>>);

#[derive(Debug)]
struct Pool {
    /// Pipes that hold no data.
    idle: Vec<PipeFds>,
    /// How many more pipes may be created.
    left: usize,
}

#[derive(Debug)]
struct PipeFds {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipes {
    /// A pool of at most `limit` pipes, created on demand.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Mutex::new(Pool { idle: Vec::new(), left: limit })))
    }

    /// An empty pipe. `None` if none is available; the payload must then be copied.
    #[must_use]
    pub fn borrow(&self) -> Option<Pipe> {
        let mut pool = self.pool();
        let fds = match pool.idle.pop() {
            Some(fds) => fds,
            None if pool.left == 0 => return None,
            None => {
                let created = create();
                // After a refusal no other pipe is requested: failing requests cost more than
                // copying.
                pool.left = if created.is_ok() { pool.left - 1 } else { 0 };
                created.ok()?
            }
        };
        Some(Pipe { fds: Some(fds), held: 0, pipes: self.clone() })
    }

    fn pool(&self) -> std::sync::MutexGuard<'_, Pool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn create() -> io::Result<PipeFds> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    // A small pipe moves less per call than read and write do.
    fcntl_setpipe_size(&write, PIPE_CAPACITY)?;
    Ok(PipeFds { read, write })
}

/// A pipe in use between two sockets. Dropping it returns it to the pool, or closes it if it holds
/// data.
#[derive(Debug)]
pub struct Pipe {
    /// `None` only during drop.
    fds: Option<PipeFds>,
    held: usize,
    pipes: Pipes,
}

impl Pipe {
    /// Bytes in the pipe.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held
    }

    /// Moves received data of `source` into the pipe, as much as fits; 0 means its FIN.
    ///
    /// # Errors
    /// As splice(2); `WouldBlock` if no data is available.
    pub fn fill(&mut self, source: impl AsFd) -> io::Result<usize> {
        let moved = transfer(source.as_fd(), self.fds()?.write.as_fd(), PIPE_CAPACITY)?;
        self.held += moved;
        Ok(moved)
    }

    /// Moves the pipe's data into `target`, as much as fits.
    ///
    /// # Errors
    /// As splice(2); `WouldBlock` if none fits.
    pub fn drain(&mut self, target: impl AsFd) -> io::Result<usize> {
        let moved = transfer(self.fds()?.read.as_fd(), target.as_fd(), self.held)?;
        self.held = self.held.saturating_sub(moved);
        Ok(moved)
    }

    fn fds(&self) -> io::Result<&PipeFds> {
        self.fds.as_ref().ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let Some(fds) = self.fds.take() else { return };
        let mut pool = self.pipes.pool();
        if self.held == 0 {
            pool.idle.push(fds);
        } else {
            pool.left += 1;
        }
    }
}

fn transfer(from: BorrowedFd<'_>, to: BorrowedFd<'_>, limit: usize) -> io::Result<usize> {
    loop {
        match splice(from, None, to, None, limit, SpliceFlags::NONBLOCK | SpliceFlags::MOVE) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;
    use crate::os::tcp_pair;

    #[test]
    fn payload_passes_and_the_pipe_returns_to_the_pool() {
        let pipes = Pipes::new(1);
        let ((mut sender, source), (target, mut reader)) = (tcp_pair(), tcp_pair());
        let mut pipe = pipes.borrow().unwrap();
        source.set_nonblocking(true).unwrap();
        assert_eq!(pipe.fill(&source).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        sender.write_all(b"payload").unwrap();
        sender.shutdown(std::net::Shutdown::Write).unwrap();
        source.set_nonblocking(false).unwrap();
        let filled = loop {
            match pipe.fill(&source) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                filled => break filled.unwrap(),
            }
        };
        assert_eq!((filled, pipe.held()), (7, 7));
        assert!(pipes.borrow().is_none(), "there is only one");
        assert_eq!(pipe.drain(&target).unwrap(), 7);
        let mut read = [0; 7];
        reader.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"payload");
        assert_eq!(pipe.fill(&source).unwrap(), 0, "the FIN");
        drop(pipe);
        assert!(pipes.borrow().is_some());
    }

    #[test]
    fn a_pipe_that_holds_data_is_not_reused() {
        let pipes = Pipes::new(1);
        let (mut sender, source) = tcp_pair();
        sender.write_all(b"left behind").unwrap();
        let mut pipe = pipes.borrow().unwrap();
        source.peek(&mut [0; 1]).unwrap();
        assert_eq!(pipe.fill(&source).unwrap(), 11);
        drop(pipe);
        assert_eq!(pipes.borrow().unwrap().held(), 0);
    }

    #[test]
    fn an_empty_pool_has_no_pipe() {
        assert!(Pipes::new(0).borrow().is_none());
    }
}
