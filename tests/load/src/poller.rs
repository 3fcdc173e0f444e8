//! epoll over connections, identified by the number of their descriptor.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

/// Maximum number of events per wait.
const BATCH: usize = 128;

/// An epoll instance; adding works from any thread.
#[derive(Debug)]
pub struct Poller(OwnedFd);

/// A buffer for the events of one wait.
pub struct Events(Vec<Event>);

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl Default for Events {
    fn default() -> Self {
        Self(Vec::with_capacity(BATCH))
    }
}

impl Events {
    /// Index of the connection (its descriptor's number), and whether it can be read or is
    /// finished.
    pub fn iter(&self) -> impl Iterator<Item = (usize, bool)> {
        let readable = EventFlags::IN | EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP;
        self.0.iter().map(move |event| {
            let (index, flags) = (event.data.u64(), event.flags);
            (usize::try_from(index).unwrap_or(usize::MAX), flags.intersects(readable))
        })
    }
}

/// Which events of a connection are reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// While there is data to read.
    Read,
    /// While there is data to read or space to write.
    ReadWrite,
    /// Edge-triggered: once when it becomes writable, and whenever data arrives. Connecting takes
    /// no second call that way.
    EdgeTriggered,
    /// While there is data to read, waking one waiting thread.
    Exclusive,
}

impl Interest {
    const fn flags(self) -> EventFlags {
        match self {
            Self::Read => EventFlags::IN,
            Self::ReadWrite => EventFlags::IN.union(EventFlags::OUT),
            Self::EdgeTriggered => {
                EventFlags::IN.union(EventFlags::OUT).union(EventFlags::RDHUP).union(EventFlags::ET)
            }
            Self::Exclusive => EventFlags::IN.union(EventFlags::EXCLUSIVE),
        }
    }
}

/// The index that a descriptor's events carry.
pub fn index(of: &impl AsRawFd) -> usize {
    usize::try_from(of.as_raw_fd()).unwrap_or(usize::MAX)
}

impl Poller {
    /// # Errors
    /// When there are no descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// Watches a socket until it is closed.
    ///
    /// # Errors
    /// When the socket is watched already, or cannot be watched.
    pub fn add(&self, socket: &(impl AsFd + AsRawFd), interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.0, socket, EventData::new_u64(index(socket) as u64), interest.flags())?)
    }

    /// Changes which events of a watched socket are reported.
    ///
    /// # Errors
    /// When it is not watched.
    pub fn change(&self, socket: &(impl AsFd + AsRawFd), interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.0, socket, EventData::new_u64(index(socket) as u64), interest.flags())?)
    }

    /// Waits for events, at most `limit` long.
    ///
    /// # Errors
    /// When epoll_wait fails; an interrupted wait returns without events.
    pub fn wait(&self, events: &mut Events, limit: Duration) -> io::Result<()> {
        events.0.clear();
        let limit = Timespec::try_from(limit).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        match epoll::wait(&self.0, rustix::buffer::spare_capacity(&mut events.0), Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
