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
    listener::Acceptor, net::hangup::HangupMonitor, session::registry::SessionRegistry,
    telemetry::log::target,
};

/// A thread at work.
#[derive(Debug)]
pub(super) struct Worker {
    thread: thread::JoinHandle<()>,
    tasks: mpsc::UnboundedSender<Task>,
    acceptors: TaskTracker,
    hangups: HangupMonitor,
    sessions: SessionRegistry,
}

/// A task for the thread: an acceptor or a liveness check.
type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Worker {
    /// Starts one that has no acceptors yet. It serves on until `stop_workers`; its acceptors count among `acceptors`.
    ///
    /// # Errors
    /// When there can be no further thread or epoll instance.
    pub(super) fn start(
        number: usize,
        acceptors: &TaskTracker,
        stop_workers: CancellationToken,
    ) -> io::Result<Self> {
        let hangups = HangupMonitor::new()?;
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let (tasks, mut spawned) = mpsc::unbounded_channel::<Task>();
        let sessions = SessionRegistry::default();
        let (watching, timing) = (hangups.clone(), sessions.clone());
        let work = async move {
            if let Err(error) = watching.spawn() {
                tracing::error!(target: target::ENGINE_SPLICE, %error, "cannot monitor spliced sockets for peer close; a closed peer is noticed at the next timeout");
            }
            let tasks = async {
                while let Some(acceptor) = spawned.recv().await {
                    tokio::spawn(acceptor);
                }
            };
            tokio::select! {
                ((), ()) = async { tokio::join!(tasks, stop_workers.cancelled()) } => {}
                () = timing.run_timer() => {}
            }
        };
        let thread =
            thread::Builder::new().name(format!("worker-{number}")).spawn(move || runtime.block_on(work))?;
        Ok(Self { thread, tasks, acceptors: acceptors.clone(), hangups, sessions })
    }

    /// For the endpoints that live on this thread.
    #[must_use]
    pub(super) fn hangups(&self) -> &HangupMonitor {
        &self.hangups
    }

    /// For the connections that live on this thread.
    #[must_use]
    pub(super) fn sessions(&self) -> &SessionRegistry {
        &self.sessions
    }

    /// Runs an acceptor until its listener stops.
    pub(super) fn spawn_acceptor(&self, acceptor: Acceptor, socket: Socket) {
        // Counted from here on: whoever waits for the acceptors waits for those that the thread has not come to yet.
        let acceptor = self.acceptors.track_future(acceptor.run(socket));
        // The thread lives until the acceptors are closed.
        let _ = self.tasks.send(Box::pin(acceptor));
    }

    /// Resolves when the thread has come to it; an error if the thread is no more.
    pub(super) fn check_liveness(&self) -> oneshot::Receiver<()> {
        let (reply, answered) = oneshot::channel();
        let reply = async move {
            // Who asked may wait no longer.
            let _ = reply.send(());
        };
        let _ = self.tasks.send(Box::pin(reply));
        answered
    }

    /// Waits for the thread's end, which comes after `stop_workers`.
    pub(super) fn join(self) {
        drop(self.tasks);
        // It has panicked: its message was printed, and its connections are gone.
        let _ = self.thread.join();
    }
}
