//! One direction of a connection, carried out: the wishes of [`Direction`] as reads, writes and enrolments.

use std::{io, time::Duration};

use bytes::{Buf as _, BytesMut};
use injector_common::proxy::{Forgery, forgery};

use super::{
    Context,
    backlog::{Judgement, Marks, Share},
    direction::{Direction, Plane, Want},
    end::Bytes,
};
use crate::{
    endpoint::Endpoint,
    engine::{Engine, Offer, Refused, Spliced},
    pipe::{Pipe, Pipes},
    sys,
};

/// Longest pause between two looks whether a finished direction has been delivered.
const PROOF_PAUSE: Duration = Duration::from_millis(4);
/// Ends of file in a row, a millisecond apart, after which one is believed to be a reset.
const EARLY_ENDS: u32 = 2000;
/// Longest pause between two looks whether a target has caught up.
const DRAIN_PAUSE: Duration = Duration::from_millis(16);

/// Payload of at least so many bytes is bulk, which a pipe carries better than a buffer.
const LARGE: usize = 16 * 1024;
/// So many of these in a row, and a pipe is taken for the next.
const BULK_AFTER: u32 = 2;

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
    /// Too much waits in the kernel over all connections, and here is some of it.
    Overload,
}

/// One direction.
#[derive(Debug)]
pub(super) struct Lane {
    direction: Direction,
    /// Read and not yet written; what is in `pipe` comes behind it.
    held: BytesMut,
    pipes: Pipes,
    /// Holds something, if it is there.
    pipe: Option<Pipe>,
    /// Bytes that went into pipes.
    piped: u64,
    /// Large payloads in a row.
    large: u32,
    spliced: Option<Box<dyn Spliced>>,
    /// What user space had read when the kernel first took over.
    read_before: u64,
    /// What user space had read when it last offered the direction to the kernel. Once is enough for what was read: if
    /// the offer came to nothing, there is more to read.
    offered_at: u64,
    /// Payloads read in user space that were not bulk.
    messages: u64,
    /// The engine refused this direction once, or never carries any.
    stays: bool,
    marks: Marks,
    /// Given up before its end: the source has been told that bytes arrived which nobody took.
    cut: bool,
    /// How often in a row there was an end of file, and then there was none.
    early_ends: u32,
    /// What waits in the kernel for the target.
    share: Share,
}

/// What a step has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Payload was read in user space.
    Read,
    /// The kernel was told to leave the source to user space.
    Held,
    /// User space carries the direction again.
    TakenBack,
    /// The kernel carries the direction once more.
    Resumed,
    /// Anything else.
    Other,
}

impl Lane {
    /// A direction of which `held` was read before and not yet written. While `gated`, the first bytes are examined
    /// for a forged header.
    pub(super) fn new(read: u64, held: BytesMut, gated: bool, context: &Context) -> Self {
        Self {
            direction: Direction::new(read, held.len(), gated),
            held,
            pipes: context.pipes.clone(),
            pipe: None,
            piped: 0,
            large: 0,
            spliced: None,
            read_before: 0,
            offered_at: 0,
            messages: u64::from(read > 0),
            stays: false,
            marks: context.marks,
            cut: false,
            early_ends: 0,
            share: context.ledger.share(),
        }
    }

    pub(super) fn want(&self) -> Want {
        self.direction.want()
    }

    pub(super) fn ended(&self) -> bool {
        self.direction.ended()
    }

    /// Whether it was given up before its end.
    pub(super) fn was_cut(&self) -> bool {
        self.cut
    }

    /// Whether the source has ever been read in user space; it is, before the kernel takes over.
    pub(super) fn silent(&self) -> bool {
        self.direction.read_bytes() == 0
    }

    /// The target takes nothing any more.
    pub(super) fn abandon(&mut self) {
        self.cut |= self.want() != Want::Nothing;
        self.direction.abandon();
        self.held = BytesMut::new();
        self.pipe = None;
        self.share.set(0);
    }

    /// Whether the end of file that `source` was just read to is its FIN, behind all that it sent.
    fn is_fin(&self, source: &Endpoint) -> bool {
        // Asking the kernel for its counts is dear where sessions are short.
        (self.spliced.is_none() && source.ends_by_fin()) || self.complete(source)
    }

