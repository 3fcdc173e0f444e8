//! Having the payload of one direction carried by the program `verdict`.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use aya::maps::MapError;
use injector_common::{
    SeqNumber,
    splice::{Credit, Flow},
};
use thiserror::Error;

use super::Splice;
use crate::{
    engine::{Backlog, BacklogNotify, ResumeOutcome},
    net::socket::Endpoint,
    os::sockopt::{self, TcpInfo},
};

/// Why a direction stays in user space.
#[derive(Debug, Error)]
pub enum EnrolError {
    /// A map refused a socket or a flow.
    #[error("map {map}: {error}")]
    Map {
        /// The map's name.
        map: &'static str,
        /// What the kernel said.
        error: MapError,
    },
    /// Nobody knows the sequence number at which the source's stream began: a connection accepted by SYN cookie, say.
    #[error("the initial sequence number of the connection was not observed")]
    IsnUnknown,
    /// The target acknowledged so fast that its counts could not be read twice alike.
    #[error("could not read a consistent acknowledgement number of the target socket")]
    Unsteady,
    /// A socket would not say its state.
    #[error(transparent)]
    Socket(#[from] io::Error),
}

impl EnrolError {
    /// The label of `injector_enrolment_failures_total`.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Map { error: MapError::SyscallError(error), .. } => map_update_reason(&error.io_error),
            Self::Map { .. } => "other",
            Self::IsnUnknown => "isn_unknown",
            Self::Unsteady => "unsteady",
            Self::Socket(_) => "socket",
        }
    }
}

/// The label for what the kernel said to a map update.
#[must_use]
pub fn map_update_reason(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        // Only established sockets enrol: an early FIN comes to this (sock_map_sk_state_allowed, net/core/sock_map.c).
        Some(libc::EOPNOTSUPP) => "not_established",
        Some(libc::E2BIG | libc::ENOSPC) => "map_full",
        Some(libc::ENOMEM) => "no_memory",
        Some(libc::EPERM | libc::EACCES) => "not_permitted",
        _ => "other",
    }
}

/// One direction of a connection in the hands of the kernel. Dropping it takes the direction back; what is then still
/// on its way to the target is lost, so drop it only after [`EnrolledFlow::delivered`], or to reset.
#[derive(Debug)]
pub struct EnrolledFlow {
    splice: Arc<Splice>,
    source: u64,
    /// What the target had queued in its life before the first redirected byte.
    base: u64,
    /// Of what was left to user space, how much it had written to the target when it last offered to go on.
    written: AtomicU64,
    notify: Arc<BacklogNotify>,
}

impl EnrolledFlow {
    /// From now on `verdict` hands `target` what `source` receives. All that user space read of `source`, `read` bytes, must
    /// have been written to `target`.
    ///
    /// # Errors
    /// [`EnrolError`]; nothing has changed then.
    pub fn enrol(
        splice: &Arc<Splice>,
        source: &Endpoint,
        target: &Endpoint,
        read: u64,
    ) -> Result<Self, EnrolError> {
        let next = next_sequence(source, read).ok_or(EnrolError::IsnUnknown)?;
        let base = stable_queued_bytes(target)?;
        let failed = |map| move |error| EnrolError::Map { map, error };
        let maps = &splice.maps;
        maps.add_flow(source.cookie(), next).map_err(failed("FLOWS"))?;
        // From here on dropping undoes what was done; removing what is not there does no harm.
        let notify = splice.notifiers.register(source.cookie());
        let spliced = Self {
            splice: Arc::clone(splice),
            source: source.cookie(),
            base,
            written: AtomicU64::new(0),
            notify,
        };
        maps.set_credit(source.cookie(), Credit::up_to(splice.credit)).map_err(failed("CREDIT"))?;
        maps.add_target(source.cookie(), target).map_err(failed("TARGETS"))?;
        maps.add_source(source.cookie(), source).map_err(failed("VERDICT"))?;
        // What came in before waits in the receive queue for the next segment, which may never come. That cannot fail on
        // an open socket; if it did, the proof kicks again.
        let _ = sockopt::rerun_data_ready(source);
        Ok(spliced)
    }

    /// What was carried so far.
    ///
    /// # Errors
    /// When the flow is gone from its map, which only somebody else can have done.
    pub fn flow(&self) -> Result<Flow, MapError> {
        self.splice.maps.flow(self.source)
    }

    /// Rings when the backlog should be looked at.
    #[must_use]
    pub fn backlog_notify(&self) -> &BacklogNotify {
        &self.notify
    }

    /// Bytes redirected that the target has not taken into its send queue: they wait on a list that knows no limit and
    /// is charged to nobody (sk_psock_skb_redirect, net/core/skmsg.c).
    ///
    /// # Errors
    /// When the target or the flow does not answer.
    pub fn backlog(&self, target: &Endpoint) -> io::Result<Backlog> {
        // The target first: bytes redirected in between are then counted as waiting, never as taken.
        let queued = self.queued(target)?;
        let flow = self.flow().map_err(io::Error::other)?;
        if flow.lost > 0 {
            return Err(lost_error(&flow));
        }
        Ok(Backlog { bytes: flow.redirected.saturating_sub(queued), queued, paused: flow.passing != 0 })
    }

    /// Lets the program go on: the target has taken so many bytes of this flow. Never after [`EnrolledFlow::pause`].
    ///
    /// # Errors
    /// When the map refuses.
    pub fn grant(&self, queued: u64) -> io::Result<()> {
        self.set_credit(Credit::up_to(queued + self.splice.credit))
    }

