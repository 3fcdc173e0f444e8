//! An epoll instance that reports hang-ups only.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use rustix::event::{Timespec, epoll};

const NO_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// An epoll instance for a condition that tokio cannot poll for: hang-up without readability.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

/// One event of [`Epoll::wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hangup {
    /// The key passed to [`Epoll::add`].
    pub key: u64,
    /// The socket has a pending error or is closed in both directions. Otherwise the peer has only
    /// finished sending.
    pub broken: bool,
}

impl Epoll {
    /// Creates an empty instance.
    ///
    /// # Errors
    /// As epoll_create1(2).
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Watches `socket` for the peer's FIN, for errors and for hang-up, edge-triggered.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn add(&self, socket: &impl AsFd, key: u64) -> io::Result<()> {
        let events = epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        Ok(epoll::add(&self.0, socket, epoll::EventData::new_u64(key), events)?)
    }

    /// Stops watching `socket`.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn remove(&self, socket: &impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.0, socket)?)
    }

    /// Returns pending events, at most 64, without blocking.
    ///
    /// # Errors
    /// As epoll_wait(2).
    pub fn wait(&self) -> io::Result<Vec<Hangup>> {
        let mut buffer = [MaybeUninit::<epoll::Event>::uninit(); 64];
        let (events, _) = epoll::wait(&self.0, &mut buffer, Some(&NO_WAIT))?;
        let broken = epoll::EventFlags::ERR | epoll::EventFlags::HUP;
        let hangup = |&epoll::Event { flags, data, .. }: &_| Hangup {
            key: data.u64(),
            broken: flags.intersects(broken),
        };
        Ok(events.iter().map(hangup).collect())
    }
}

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Epoll {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, time::Duration};

    use super::*;
    use crate::os::tcp_pair;

    #[test]
    fn epoll_reports_a_fin_but_no_payload() {
        let epoll = Epoll::new().unwrap();
        let (mut out, inside) = tcp_pair();
        epoll.add(&inside, 42).unwrap();
        out.write_all(b"payload").unwrap();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(epoll.wait().unwrap(), []);
        out.shutdown(std::net::Shutdown::Write).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(epoll.wait().unwrap(), [Hangup { key: 42, broken: false }]);
        epoll.remove(&inside).unwrap();
    }
}
