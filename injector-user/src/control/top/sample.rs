//! Samples a running daemon.

use std::{path::Path, time::Instant};

use anyhow::bail;

use super::model::Sample;
use crate::control::{
    client,
    wire::{Answer, Request},
};

/// More sessions than a terminal has lines.
const MAX_SESSIONS: usize = 200;

/// Requests the status and the oldest sessions.
///
/// # Errors
/// When no daemon answers.
pub(super) fn sample(socket: &Path) -> anyhow::Result<Sample> {
    let at = Instant::now();
    let Answer::Status(status) = client::send(socket, &Request::Status)? else {
        bail!("unexpected reply: is the daemon of another version?");
    };
    let request = Request::Sessions { listener: None, limit: Some(MAX_SESSIONS) };
    let Answer::Sessions(sessions) = client::send(socket, &request)? else {
        bail!("unexpected reply: is the daemon of another version?");
    };
    Ok(Sample { at, status: *status, sessions })
}
