//! What the session asks of an engine. Engines differ only in how bytes move; the life of a connection is the same.

#[cfg(feature = "bpf")]
pub mod bpf;
pub mod check;
#[cfg(feature = "bpf")]
pub mod inline;
pub mod registry;
pub mod relay;
pub mod select;
#[cfg(feature = "bpf")]
pub mod splice;

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

    /// Sends `header`, whole and in one piece, and behind it what fits of `payload` (which may be empty) on a socket
    /// that has sent nothing yet.
    ///
    /// # Errors
    /// The connection must be reset: the backend has read nothing, or nobody knows what.
    fn inject(&self, backend: &Endpoint, header: &[u8], payload: &[u8]) -> io::Result<Injected>;

    /// Observes the peer's SYN on a socket that has not begun to connect. `None` if this engine does not
    /// need it, or cannot.
    fn observe_syn(&self, socket: &Arc<Socket>) -> Option<Box<dyn SynObserver>>;

    /// Has the kernel carry what `source` receives to `target`; `None` if this engine never does. All that user space
    /// read of `source`, `read` bytes, must have been written.
    fn enrol(
        &self,
        source: &Endpoint,
        target: &Endpoint,
        read: u64,
    ) -> Option<Result<Box<dyn SplicedDirection>, Refused>>;
}

/// How a header went out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injected {
    /// Bytes of the payload that went along.
    pub payload: usize,
    /// Why user space sent it although the engine has a program for it.
    pub refused: Option<&'static str>,
}

/// One direction in the hands of the kernel. Dropping it takes the direction back; what is then still under way is
/// lost, so drop it only after [`SplicedDirection::delivered`], or to reset.
pub trait SplicedDirection: Debug + Send + Sync {
    /// What was carried so far.
    ///
    /// # Errors
    /// When nobody knows any more; the connection must be reset.
    fn flow(&self) -> io::Result<Flow>;

    /// Rings when the backlog should be looked at.
    fn bell(&self) -> &Bell;

    /// What is on its way.
    ///
    /// # Errors
    /// When nobody knows any more; the connection must be reset.
    fn backlog(&self, target: &Endpoint) -> io::Result<Backlog>;

    /// Lets the kernel go on after a look: the target has taken so much. Never after [`SplicedDirection::hold`].
    ///
    /// # Errors
    /// When the kernel refuses; the connection must be reset.
    fn grant(&self, taken: u64) -> io::Result<()>;

    /// Leaves what `source` receives from here on to user space, so that TCP closes the window.
    ///
    /// # Errors
    /// When the kernel refuses; the connection must be reset.
    fn hold(&self, source: &Endpoint) -> io::Result<()>;

    /// After [`SplicedDirection::hold`]: lets the kernel carry again once it sees that user space has written all that was left to it,
    /// which is `written` bytes. `false` where there is more to read first. Until [`SplicedDirection::withdraw`] user space neither reads
    /// nor writes.
    ///
    /// # Errors
    /// When the kernel refuses; the connection must be reset.
    fn offer(&self, written: u64) -> io::Result<bool>;

    /// Takes [`SplicedDirection::offer`] back, unless the kernel carries again by now.
    ///
    /// # Errors
    /// When nobody knows any more; the connection must be reset.
    fn withdraw(&self, source: &Endpoint, target: &Endpoint) -> io::Result<Offer>;

    /// Whether, after the peer's FIN, every byte that `source` ever received (`read` of them in user space) is in the
    /// target's own send queue, from where TCP delivers it. Only then may the FIN follow.
    ///
    /// # Errors
    /// When bytes were lost: reset, never FIN. A broken target is no error here; it is never delivered.
    fn delivered(&self, source: &Endpoint, target: &Endpoint, read: u64) -> io::Result<bool>;
}

/// What is on its way to a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backlog {
    /// Bytes that the target has not taken into its send queue.
    pub bytes: u64,
    /// Bytes that it has.
    pub taken: u64,
    /// The kernel has stopped carrying by itself, as after [`SplicedDirection::hold`]: nobody looked in time.
    pub held: bool,
}

/// What became of [`SplicedDirection::offer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// The kernel carries.
    Taken,
    /// The kernel has carried, and stopped again: part of it is still on its way to the target.
    Held,
    /// It has not: user space goes on.
    Void,
}

/// Rung by the kernel, heard by a session.
#[derive(Debug, Default)]
pub struct Bell {
    rung: AtomicBool,
    changed: AtomicWaker,
}

impl Bell {
    /// Rings.
    pub fn ring(&self) {
        self.rung.store(true, Ordering::Release);
        self.changed.wake();
    }

    /// Whether it has rung since it was last heard.
    pub fn poll_heard(&self, task: &mut Context<'_>) -> Poll<()> {
        self.changed.register(task.waker());
        if self.rung.swap(false, Ordering::AcqRel) { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// Why a direction stays in user space: the label of `injector_enrolment_failures_total`, and the whole story.
#[derive(Debug)]
pub struct Refused {
    /// One of a closed set.
    pub reason: &'static str,
    /// For the log.
    pub detail: String,
}
