//! One direction of a connection, carried out: the wishes of [`Direction`] as reads, writes and enrolments.

use std::{io, time::Duration};

use bytes::{Buf as _, BytesMut};
use injector_common::proxy::{Forgery, forgery};

use super::{
    direction::{Direction, Plane, Want},
    end::Bytes,
};
use crate::{
    endpoint::Endpoint,
    engine::{Engine, Refused, Spliced},
    sys,
};

/// Longest pause between two looks whether a finished direction has been delivered.
const PROOF_PAUSE: Duration = Duration::from_millis(4);

/// Why a direction cannot go on.
#[derive(Debug)]
pub(super) enum Break {
    /// The socket that payload comes from.
    Source(io::Error),
    /// The socket that payload goes to.
    Target(io::Error),
    /// The kernel dropped payload, or lost count of it.
    Lost(io::Error),
    /// The source sent a PROXY header of its own.
    Forged,
}

/// One direction.
#[derive(Debug)]
pub(super) struct Lane {
    direction: Direction,
    /// Read and not yet written.
    held: BytesMut,
    spliced: Option<Box<dyn Spliced>>,
    /// The engine refused this direction once, or never carries any.
    stays: bool,
}

/// What a step has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Payload was read in user space.
    Read,
    /// Anything else.
    Other,
}

impl Lane {
    /// A direction of which `held` was read before and not yet written. While `gated`, the first bytes are examined
    /// for a forged header.
    pub(super) fn new(read: u64, held: BytesMut, gated: bool) -> Self {
        Self { direction: Direction::new(read, held.len(), gated), held, spliced: None, stays: false }
    }

    pub(super) fn want(&self) -> Want {
        self.direction.want()
    }

    pub(super) fn ended(&self) -> bool {
        self.direction.ended()
    }

    /// Whether the source has ever been read in user space; it is, before the kernel takes over.
    pub(super) fn silent(&self) -> bool {
        self.direction.read_bytes() == 0
    }

    /// The target takes nothing any more.
    pub(super) fn abandon(&mut self) {
        self.direction.abandon();
        self.held = BytesMut::new();
    }

    /// Whether `source` has sent a FIN, and all before it has passed on through this lane. A reset looks like an end
    /// of file to epoll, and to recv(2) once its error was fetched; only the count tells, in which a FIN is one.
    pub(super) fn complete(&self, source: &Endpoint) -> bool {
        let passed = self.direction.read_bytes() + self.flow().redirected;
        sys::tcp_info(source).is_ok_and(|info| info.bytes_received == passed + 1)
    }

    pub(super) fn reads_source(&self) -> bool {
        self.direction.plane() == Plane::Relayed && !self.direction.ended()
    }

    pub(super) fn writes_target(&self) -> bool {
        self.direction.plane() == Plane::Relayed && self.want() != Want::Nothing
    }

    /// Bytes so far.
    pub(super) fn bytes(&self) -> Bytes {
        let flow = self.flow();
        Bytes { relayed: self.direction.read_bytes(), spliced: flow.redirected }
    }

    /// `CLOCK_MONOTONIC` of the last payload that the kernel carried, in nanoseconds; 0 if none.
    pub(super) fn last_carried_ns(&self) -> u64 {
        self.flow().last_ns
    }

    fn flow(&self) -> injector_common::splice::Flow {
        self.spliced.as_ref().and_then(|spliced| spliced.flow().ok()).unwrap_or_default()
    }

    /// Hands the direction to the kernel if it is the moment: the first payload has gone through user space, and
    /// nothing is held. Returns why the engine refused, the once that it does.
    pub(super) fn enrol(&mut self, engine: &dyn Engine, source: &Endpoint, target: &Endpoint) -> Enrolment {
        if self.stays || self.silent() || !self.direction.can_splice() {
            return Enrolment::NotNow;
        }
        match engine.enrol(source, target) {
            Some(Ok(spliced)) => {
                self.spliced = Some(spliced);
                self.direction.spliced();
                Enrolment::Done
            }
            Some(Err(refused)) => {
                self.stays = true;
                Enrolment::Refused(refused)
            }
            None => {
                self.stays = true;
                Enrolment::NotNow
            }
        }
    }

    /// Waits for what the direction wants next, and does it. Cancel safe.
    pub(super) async fn step(&mut self, source: &Endpoint, target: &Endpoint) -> Result<Progress, Break> {
        match self.direction.want() {
            Want::Read => return self.read(source, target).await,
            Want::Write => {
                let written = target.write(&self.held).await.map_err(Break::Target)?;
                self.held.advance(written);
                self.direction.wrote(written);
            }
            Want::Hangup => {
                source.finished().await;
                self.direction.source_finished();
            }
            Want::Proof => {
                self.prove(source, target).await?;
                self.direction.proven();
            }
            Want::Fin => {
                target.finish().map_err(Break::Target)?;
                self.direction.fin_sent();
            }
            Want::Nothing => std::future::pending().await,
        }
        Ok(Progress::Other)
    }

    async fn read(&mut self, source: &Endpoint, target: &Endpoint) -> Result<Progress, Break> {
        let Self { direction, held, .. } = self;
        let taken = source.read(|payload| {
            if payload.is_empty() {
                return None;
            }
            direction.read(payload.len());
            Some(take(direction, held, payload, target))
        });
        match taken.await.map_err(Break::Source)? {
            Some(taken) => taken,
            None if self.complete(source) => {
                self.direction.source_finished();
                Ok(Progress::Other)
            }
            None => Err(Break::Source(io::ErrorKind::ConnectionReset.into())),
        }
    }

    /// Looks until every byte of the finished source is queued at the target.
    async fn prove(&self, source: &Endpoint, target: &Endpoint) -> Result<(), Break> {
        let Some(spliced) = &self.spliced else { return Ok(()) };
        let mut pause = Duration::from_millis(1);
        // The worker that fills the target's queue has most often been there already, or needs this processor.
        for _ in 0..2 {
            if spliced.delivered(source, target, self.direction.read_bytes()).map_err(Break::Lost)? {
                return Ok(());
            }
            tokio::task::yield_now().await;
        }
        while !spliced.delivered(source, target, self.direction.read_bytes()).map_err(Break::Lost)? {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PROOF_PAUSE);
        }
        Ok(())
    }
}

/// What became of an enrolment.
#[derive(Debug)]
pub(super) enum Enrolment {
    /// Too early, or the engine never does.
    NotNow,
    /// The kernel carries the direction.
    Done,
    /// User space keeps it.
    Refused(Refused),
}

/// Passes on what was just read, as far as the target takes it now; the rest is held.
fn take(
    direction: &mut Direction,
    held: &mut BytesMut,
    payload: &[u8],
    target: &Endpoint,
) -> Result<Progress, Break> {
    if direction.want() == Want::Read {
        // Gated, and not decided by what came before.
        held.extend_from_slice(payload);
        match forgery(held) {
            Forgery::Yes => return Err(Break::Forged),
            Forgery::Undecided => return Ok(Progress::Read),
            Forgery::No => direction.open_gate(),
        }
        let written = target.try_write(held).map_err(Break::Target)?;
        held.advance(written);
        direction.wrote(written);
        return Ok(Progress::Read);
    }
    let written = target.try_write(payload).map_err(Break::Target)?;
    held.extend_from_slice(payload.get(written..).unwrap_or_default());
    direction.wrote(written);
    Ok(Progress::Read)
}
