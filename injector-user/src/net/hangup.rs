//! Reports when the peers of spliced sockets close.
//!
//! A spliced socket registered with tokio would wake the daemon for every message that the kernel
//! forwards. Therefore these sockets are registered in an epoll instance of the daemon's own, for
//! FIN, errors and hang-up only. Tokio polls that instance as one descriptor.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use atomic_waker::AtomicWaker;
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    os::{epoll::Epoll, poll},
    telemetry::log::target,
};

/// Monitors sockets for FIN, errors and hang-up. Clones share one epoll instance.
#[derive(Clone, Debug)]
pub struct HangupMonitor(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    epoll: Epoll,
    signals: Mutex<HashMap<u64, Arc<Signal>>>,
}

#[derive(Debug, Default)]
struct Signal {
    finished: AtomicBool,
    broken: AtomicBool,
    /// The task that owns the socket.
    changed: AtomicWaker,
}

impl HangupMonitor {
    /// Creates a monitor and spawns its task in the current runtime.
    ///
    /// # Errors
    /// As [`HangupMonitor::new`] and [`HangupMonitor::spawn`].
    pub fn start() -> io::Result<Self> {
        let monitor = Self::new()?;
        monitor.spawn()?;
        Ok(monitor)
    }

    /// Creates a monitor without a task; see [`HangupMonitor::spawn`].
    ///
    /// # Errors
    /// As epoll_create1(2).
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Shared { epoll: Epoll::new()?, signals: Mutex::default() })))
    }

    /// Spawns the task that dispatches events, in the current runtime.
    ///
    /// # Errors
    /// When the runtime cannot poll the instance.
    pub fn spawn(&self) -> io::Result<()> {
        let polled = poll::register(EpollOf(Arc::clone(&self.0)), Interest::READABLE)?;
        tokio::spawn(dispatch(polled));
        Ok(())
    }

    /// Monitors `socket`, which has the cookie `cookie`, until the result is dropped.
    ///
    /// # Errors
    /// As epoll_ctl(2). A socket can be registered only once at a time.
    pub fn add<S: AsFd>(&self, socket: S, cookie: u64) -> io::Result<HangupRegistration<S>> {
        let signal = Arc::new(Signal::default());
        self.0.lock().insert(cookie, Arc::clone(&signal));
        let registration = HangupRegistration { monitor: self.clone(), socket, cookie, signal };
        self.0.epoll.add(&registration.socket, cookie)?;
        Ok(registration)
    }
}

/// A monitored socket.
#[derive(Debug)]
pub struct HangupRegistration<S: AsFd> {
    monitor: HangupMonitor,
    socket: S,
    cookie: u64,
    signal: Arc<Signal>,
}

impl<S: AsFd> HangupRegistration<S> {
    /// Ready when the peer has finished sending, or the connection is broken.
    pub fn poll_finished(&self, task: &mut Context<'_>) -> Poll<()> {
        self.poll(task, &self.signal.finished)
    }

    /// Ready when the socket has a pending error or is closed in both directions.
    pub fn poll_broken(&self, task: &mut Context<'_>) -> Poll<()> {
        self.poll(task, &self.signal.broken)
    }

    fn poll(&self, task: &mut Context<'_>, reached: &AtomicBool) -> Poll<()> {
        // Register first, then check: a change in between is not missed.
        self.signal.changed.register(task.waker());
        if reached.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl<S: AsFd> Drop for HangupRegistration<S> {
    fn drop(&mut self) {
        // The kernel removes a closed socket from epoll.
        let _ = self.monitor.0.epoll.remove(&self.socket);
        self.monitor.0.lock().remove(&self.cookie);
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<Signal>>> {
        self.signals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct EpollOf(Arc<Shared>);

impl AsFd for EpollOf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.epoll.as_fd()
    }
}

impl AsRawFd for EpollOf {
    fn as_raw_fd(&self) -> RawFd {
        self.0.epoll.as_raw_fd()
    }
}

async fn dispatch(polled: AsyncFd<EpollOf>) {
    while let Ok(mut ready) = polled.readable().await {
        let shared = &polled.get_ref().0;
        let events = match shared.epoll.wait() {
            Ok(events) => events,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!(target: target::ENGINE_SPLICE, %error, "cannot monitor spliced sockets for peer close; a closed peer is noticed at the next timeout");
                return;
            }
        };
        if events.is_empty() {
            ready.clear_ready();
        }
        for event in events {
            // The registration was dropped in the meantime.
            let Some(signal) = shared.lock().get(&event.key).cloned() else { continue };
            signal.finished.store(true, Ordering::Release);
            if event.broken {
                signal.broken.store(true, Ordering::Release);
            }
            signal.changed.wake();
        }
    }
}
