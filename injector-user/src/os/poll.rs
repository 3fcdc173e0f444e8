//! Readiness of descriptors: once by poll(2), or by the poller of the runtime.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use rustix::event::{self, PollFd, PollFlags, Timespec};
use tokio::io::{Interest, unix::AsyncFd};

const NO_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// Whether `socket` is readable now. For a listening socket: whether a connection can be accepted.
///
/// # Errors
/// As poll(2).
pub fn readable_now(socket: &impl AsFd) -> io::Result<bool> {
    let mut polled = [PollFd::new(socket, PollFlags::IN)];
    event::poll(&mut polled, Some(&NO_WAIT))?;
    Ok(polled[0].revents().contains(PollFlags::IN))
}

/// Registers `inner` with the runtime's poller.
///
/// # Errors
/// When the runtime's epoll instance rejects the descriptor.
pub fn register<T: AsFd + AsRawFd>(inner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: by the contract of `AsFd`, the descriptor of `inner` stays open and the same as long
    // as `inner` lives, and this function neither moves `inner` out nor mutates it.
    let registered = unsafe { AsyncFd::register_with_interest(inner, interest) };
    Ok(registered?)
}
