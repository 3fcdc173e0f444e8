//! What the sessions of a listener share.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::registry::SessionRegistry;
use crate::{
    backend::Backends,
    config::{EnrolmentPolicy, HeaderBy, Receiver, Timeouts, Watermarks},
    engine::Engine,
    net::{hangup::HangupMonitor, splice_pipe::Pipes},
    protocol::Protocol,
    telemetry::{backlog::BacklogTotal, metrics::ListenerMetrics},
};

/// What all connections of a listener share.
#[derive(Debug)]
pub struct Context {
    /// The listener's name.
    pub listener: Arc<str>,
    /// What is spoken.
    pub protocol: Protocol,
    /// Whether a backend that closes without a byte has failed: in mail protocols the server always answers.
    pub expects_banner: bool,
    /// Where connections go.
    pub backends: Arc<Backends>,
    /// What moves their bytes.
    pub engine: Arc<dyn Engine>,
    /// How long they may take.
    pub timeouts: Timeouts,
    /// What the backend can read.
    pub receiver: Receiver,
    /// Counters of the listener.
    pub metrics: ListenerMetrics,
    /// Who puts the header in front, where the engine has a program for it.
    pub header: HeaderBy,
    /// When the kernel's plane pays off.
    pub enrolment: EnrolmentPolicy,
    /// Through which bulk moves in user space.
    pub pipes: Pipes,
    /// How much may wait in the kernel.
    pub watermarks: Watermarks,
    /// How much does, over all listeners.
    pub backlog_total: BacklogTotal,
    /// Hang-ups of spliced sockets.
    pub hangups: HangupMonitor,
    /// Cancelled when the time of a stop or a drain is over. Who cancels it calls all connections ([`SessionRegistry::wake_all`]): they
    /// look then.
    pub abort: CancellationToken,
    /// Which connections there are.
    pub sessions: SessionRegistry,
    /// Makes the unique ids of this run differ from those of another.
    pub run_id: u64,
}
