//! The engines: how the bytes of a connection are forwarded. The trait [`Engine`] is the part of an
//! engine that a session uses; the life of a connection is the same in every engine.

#[cfg(feature = "bpf")]
pub mod attach;
pub mod bans;
#[cfg(feature = "bpf")]
pub mod bpf;
pub mod check;
#[cfg(feature = "bpf")]
pub mod guard;
pub mod guarded_device;
#[cfg(feature = "bpf")]
pub mod inline;
pub mod kernel;
pub mod registry;
pub mod relay;
pub mod select;
pub mod served_listener;
#[cfg(feature = "bpf")]
pub mod splice;
pub mod usage;

use std::{
    fmt::Debug,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use atomic_waker::AtomicWaker;

use injector_common::splice::Flow;
use socket2::Socket;

use crate::net::{socket::Endpoint, syn::SynObserver};

/// An engine that terminates TCP.
pub trait Engine: Debug + Send + Sync {
    /// Its name in the configuration, in logs and in labels.
    fn name(&self) -> &'static str;

    /// Sends the whole `header` in one piece, and behind it as much of `payload` (which may be
    /// empty) as fits, on a socket that has sent nothing yet.
    ///
    /// # Errors
    /// The caller must reset the connection: how much the backend has read is not known.
    fn inject(&self, backend: &Endpoint, header: &[u8], payload: &[u8]) -> io::Result<SentHeader>;

    /// Observes the peer's SYN on a socket that has not begun to connect. `None` if this engine
    /// does not need it, or cannot.
    fn observe_syn(&self, socket: &Arc<Socket>) -> Option<Box<dyn SynObserver>>;

    /// Makes the kernel forward what `source` receives to `target`; `None` if this engine never
    /// does. User space must have written all `read` bytes that it read from `source`.
    fn enrol(
        &self,
        source: &Endpoint,
        target: &Endpoint,
        read: u64,
    ) -> Option<Result<Box<dyn SplicedDirection>, EnrolmentRefusal>>;
}

/// How a header was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SentHeader {
    /// Bytes of the payload that were sent with it.
    pub payload: usize,
    /// Why user space sent the header although the engine has a program for that.
    pub fallback_reason: Option<&'static str>,
}

/// One direction that the kernel forwards. Dropping it removes the direction from the kernel, and
/// the kernel discards what is still queued. Drop it only after [`SplicedDirection::delivered`], or
/// to reset the connection.
pub trait SplicedDirection: Debug + Send + Sync {
    /// The counts of the direction.
    ///
    /// # Errors
    /// When the counts are lost; the caller must reset the connection.
    fn flow(&self) -> io::Result<Flow>;

    /// Notified when the backlog should be checked.
    fn backlog_notify(&self) -> &BacklogNotify;

    /// What is queued in the kernel.
    ///
    /// # Errors
    /// When the counts are lost; the caller must reset the connection.
    fn backlog(&self, target: &Endpoint) -> io::Result<Backlog>;

    /// Extends the kernel's credit after a check in which [`Backlog::queued`] was `queued`, and where
    /// `target` keeps up, what `source` may send without an answer. Never after
    /// [`SplicedDirection::pause`].
    ///
    /// # Errors
    /// When the kernel refuses; the caller must reset the connection.
    fn grant(&self, source: &Endpoint, target: &Endpoint, queued: u64) -> io::Result<()>;

    /// Leaves what `source` receives from now on to user space, so that TCP closes the window.
    ///
    /// # Errors
    /// When the kernel refuses; the caller must reset the connection.
    fn pause(&self, source: &Endpoint) -> io::Result<()>;

    /// After [`SplicedDirection::pause`]: lets the kernel forward again, once it finds that user
    /// space has written everything that was left to it, which is `written` bytes. `false` if there
    /// is more to read first. Until [`SplicedDirection::cancel_resume`] user space must not read or
    /// write.
    ///
    /// # Errors
    /// When the kernel refuses; the caller must reset the connection.
    fn propose_resume(&self, written: u64) -> io::Result<bool>;

    /// Ends [`SplicedDirection::propose_resume`], and returns what the kernel has done until then.
    ///
    /// # Errors
    /// When the counts are lost; the caller must reset the connection.
    fn cancel_resume(&self, source: &Endpoint, target: &Endpoint) -> io::Result<ResumeOutcome>;

    /// Whether, after the peer's FIN, every byte that `source` received (`read` of them in user
    /// space) is in the target's own send queue, from where TCP delivers it. Only then may the FIN
    /// follow.
    ///
    /// # Errors
    /// When bytes were lost: the caller must reset the connection and never send a FIN. A broken
    /// target is not an error here; nothing is ever delivered to it.
    fn delivered(&self, source: &Endpoint, target: &Endpoint, read: u64) -> io::Result<bool>;
}

/// How much of a direction is queued in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backlog {
    /// Bytes that are not yet in the target's send queue.
    pub bytes: u64,
    /// Bytes that were put into the target's send queue so far.
    pub queued: u64,
    /// The kernel has used up its credit and stopped forwarding, as after
    /// [`SplicedDirection::pause`], because the daemon did not check in time.
    pub paused: bool,
}

/// The outcome of [`SplicedDirection::propose_resume`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResumeOutcome {
    /// The kernel forwards.
    Resumed,
    /// The kernel has forwarded and stopped again: a part of that is still queued.
    Paused,
    /// The kernel has not resumed: user space goes on.
    Cancelled,
}

/// Notifies a session that the backlog of a direction should be checked.
#[derive(Debug, Default)]
pub struct BacklogNotify {
    notified: AtomicBool,
    waker: AtomicWaker,
}

impl BacklogNotify {
    /// Notifies the session.
    pub fn notify(&self) {
        self.notified.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Ready once for any number of notifications since it was last ready.
    pub fn poll_notified(&self, task: &mut Context<'_>) -> Poll<()> {
        self.waker.register(task.waker());
        if self.notified.swap(false, Ordering::AcqRel) { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// Why a direction stays in user space.
#[derive(Debug)]
pub struct EnrolmentRefusal {
    /// The label of `injector_enrolment_failures_total`, one of a closed set.
    pub reason: &'static str,
    /// The details for the log.
    pub detail: String,
}
