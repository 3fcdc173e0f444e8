//! What the sessions of a listener share.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::registry::SessionRegistry;
use crate::{
    backend::Backends,
    config::{EnrolmentPolicy, HeaderMethod, Network, Receiver, Timeouts, Watermarks},
    engine::Engine,
    net::{hangup::HangupMonitor, splice_pipe::Pipes},
    protocol::Protocol,
    telemetry::{backlog::BacklogTotal, metrics::ListenerMetrics},
};

/// What all sessions of a listener on one worker share.
#[derive(Debug)]
pub struct Context {
    /// The listener's name.
    pub listener: Arc<str>,
    /// Networks of addresses that are no client's own: their connections are rejected at the accept.
    pub translated_sources: Vec<Network>,
    /// The mail protocol.
    pub protocol: Protocol,
    /// Whether a backend that closes before its first byte has failed. In mail protocols the server
    /// always answers.
    pub expects_banner: bool,
    /// The backends to connect to.
    pub backends: Arc<Backends>,
    /// The engine that forwards.
    pub engine: Arc<dyn Engine>,
    /// The listener's timeouts.
    pub timeouts: Timeouts,
    /// The header format that the backend expects.
    pub receiver: Receiver,
    /// The listener's counters.
    pub metrics: ListenerMetrics,
    /// How the header is sent, in an engine that has a program for it.
    pub header: HeaderMethod,
    /// When a direction is enrolled in the kernel.
    pub enrolment: EnrolmentPolicy,
    /// The pipes for bulk data in user space.
    pub pipes: Pipes,
    /// Limits of the backlog in the kernel.
    pub watermarks: Watermarks,
    /// The backlog in the kernel over all listeners.
    pub backlog_total: BacklogTotal,
    /// Monitors spliced sockets for peer close.
    pub hangups: HangupMonitor,
    /// Cancelled at the deadline of a shutdown or a drain. Sessions check it when their timer
    /// fires, so [`SessionRegistry::wake_all`] must follow the cancellation.
    pub abort: CancellationToken,
    /// The open sessions of the worker.
    pub sessions: SessionRegistry,
    /// Distinguishes the unique ids of this run of the daemon from those of another.
    pub run_id: u64,
}
