//! Threads that serve connections, one for each processor. Each has a runtime, listening sockets and a watch of its own
//! (`SO_REUSEPORT`: the kernel spreads clients over them), so a connection stays on the thread that accepted it and wakes no
//! other.

use std::{io, pin::Pin, thread};

use socket2::Socket;
use tokio::{
    runtime,
    sync::{mpsc, oneshot},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    listener::Door, net::hangup::HangupMonitor, session::registry::SessionRegistry, telemetry::log::target,
};

/// A thread at work.
#[derive(Debug)]
pub struct Worker {
    thread: thread::JoinHandle<()>,
    open: mpsc::UnboundedSender<Pending>,
    doors: TaskTracker,
    hangups: HangupMonitor,
    sessions: SessionRegistry,
}

/// A door that is to be kept open.
type Pending = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Worker {
    /// Starts one that has no doors yet. It serves on until `ended`; its doors count among `doors`.
    ///
    /// # Errors
    /// When there can be no further thread or epoll instance.
    pub fn start(number: usize, doors: &TaskTracker, ended: CancellationToken) -> io::Result<Self> {
        let hangups = HangupMonitor::new()?;
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let (open, mut opened) = mpsc::unbounded_channel::<Pending>();
        let sessions = SessionRegistry::default();
        let (watching, timing) = (hangups.clone(), sessions.clone());
        let work = async move {
            if let Err(error) = watching.spawn() {
                tracing::error!(target: target::ENGINE_SPLICE, %error, "cannot monitor spliced sockets for peer close; a closed peer is noticed at the next timeout");
            }
            let open = async {
                while let Some(door) = opened.recv().await {
                    tokio::spawn(door);
                }
            };
            tokio::select! {
                ((), ()) = async { tokio::join!(open, ended.cancelled()) } => {}
                () = timing.run_timer() => {}
            }
        };
        let thread =
            thread::Builder::new().name(format!("worker-{number}")).spawn(move || runtime.block_on(work))?;
        Ok(Self { thread, open, doors: doors.clone(), hangups, sessions })
    }

    /// For the endpoints that live on this thread.
    #[must_use]
    pub fn hangups(&self) -> &HangupMonitor {
        &self.hangups
    }

    /// For the connections that live on this thread.
    #[must_use]
    pub fn sessions(&self) -> &SessionRegistry {
        &self.sessions
    }

    /// Keeps a door open, until it closes itself.
    pub fn open(&self, door: Door, socket: Socket) {
        // Counted from here on: whoever waits for the doors waits for those that the thread has not come to yet.
        let door = self.doors.track_future(door.keep_open(socket));
        // The thread lives until the doors are closed.
        let _ = self.open.send(Box::pin(door));
    }

    /// Resolves when the thread has come to it; an error if the thread is no more.
    pub fn pulse(&self) -> oneshot::Receiver<()> {
        let (beat, heard) = oneshot::channel();
        let beat = async move {
            // Who asked may wait no longer.
            let _ = beat.send(());
        };
        let _ = self.open.send(Box::pin(beat));
        heard
    }

    /// Waits for the thread's end, which comes after `ended`.
    pub fn join(self) {
        drop(self.open);
        // It has panicked: its message was printed, and its connections are gone.
        let _ = self.thread.join();
    }
}
