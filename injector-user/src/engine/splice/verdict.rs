//! Makes the program `verdict` forward the payload of one direction.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
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
    net::{
        options::{self, SPLICED_WINDOWS},
        socket::Endpoint,
    },
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
        /// The kernel's error.
        error: MapError,
    },
    /// The sequence number at which the source's stream began is not known, for instance because
    /// the connection was accepted with a SYN cookie.
    #[error("the initial sequence number of the connection was not observed")]
    IsnUnknown,
    /// The target's peer acknowledged so fast that two reads of its counts always differed.
    #[error("could not read a consistent acknowledgement number of the target socket")]
    Unsteady,
    /// Reading the state of a socket failed.
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

/// The label for the kernel's error of a map update.
#[must_use]
pub fn map_update_reason(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        // Only established sockets may enrol; after an early FIN a socket is not
        // (sock_map_sk_state_allowed, net/core/sock_map.c).
        Some(libc::EOPNOTSUPP) => "not_established",
        Some(libc::E2BIG | libc::ENOSPC) => "map_full",
        Some(libc::ENOMEM) => "no_memory",
        Some(libc::EPERM | libc::EACCES) => "not_permitted",
        _ => "other",
    }
}

/// With no more than this in its send queue, a target keeps up: half of what is redirected between two
/// grants.
const FEW_UNACKNOWLEDGED: u64 = 64 << 10;

/// One direction of a connection that the kernel forwards. Dropping it removes the direction from
/// the kernel, and the kernel discards what is still queued for the target, so drop it only after
/// [`EnrolledFlow::delivered`], or to reset.
#[derive(Debug)]
pub struct EnrolledFlow {
    splice: Arc<Splice>,
    source: u64,
    /// Bytes that were ever put into the target's send queue before the first redirected byte.
    base: u64,
    /// Bytes that user space had written to the target since the enrolment when it last proposed to
    /// resume.
    written: AtomicU64,
    notify: Arc<BacklogNotify>,
    /// The receive window of the source.
    window: AtomicUsize,
}