    /// Whether `source` has sent a FIN, and all before it has passed on through this lane. A reset looks like an end
    /// of file to epoll, and to recv(2) once its error was fetched; only the count tells, in which a FIN is one.
    pub(super) fn complete(&self, source: &Endpoint) -> bool {
        // The kernel may be working on the last segment, having announced its FIN already: asking waits for that, and
        // only then is the flow's count final.
        let Ok(info) = sys::tcp_info(source) else { return false };
        info.bytes_received == self.direction.read_bytes() + self.flow().redirected + 1
    }

    /// Whether the kernel takes what the source sends away at once: then nothing waits to be read that could say how it
    /// ended.
    pub(super) fn runs_in_kernel(&self) -> bool {
        self.direction.plane() == Plane::Spliced
    }

    pub(super) fn reads_source(&self) -> bool {
        self.may_read_source() && !self.direction.ended()
    }

    /// Whether user space is to be told of what the source sends. When that has finished there is nothing more to be told, but
    /// nothing to be gained either by asking for less.
    pub(super) fn may_read_source(&self) -> bool {
        matches!(self.direction.plane(), Plane::Relayed | Plane::Offered)
    }

    /// Whether user space is to be told of room at the target.
    pub(super) fn may_write_target(&self) -> bool {
        self.direction.plane() == Plane::Relayed
    }

    /// Bytes so far.
    pub(super) fn bytes(&self) -> Bytes {
        let relayed = self.direction.read_bytes().saturating_sub(self.piped);
        Bytes { relayed, piped: self.piped, spliced: self.flow().redirected }
    }

    /// `CLOCK_MONOTONIC` of the last payload that the kernel carried, in nanoseconds; 0 if none.
    pub(super) fn last_carried_ns(&self) -> u64 {
        self.flow().last_ns
    }

    fn flow(&self) -> injector_common::splice::Flow {
        self.spliced.as_ref().and_then(|spliced| spliced.flow().ok()).unwrap_or_default()
    }

