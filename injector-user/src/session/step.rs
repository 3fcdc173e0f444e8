//! A step of one direction: its inputs, its outcomes and its errors.

use std::io;

use super::context::Context;
use crate::net::socket::Endpoint;

/// The sockets of a direction, and what the sessions of its listener share.
#[derive(Clone, Copy)]
pub(super) struct DirectionIo<'a> {
    pub(super) context: &'a Context,
    pub(super) source: &'a Endpoint,
    pub(super) target: &'a Endpoint,
}

/// What a step has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StepOutcome {
    /// Payload was read in user space.
    Read,
    /// The kernel leaves the source to user space from now on.
    Paused,
    /// User space forwards again.
    MovedToUserSpace,
    /// The kernel forwards again.
    Resumed,
    /// Anything else.
    Other,
}

/// Why forwarding cannot continue.
#[derive(Debug)]
pub(super) enum ForwardError {
    /// The source socket failed.
    Source(io::Error),
    /// The target socket failed.
    Target(io::Error),
    /// The kernel dropped payload, or its counts are lost.
    Lost(io::Error),
    /// The source sent a PROXY header of its own.
    Forged,
    /// The source, a backend, has answered the header as commands with this line.
    HeaderMisread(String),
    /// All connections together have too much backlog, and this direction has a part of it.
    Overload,
}
