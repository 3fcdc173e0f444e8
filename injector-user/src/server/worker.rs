//! Worker threads: each has its own runtime, listening sockets and hang-up monitor.
//!
//! The kernel distributes clients over the sockets (`SO_REUSEPORT`). A connection stays on the
//! thread that accepted it, and wakes no other thread.

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

/// A running worker thread.
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
    /// Starts a thread without acceptors. It runs until `stop_workers`; `acceptors` counts its
    /// acceptors.
    ///
    /// # Errors
    /// When the system has no thread or epoll instance left.
    pub(super) fn start(
        number: usize,
        acceptors: &TaskTracker,
        stop_workers: CancellationToken,
    ) -> io::Result<Self> {
        let hangups = HangupMonitor::new()?;
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let (tasks, mut received) = mpsc::unbounded_channel::<Task>();
        let sessions = SessionRegistry::default();
        let (monitor, timer) = (hangups.clone(), sessions.clone());
        let work = async move {
            if let Err(error) = monitor.spawn() {
                tracing::error!(target: target::ENGINE_SPLICE, %error, "cannot monitor spliced sockets for peer close; a closed peer is noticed at the next timeout");
            }
            let spawn_tasks = async {
                while let Some(task) = received.recv().await {
                    tokio::spawn(task);
                }
            };
            tokio::select! {
                ((), ()) = async { tokio::join!(spawn_tasks, stop_workers.cancelled()) } => {}
                () = timer.run_timer() => {}
            }
        };
        let thread =
            thread::Builder::new().name(format!("worker-{number}")).spawn(move || runtime.block_on(work))?;
        Ok(Self { thread, tasks, acceptors: acceptors.clone(), hangups, sessions })
    }

    /// The monitor of this thread's sockets.
    #[must_use]
    pub(super) fn hangups(&self) -> &HangupMonitor {
        &self.hangups
    }

    /// The sessions of this thread.
    #[must_use]
    pub(super) fn sessions(&self) -> &SessionRegistry {
        &self.sessions
    }

    /// Runs an acceptor until its listener stops.
    pub(super) fn spawn_acceptor(&self, acceptor: Acceptor, socket: Socket) {
        // Counted here, so that a shutdown also waits for an acceptor that the thread has not
        // started.
        let acceptor = self.acceptors.track_future(acceptor.run(socket));
        // The send cannot fail: the thread runs until all acceptors have ended.
        let _ = self.tasks.send(Box::pin(acceptor));
    }

    /// Resolves when the thread has responded, with an error if it has exited.
    pub(super) fn check_liveness(&self) -> oneshot::Receiver<()> {
        let (reply, answered) = oneshot::channel();
        let reply = async move {
            // The caller may have stopped waiting.
            let _ = reply.send(());
        };
        let _ = self.tasks.send(Box::pin(reply));
        answered
    }

    /// Waits until the thread has exited, which `stop_workers` causes.
    pub(super) fn join(self) {
        drop(self.tasks);
        // An error means that the thread panicked: the message is in the log, and its connections
        // ended.
        let _ = self.thread.join();
    }
}
