//! Pipes for bulk in user space: splice(2) moves payload from socket to socket by reference, where reading and writing would
//! copy it twice. A pipe is borrowed for as long as it holds something, so that few are enough for many connections.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

/// Bytes that a pipe has room for: what a process without rights may ask for (`/proc/sys/fs/pipe-max-size`).
const PIPE_CAPACITY: usize = 1024 * 1024;

/// Pipes that a daemon has at most. A user without rights gets large ones up to 64 MiB together
/// (`/proc/sys/fs/pipe-user-pages-soft`), and may have other programs.
pub const MAX_PIPES: usize = 32;

/// The pipes of a daemon. Clones share them.
#[derive(Clone, Debug)]
pub struct Pipes(Arc<Mutex<Pool>>);

#[derive(Debug)]
struct Pool {
    /// Those that hold nothing.
    idle: Vec<PipeFds>,
    /// How many more may be made.
    left: usize,
}

#[derive(Debug)]
struct PipeFds {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipes {
    /// At most so many, made when they are needed.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Mutex::new(Pool { idle: Vec::new(), left: limit })))
    }

    /// An empty pipe; `None` if there is none to be had, and the payload has to be copied.
    #[must_use]
    pub fn borrow(&self) -> Option<Pipe> {
        let mut pool = self.pool();
        let fds = match pool.idle.pop() {
            Some(fds) => fds,
            None if pool.left == 0 => return None,
            None => {
                let created = create();
                // What was refused once is not asked for again: copying is slower, but asking in vain is slower still.
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
    // A small pipe moves less than reading and writing does.
    fcntl_setpipe_size(&write, PIPE_CAPACITY)?;
    Ok(PipeFds { read, write })
}

/// A pipe on its way from one socket to another. Dropping it gives it back, or closes it with what it holds.
#[derive(Debug)]
pub struct Pipe {
    /// `None` only while it is dropped.
    fds: Option<PipeFds>,
    held: usize,
    pipes: Pipes,
}

impl Pipe {
    /// Bytes in it.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held
    }

    /// Takes what `source` has received, as much as there is room for; 0 is its FIN.
    ///
    /// # Errors
    /// As splice(2); `WouldBlock` if there is nothing.
    pub fn fill(&mut self, source: impl AsFd) -> io::Result<usize> {
        let moved = transfer(source.as_fd(), self.fds()?.write.as_fd(), PIPE_CAPACITY)?;
        self.held += moved;
        Ok(moved)
    }

    /// Gives `target` what it holds, as much as that has room for.
    ///
    /// # Errors
    /// As splice(2); `WouldBlock` if nothing fits.
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
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        (near, far)
    }

    #[test]
    fn payload_goes_through_and_the_pipe_comes_back() {
        let pipes = Pipes::new(1);
        let ((mut sender, source), (target, mut reader)) = (pair(), pair());
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
    fn a_pipe_that_holds_something_is_not_lent_again() {
        let pipes = Pipes::new(1);
        let (mut sender, source) = pair();
        sender.write_all(b"left behind").unwrap();
        let mut pipe = pipes.borrow().unwrap();
        source.peek(&mut [0; 1]).unwrap();
        assert_eq!(pipe.fill(&source).unwrap(), 11);
        drop(pipe);
        assert_eq!(pipes.borrow().unwrap().held(), 0);
    }

    #[test]
    fn none_is_none() {
        assert!(Pipes::new(0).borrow().is_none());
    }
}