impl EnrolledFlow {
    /// From now on `verdict` redirects what `source` receives to `target`. User space must have
    /// written all `read` bytes that it read from `source` to `target`.
    ///
    /// # Errors
    /// [`EnrolError`]; the connection is unchanged.
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
        // From here on a drop undoes the steps so far; removing a missing entry does no harm.
        let notify = splice.notifiers.register(source.cookie());
        let spliced = Self {
            splice: Arc::clone(splice),
            source: source.cookie(),
            base,
            written: AtomicU64::new(0),
            notify,
            window: AtomicUsize::new(*SPLICED_WINDOWS.start()),
        };
        // A smaller window is only slower.
        let _ = options::set_spliced_window(source, *SPLICED_WINDOWS.start());
        maps.set_credit(source.cookie(), Credit::up_to(splice.credit)).map_err(failed("CREDIT"))?;
        maps.add_target(source.cookie(), target).map_err(failed("TARGETS"))?;
        maps.add_source(source.cookie(), source).map_err(failed("VERDICT"))?;
        // Bytes received before wait in the receive queue for the next segment, which may never
        // arrive, so the program must run on them now. This cannot fail on an open socket; if it
        // did, [`EnrolledFlow::delivered`] would repeat it.
        let _ = sockopt::rerun_data_ready(source);
        Ok(spliced)
    }

    /// The counts of the direction.
    ///
    /// # Errors
    /// When the flow is not in its map, which only another program can cause.
    pub fn flow(&self) -> Result<Flow, MapError> {
        self.splice.maps.flow(self.source)
    }

    /// Notified when the backlog should be checked.
    #[must_use]
    pub fn backlog_notify(&self) -> &BacklogNotify {
        &self.notify
    }

    /// Redirected bytes that are not in the target's send queue. The list on which they wait has no
    /// limit and is not charged to a socket (sk_psock_skb_redirect, net/core/skmsg.c).
    ///
    /// # Errors
    /// When the target or the flow cannot be read.
    pub fn backlog(&self, target: &Endpoint) -> io::Result<Backlog> {
        // The target first: bytes that are redirected in between then count as backlog, never as
        // queued.
        let queued = self.queued(target)?;
        let flow = self.flow().map_err(io::Error::other)?;
        if flow.lost > 0 {
            return Err(lost_error(&flow));
        }
        Ok(Backlog { bytes: flow.redirected.saturating_sub(queued), queued, paused: flow.passing != 0 })
    }

    /// Extends the program's credit; `queued` bytes of this flow are in the target's send queue. If the
    /// target has acknowledged nearly all of them, the source's window grows, as autotuning would have
    /// it grow where user space reads. A target that does not keep up would only have more to wait for
    /// it. Never after [`EnrolledFlow::pause`].
    ///
    /// # Errors
    /// When the map refuses.
    pub fn grant(&self, source: &Endpoint, target: &Endpoint, queued: u64) -> io::Result<()> {
        let window = self.window.load(Ordering::Relaxed);
        if window < *SPLICED_WINDOWS.end() && sockopt::unacknowledged(target)? <= FEW_UNACKNOWLEDGED {
            self.window.store(2 * window, Ordering::Relaxed);
            // A smaller window is only slower.
            let _ = options::set_spliced_window(source, 2 * window);
        }
        self.set_credit(Credit::up_to(queued + self.splice.credit))
    }

    /// Makes the program leave what `source` receives from now on in its receive queue for user
    /// space. It is charged to the receive buffer there, so that TCP closes the window. What was
    /// redirected is still forwarded to the target.
    ///
    /// The source stays in `VERDICT`: deleting it takes no socket lock, and the kernel would drop a
    /// segment that is about to reach the program (sk_psock_verdict_recv, net/core/skmsg.c, finds
    /// no program and keeps its initial verdict).
    ///
    /// # Errors
    /// When the map refuses.
    pub fn pause(&self, source: &Endpoint) -> io::Result<()> {
        self.set_credit(Credit::up_to(0))?;
        wait_for_program(source)
    }

    /// Lets the program redirect again, once it finds that user space has written everything that
    /// was left to it: `written` bytes. `false` if more has arrived in the meantime: read and write
    /// that first. Until [`EnrolledFlow::cancel_resume`] user space must neither read nor write.
    ///
    /// The program decides under the lock of the source. If [`Flow::passed`] is `written` at that
    /// moment, every byte of this direction is in the target's send queue, and what is redirected
    /// from then on is queued behind it.
    ///
    /// # Errors
    /// When the flow cannot be read or the map refuses.
    pub fn propose_resume(&self, written: u64) -> io::Result<bool> {
        let flow = self.flow().map_err(io::Error::other)?;
        if flow.passed != written {
            return Ok(false);
        }
        self.written.store(written, Ordering::Relaxed);
        self.set_credit(Credit { limit: flow.redirected + self.splice.credit, resume_at: written })?;
        Ok(true)
    }

    /// Ends [`EnrolledFlow::propose_resume`], and returns what the program has done until then.
    ///
    /// # Errors
    /// When the flow or a socket cannot be read, or the map refuses.
    pub fn cancel_resume(&self, source: &Endpoint, target: &Endpoint) -> io::Result<ResumeOutcome> {
        let limit = self.flow().map_err(io::Error::other)?.redirected + self.splice.credit;
        self.set_credit(Credit::up_to(limit))?;
        wait_for_program(source)?;
        let backlog = self.backlog(target)?;
        Ok(match (backlog.paused, backlog.bytes) {
            (false, _) => ResumeOutcome::Resumed,
            (true, 0) => ResumeOutcome::Cancelled,
            // The program has resumed, used up its credit and paused again.
            (true, _) => ResumeOutcome::Paused,
        })
    }

    fn set_credit(&self, credit: Credit) -> io::Result<()> {
        self.splice.maps.set_credit(self.source, credit).map_err(io::Error::other)
    }

    /// Bytes of this flow that were put into the target's send queue.
    fn queued(&self, target: &Endpoint) -> io::Result<u64> {
        // The acknowledged bytes first: bytes acknowledged in between are then missing from the
        // sum, but never counted twice.
        let acknowledged = sockopt::tcp_info(target)?.bytes_acked;
        let before = self.base + self.written.load(Ordering::Relaxed);
        Ok((acknowledged + sockopt::unacknowledged(target)?).saturating_sub(before))
    }

    /// Whether, after the peer's FIN, every byte that `source` received (`read` of them in user
    /// space) is in the target's own send queue, from where TCP delivers it. Only then may the FIN
    /// follow.
    ///
    /// # Errors
    /// When bytes were lost: the caller must reset the connection and never send a FIN.
    pub fn delivered(&self, source: &Endpoint, target: &Endpoint, read: u64) -> io::Result<bool> {
        let received = sockopt::tcp_info(source)?.bytes_received;
        let flow = self.flow().map_err(io::Error::other)?;
        if flow.lost > 0 {
            return Err(lost_error(&flow));
        }
        // The FIN counts as one byte.
        if read + flow.redirected + 1 != received {
            sockopt::rerun_data_ready(source)?;
            return Ok(false);
        }
        let state = sockopt::tcp_info(target)?.state;
        if !matches!(state, TcpInfo::ESTABLISHED | TcpInfo::CLOSE_WAIT) {
            // The target is broken; its own event reports how.
            return Ok(false);
        }
        Ok(self.queued(target)? == flow.redirected)
    }
}

impl Drop for EnrolledFlow {
    fn drop(&mut self) {
        let maps = &self.splice.maps;
        // The source first, so that no more payload is redirected. Errors mean that an entry is
        // missing: the kernel removes a closed socket itself.
        let _ = maps.remove_source(self.source);
        let _ = maps.remove_target(self.source);
        let _ = maps.remove_flow(self.source);
        let _ = maps.remove_credit(self.source);
        self.splice.notifiers.unregister(self.source);
    }
}

/// Waits until the program uses the credit that was set before. Another processor may run it on a
/// segment right now, under the lock of the socket, which this call takes. Afterwards the flow's
/// counts change only if the program redirects.
fn wait_for_program(source: &Endpoint) -> io::Result<()> {
    sockopt::tcp_info(source).map(drop)
}

fn lost_error(flow: &Flow) -> io::Error {
    io::Error::other(format!("{} bytes dropped: no target socket, or not in sequence", flow.lost))
}

/// The sequence number of the byte after the first `read` bytes of the stream.
#[expect(clippy::cast_possible_truncation, reason = "sequence numbers are counted modulo 2^32")]
fn next_sequence(source: &Endpoint, read: u64) -> Option<SeqNumber> {
    // The SYN counts as one byte.
    Some(SeqNumber(source.peer_isn()?) + 1 + read as u32)
}

/// Bytes that were ever put into the send queue of `socket`, plus an unknown constant: acknowledged
/// and unacknowledged ones, read while no acknowledgement arrived between the two.
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
