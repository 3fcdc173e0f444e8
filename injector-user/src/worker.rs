//! Threads that serve connections, one for each processor. Each has a runtime, listening sockets and a watch of its own
//! (`SO_REUSEPORT`: the kernel spreads clients over them), so a connection stays on the thread that accepted it and wakes no
//! other.

use std::{io, thread};

use socket2::Socket;
use tokio::runtime;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{listener::Door, watch::Watch};

/// A thread at work.
#[derive(Debug)]
pub struct Worker {
    thread: thread::JoinHandle<()>,
}

impl Worker {
    /// Keeps these doors open, until they close themselves; `watch` is theirs. The thread serves on until `ended`.
    ///
    /// # Errors
    /// When there can be no further thread or epoll instance.
    pub fn start(
        number: usize,
        watch: Watch,
        open: Vec<(Door, Socket)>,
        doors: &TaskTracker,
        ended: CancellationToken,
    ) -> io::Result<Self> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        // Counted from here on: whoever waits for the doors waits for those of a thread that has not begun yet.
        let open: Vec<_> =
            open.into_iter().map(|(door, socket)| doors.track_future(door.keep_open(socket))).collect();
        let work = async move {
            if let Err(error) = watch.follow() {
                tracing::error!(%error, "nobody hears of hang-ups");
            }
            for door in open {
                tokio::spawn(door);
            }
            ended.cancelled().await;
        };
        let thread =
            thread::Builder::new().name(format!("worker-{number}")).spawn(move || runtime.block_on(work))?;
        Ok(Self { thread })
    }

    /// Waits for the thread's end, which comes after `ended`.
    pub fn join(self) {
        // It has panicked: its message was printed, and its connections are gone.
        let _ = self.thread.join();
    }
}