    /// Has the program leave to `source` what it receives from here on: it waits there for user space to read, charged
    /// to the receive buffer, so that TCP closes the window. What was redirected goes on to the target.
    ///
    /// The source is not taken out of `VERDICT` for that: deleting an element takes no socket lock, and a segment that the
    /// kernel is just handing to the program is then dropped (sk_psock_verdict_recv, net/core/skmsg.c, finds no program
    /// and keeps its initial verdict).
    ///
    /// # Errors
    /// When the map refuses.
    pub fn pause(&self, source: &Endpoint) -> io::Result<()> {
        self.set_credit(Credit::up_to(0))?;
        wait_for_program(source)
    }

    /// Has the program redirect again, once it sees that user space has written all that was left to it: `written`
    /// bytes. `false` where more has come in the meantime: read and write that first. Until [`EnrolledFlow::cancel_resume`] user space
    /// must neither read nor write.
    ///
    /// The program decides, under the lock of the source: when [`Flow::passed`] is `written` at that moment, nothing of this
    /// direction lies outside the target's send queue, and what is redirected from there on is queued behind it.
    ///
    /// # Errors
    /// When the flow or the map does not answer.
    pub fn propose_resume(&self, written: u64) -> io::Result<bool> {
        let flow = self.flow().map_err(io::Error::other)?;
        if flow.passed != written {
            return Ok(false);
        }
        self.written.store(written, Ordering::Relaxed);
        self.set_credit(Credit { limit: flow.redirected + self.splice.credit, resume_at: written })?;
        Ok(true)
    }

    /// Takes [`EnrolledFlow::propose_resume`] back, and tells what the program has made of it.
    ///
    /// # Errors
    /// When the flow, the map or a socket does not answer.
    pub fn cancel_resume(&self, source: &Endpoint, target: &Endpoint) -> io::Result<ResumeOutcome> {
        let limit = self.flow().map_err(io::Error::other)?.redirected + self.splice.credit;
        self.set_credit(Credit::up_to(limit))?;
        wait_for_program(source)?;
        let backlog = self.backlog(target)?;
        Ok(match (backlog.paused, backlog.bytes) {
            (false, _) => ResumeOutcome::Resumed,
            (true, 0) => ResumeOutcome::Cancelled,
            // It was taken, and the program has stopped again by itself.
            (true, _) => ResumeOutcome::Paused,
        })
    }

    fn set_credit(&self, credit: Credit) -> io::Result<()> {
        self.splice.maps.set_credit(self.source, credit).map_err(io::Error::other)
    }

    /// Bytes of this flow in the target's send queue, and beyond.
    fn queued(&self, target: &Endpoint) -> io::Result<u64> {
        // Acknowledged first: bytes acknowledged in between are then missing from the sum, never counted twice.
        let acknowledged = sockopt::tcp_info(target)?.bytes_acked;
        let before = self.base + self.written.load(Ordering::Relaxed);
        Ok((acknowledged + sockopt::unacknowledged(target)?).saturating_sub(before))
    }

    /// Whether, after the peer's FIN, every byte that `source` ever received (`read` of them in user space) is in the
    /// target's own send queue, from where TCP delivers it. Only then may the FIN follow.
    ///
    /// # Errors
    /// When bytes were lost: reset, never FIN.
    pub fn delivered(&self, source: &Endpoint, target: &Endpoint, read: u64) -> io::Result<bool> {
        let received = sockopt::tcp_info(source)?.bytes_received;
        let flow = self.flow().map_err(io::Error::other)?;
        if flow.lost > 0 {
            return Err(lost_error(&flow));
        }
        // The FIN counts one.
        if read + flow.redirected + 1 != received {
            sockopt::rerun_data_ready(source)?;
            return Ok(false);
        }
        let state = sockopt::tcp_info(target)?.state;
        if !matches!(state, TcpInfo::ESTABLISHED | TcpInfo::CLOSE_WAIT) {
            // Broken; its own event says how.
            return Ok(false);
        }
        Ok(self.queued(target)? == flow.redirected)
    }
}

impl Drop for EnrolledFlow {
    fn drop(&mut self) {
        let maps = &self.splice.maps;
        // First no more payload comes, then the target may go. Errors mean that an entry is not there: the kernel
        // takes a closed socket out by itself.
        let _ = maps.remove_source(self.source);
        let _ = maps.remove_target(self.source);
        let _ = maps.remove_flow(self.source);
        let _ = maps.remove_credit(self.source);
        self.splice.notifiers.unregister(self.source);
    }
}

/// Afterwards the program goes by the credit that was set before, and the flow's counts stand still unless it redirects: a
/// segment may be in its hands just now, on another processor, under the lock of the socket, which this call takes.
fn wait_for_program(source: &Endpoint) -> io::Result<()> {
    sockopt::tcp_info(source).map(drop)
}

fn lost_error(flow: &Flow) -> io::Error {
    io::Error::other(format!("{} bytes dropped: no target socket, or not in sequence", flow.lost))
}

/// The sequence number of the byte behind the first `read` of the stream.
#[expect(clippy::cast_possible_truncation, reason = "sequence numbers are counted modulo 2^32")]
fn next_sequence(source: &Endpoint, read: u64) -> Option<SeqNumber> {
    // The SYN counts one.
    Some(SeqNumber(source.peer_isn()?) + 1 + read as u32)
}

/// All that was ever queued on `socket`, up to an unknown constant: acknowledged and unacknowledged, read such that no
/// acknowledgement fell between.
fn stable_queued_bytes(socket: &Endpoint) -> Result<u64, EnrolError> {
    const TRIES: usize = 100;
    for _ in 0..TRIES {
        let before = sockopt::tcp_info(socket)?.bytes_acked;
        let waiting = sockopt::unacknowledged(socket)?;
        if sockopt::tcp_info(socket)?.bytes_acked == before {
            return Ok(before + waiting);
        }
    }
    Err(EnrolError::Unsteady)
}