    /// Hands the direction to the kernel if it is the moment: enough has gone through user space for it to pay, and
    /// nothing is held. Returns why the engine refused, the once that it does.
    pub(super) fn enrol(
        &mut self,
        engine: &dyn Engine,
        pays: &Pays,
        age: impl FnOnce() -> Duration,
        source: &Endpoint,
        target: &Endpoint,
    ) -> Enrolment {
        if self.stays || !self.direction.can_splice() {
            return Enrolment::NotNow;
        }
        if !pays.off(self.messages, self.direction.read_bytes(), age) {
            return Enrolment::NotNow;
        }
        if self.spliced.is_some() {
            return self.offer(target).map_or_else(Enrolment::Lost, |()| Enrolment::NotNow);
        }
        if !source.emptied() {
            return Enrolment::NotNow;
        }
        match engine.enrol(source, target, self.direction.read_bytes()) {
            Some(Ok(spliced)) => {
                self.spliced = Some(spliced);
                self.read_before = self.direction.read_bytes();
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

    /// Offers the kernel to carry again, once the target has taken all but a little of what user space wrote.
    fn offer(&mut self, target: &Endpoint) -> io::Result<()> {
        let Some(spliced) = &self.spliced else { return Ok(()) };
        let read = self.direction.read_bytes();
        if read == self.offered_at || sys::unacknowledged(target)? > self.marks.low {
            return Ok(());
        }
        self.offered_at = read;
        let written = read - self.read_before;
        if spliced.offer(written)? {
            self.direction.offered();
        }
        Ok(())
    }

    /// Waits for what the direction wants next, and does it. Cancel safe.
    pub(super) async fn step(&mut self, source: &Endpoint, target: &Endpoint) -> Result<Progress, Break> {
        match self.direction.want() {
            Want::Read => return self.read(source, target).await,
            Want::Write => {
                let written = match &mut self.pipe {
                    Some(pipe) if self.held.is_empty() => target.drain(pipe).await,
                    _ => target.write(&self.held).await.inspect(|written| self.held.advance(*written)),
                };
                self.direction.wrote(written.map_err(Break::Target)?);
                self.pipe.take_if(|pipe| pipe.held() == 0);
            }
            Want::Hangup => return self.attend(source, target).await,
            Want::Drain => return self.drain(target).await,
            Want::Handover => return self.hand_over(source, target).await,
            Want::Proof => return self.prove(source, target).await,
            Want::Fin => {
                target.finish().map_err(Break::Target)?;
                self.direction.fin_sent();
                self.share.set(0);
            }
            Want::Nothing => std::future::pending().await,
        }
        Ok(Progress::Other)
    }

    async fn read(&mut self, source: &Endpoint, target: &Endpoint) -> Result<Progress, Break> {
        if self.is_bulk()
            && let Some((pipe, count)) = source.fill(&self.pipes).await.map_err(Break::Source)?
        {
            return self.pass(pipe, count, target);
        }
        let Self { direction, held, messages, large, early_ends, .. } = self;
        let taken = source.read(|payload| {
            if payload.is_empty() {
                return None;
            }
            direction.read(payload.len());
            if payload.len() >= LARGE {
                *large += 1;
            } else {
                (*large, *messages) = (0, *messages + 1);
            }
            *early_ends = 0;
            Some(take(direction, held, payload, target))
        });
        match taken.await.map_err(Break::Source)? {
            Some(taken) => taken,
            None if self.is_fin(source) => {
                self.direction.source_finished();
                Ok(Progress::Other)
            }
            None if self.more_is_coming(source) => {
                tokio::time::sleep(Duration::from_millis(1)).await;
                Ok(Progress::Other)
            }
            None => Err(Break::Source(io::ErrorKind::ConnectionReset.into())),
        }
    }

    /// Whether a pipe serves better than a buffer. Never again where `verdict` has had the source: what it passes is on a list
    /// of its own, which splice(2) does not look at (tcp_splice_read, net/ipv4/tcp.c).
    fn is_bulk(&self) -> bool {
        self.large >= BULK_AFTER && self.spliced.is_none() && self.direction.can_splice()
    }

    /// Passes on what has just come into a pipe, as far as the target takes it now.
    fn pass(&mut self, mut pipe: Pipe, count: usize, target: &Endpoint) -> Result<Progress, Break> {
        self.direction.read(count);
        self.piped += count as u64;
        if count < LARGE {
            self.large = 0;
        }
        let drained = target.try_drain(&mut pipe);
        if pipe.held() > 0 {
            self.pipe = Some(pipe);
        }
        self.direction.wrote(drained.map_err(Break::Target)?);
        Ok(Progress::Read)
    }

    /// Whether an end of file comes too early: of a socket that has been in the program's hands, recv(2) says 0 after the
    /// FIN although a worker has yet to queue some of what came before (tcp_bpf_recvmsg_parser, net/ipv4/tcp_bpf.c).
    fn more_is_coming(&mut self, source: &Endpoint) -> bool {
        let Some(spliced) = &self.spliced else { return false };
        let Ok(info) = sys::tcp_info(source) else { return false };
        let passed = self.direction.read_bytes() + spliced.flow().map_or(0, |flow| flow.redirected);
        self.early_ends += 1;
        info.bytes_received > passed + 1 && self.early_ends < EARLY_ENDS
    }

    /// While the kernel carries: until the source finishes, or what waits for the target has to be looked at.
    async fn attend(&mut self, source: &Endpoint, target: &Endpoint) -> Result<Progress, Break> {
        let Some(spliced) = &self.spliced else { return Err(Break::Lost(io::ErrorKind::NotFound.into())) };
        tokio::select! {
            biased;
            () = spliced.bell().heard() => self.look(source, target),
            () = source.finished() => {
                self.direction.source_finished();
                Ok(Progress::Other)
            }
        }
    }

    /// Looks at what waits for the target, and holds the source if it is too much.
    pub(super) fn look(&mut self, source: &Endpoint, target: &Endpoint) -> Result<Progress, Break> {
        let Some(spliced) = &self.spliced else { return Ok(Progress::Other) };
        if self.direction.want() != Want::Hangup {
            return Ok(Progress::Other);
        }
        let backlog = spliced.backlog(target).map_err(Break::Lost)?;
        let total = self.share.set(backlog.bytes);
        match self.marks.judge(backlog.bytes, total) {
            Judgement::Reset => return Err(Break::Overload),
            Judgement::Hold if !backlog.held => spliced.hold(source).map_err(Break::Lost)?,
            Judgement::Go if !backlog.held => {
                spliced.grant(backlog.taken).map_err(Break::Lost)?;
                return Ok(Progress::Other);
            }
            Judgement::Go | Judgement::Hold => {}
        }
        self.direction.held_back();
        Ok(Progress::Held)
    }

    /// While the source is held: until the target has taken all that is on its way. Then user space goes on, and keeps
    /// the direction.
    async fn drain(&mut self, target: &Endpoint) -> Result<Progress, Break> {
        let mut pause = Duration::from_millis(1);
        loop {
            let Some(spliced) = &self.spliced else {
                return Err(Break::Lost(io::ErrorKind::NotFound.into()));
            };
            let backlog = spliced.backlog(target).map_err(Break::Lost)?;
            let total = self.share.set(backlog.bytes);
            if backlog.bytes == 0 {
                self.direction.taken_back();
                return Ok(Progress::TakenBack);
            }
            if self.marks.judge(backlog.bytes, total) == Judgement::Reset {
                return Err(Break::Overload);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(DRAIN_PAUSE);
        }
    }

    /// While the kernel is offered the direction: until it has taken it, or there is more for user space to read.
    async fn hand_over(&mut self, source: &Endpoint, target: &Endpoint) -> Result<Progress, Break> {
        let Some(spliced) = &self.spliced else { return Err(Break::Lost(io::ErrorKind::NotFound.into())) };
        loop {
            tokio::select! {
                biased;
                // It may have been rung before the offer, when the direction was held.
                () = spliced.bell().heard() => {
                    if spliced.flow().map_err(Break::Lost)?.passing == 0 {
                        break;
                    }
                }
                readable = source.readable() => {
                    readable.map_err(Break::Source)?;
                    break;
                }
            }
        }
        Ok(match spliced.withdraw(source, target).map_err(Break::Lost)? {
            Offer::Taken => {
                self.direction.resumed();
                Progress::Resumed
            }
            Offer::Held => {
                self.direction.held_back();
                Progress::Held
            }
            Offer::Void => {
                self.direction.withdrawn();
                Progress::Other
            }
        })
    }

    /// Looks until every byte of the finished source is queued at the target; or finds that the kernel has left some of
    /// them to user space.
    async fn prove(&mut self, source: &Endpoint, target: &Endpoint) -> Result<Progress, Break> {
        let Some(spliced) = &self.spliced else { return Err(Break::Lost(io::ErrorKind::NotFound.into())) };
        let mut pause = Duration::from_millis(1);
        let mut looks = 0;
        while !spliced.delivered(source, target, self.direction.read_bytes()).map_err(Break::Lost)? {
            if spliced.backlog(target).map_err(Break::Lost)?.held {
                self.direction.held_back();
                return Ok(Progress::Held);
            }
            looks += 1;
            // The worker that fills the target's queue has most often been there already, or needs this processor.
            if looks <= 2 {
                tokio::task::yield_now().await;
                continue;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PROOF_PAUSE);
        }
        self.direction.proven();
        Ok(Progress::Other)
    }
}

/// When the kernel's plane pays off. Enrolling costs as much as carrying some payloads in user space does: short sessions
/// stay there, and so does bulk, which a pipe carries faster (measured in `docs/benchmarks.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pays {
    /// After so many payloads in user space that were not bulk,
    pub messages: u64,
    /// or so many bytes,
    pub bytes: Option<u64>,
    /// or, with the next payload, when the connection has lasted so long.
    pub age: Option<Duration>,
}

impl Default for Pays {
    fn default() -> Self {
        Self { messages: 16, bytes: None, age: None }
    }
}

impl Pays {
    /// Whether a direction of which user space has read so much is worth enrolling. Without a byte it never is: the first
    /// payload is examined.
    #[must_use]
    pub fn off(&self, messages: u64, bytes: u64, age: impl FnOnce() -> Duration) -> bool {
        bytes > 0
            && (messages >= self.messages
                || self.bytes.is_some_and(|enough| bytes >= enough)
                || self.age.is_some_and(|enough| age() >= enough))
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
    /// The kernel does not say what it has carried: the connection cannot go on.
    Lost(io::Error),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_of_messages_bytes_and_age_pays_but_nothing_before_the_first_byte() {
        let second = Duration::from_secs(1);
        let pays = Pays { messages: 3, bytes: Some(100), age: Some(second) };
        for (messages, bytes, age, off) in [
            (2, 99, Duration::ZERO, false),
            (3, 99, Duration::ZERO, true),
            (0, 100, Duration::ZERO, true),
            (0, 1, second, true),
            (0, 0, second, false),
        ] {
            assert_eq!(pays.off(messages, bytes, || age), off, "{messages} {bytes} {age:?}");
        }
        assert!(!Pays { bytes: None, age: None, ..pays }.off(2, u64::MAX, || panic!("not asked for")));
    }
}
