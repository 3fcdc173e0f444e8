//! epoll over connections that are known by their descriptor's number.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

/// Events taken at once.
const BATCH: usize = 128;

/// An epoll instance; adding works from any thread.
#[derive(Debug)]
pub struct Poller(OwnedFd);

/// Room for the events of one wait.
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
    /// Index of the connection (its descriptor's number), and whether it can be read or is finished.
    pub fn iter(&self) -> impl Iterator<Item = (usize, bool)> {
        let readable = EventFlags::IN | EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP;
        self.0.iter().map(move |event| {
            let (index, flags) = (event.data.u64(), event.flags);
            (usize::try_from(index).unwrap_or(usize::MAX), flags.intersects(readable))
        })
    }
}

/// What to be told of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// As long as there is something to read.
    Read,
    /// As long as there is something to read or room to write.
    ReadWrite,
    /// Once when it can be written, once whenever more has come: connecting takes no second call that way.
    Edges,
    /// As long as there is something to read, and one waiting thread alone.
    Shared,
}

impl Interest {
    const fn flags(self) -> EventFlags {
        match self {
            Self::Read => EventFlags::IN,
            Self::ReadWrite => EventFlags::IN.union(EventFlags::OUT),
            Self::Edges => {
                EventFlags::IN.union(EventFlags::OUT).union(EventFlags::RDHUP).union(EventFlags::ET)
            }
            Self::Shared => EventFlags::IN.union(EventFlags::EXCLUSIVE),
        }
    }
}

/// The index under which a descriptor's events come.
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
    /// When it is watched already, or is no socket.
    pub fn add(&self, socket: &(impl AsFd + AsRawFd), interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.0, socket, EventData::new_u64(index(socket) as u64), interest.flags())?)
    }

    /// Changes what is told of a watched socket.
    ///
    /// # Errors
    /// When it is not watched.
    pub fn change(&self, socket: &(impl AsFd + AsRawFd), interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.0, socket, EventData::new_u64(index(socket) as u64), interest.flags())?)
    }

    /// Waits for events, at most so long.
    ///
    /// # Errors
    /// When the kernel refuses; an interruption is no error and brings no events.
    pub fn wait(&self, events: &mut Events, limit: Duration) -> io::Result<()> {
        events.0.clear();
        let limit = Timespec::try_from(limit).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        match epoll::wait(&self.0, rustix::buffer::spare_capacity(&mut events.0), Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
