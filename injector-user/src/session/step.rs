//! One step of a direction: what it works on, and what becomes of it.

use std::io;

use super::context::Context;
use crate::net::socket::Endpoint;

/// Between which sockets a direction runs, and what it shares with all others.
#[derive(Clone, Copy)]
pub(super) struct DirectionIo<'a> {
    pub(super) context: &'a Context,
    pub(super) source: &'a Endpoint,
    pub(super) target: &'a Endpoint,
}

/// What a step has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StepOutcome {
    /// Payload was read in user space.
    Read,
    /// The kernel was told to leave the source to user space.
    Paused,
    /// User space carries the direction again.
    MovedToUserSpace,
    /// The kernel carries the direction once more.
    Resumed,
    /// Anything else.
    Other,
}

/// Why a direction cannot go on.
#[derive(Debug)]
pub(super) enum ForwardError {
    /// The socket that payload comes from.
    Source(io::Error),
    /// The socket that payload goes to.
    Target(io::Error),
    /// The kernel dropped payload, or lost count of it.
    Lost(io::Error),
    /// The source sent a PROXY header of its own.
    Forged,
    /// Too much waits in the kernel over all connections, and here is some of it.
    Overload,
}
