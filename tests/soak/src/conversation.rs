//! One side of a session: follows the plan and records what it observes.

use std::io;
use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::content::{Content, StreamChecker, StreamContent, StreamErrors};
use super::plan::{Delay, Ending, Moment, Plan, Side};

/// A session takes seconds. One that takes longer hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// How the connection ended for one side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ConnectionEnd {
    /// The other side sent a FIN.
    Fin,
    /// The other side sent a reset.
    Reset,
    /// This side closed first, as planned.
    Left,
    /// It did not end within the limit.
    TimedOut,
    /// Another error, or no connection at all.
    Failed(String),
}

/// What one side has sent, received and observed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EndpointResult {
    /// Bytes written.
    pub(crate) sent: u64,
    /// Hash of the bytes written.
    pub(crate) sent_hash: blake3::Hash,
    /// Whether it sent its FIN.
    pub(crate) finished: bool,
    /// The error that ended its writing early.
    pub(crate) write_error: Option<io::ErrorKind>,
    /// Bytes read; none if the daemon responded instead of the backend.
    pub(crate) received: u64,
    /// Hash of the bytes read.
    pub(crate) received_hash: blake3::Hash,
    /// Errors in the bytes read.
    pub(crate) errors: StreamErrors,
    /// Whether the daemon rejected the client with an SMTP reply.
    pub(crate) rejected: bool,
    /// How the connection ended.
    pub(crate) end: ConnectionEnd,
}

impl EndpointResult {
    /// A side that exchanged no byte.
    pub(crate) fn ended(end: ConnectionEnd) -> Self {
        let nothing = blake3::hash(&[]);
        Self {
            sent: 0,
            sent_hash: nothing,
            finished: false,
            write_error: None,
            received: 0,
            received_hash: nothing,
            errors: StreamErrors::default(),
            rejected: false,
            end,
        }
    }
}

/// Progress of the reading half, which the writing half waits for.
#[derive(Clone, Copy, Debug, Default)]
struct ReadProgress {
    received: u64,
    finished: bool,
}

/// Runs a connected socket through the plan; `first` was read from it before.
pub(crate) async fn run_conversation(
    mut stream: TcpStream,
    plan: &Plan,
    side: Side,
    content: &Content,
    first: &[u8],
) -> EndpointResult {
    let (own, expected) =
        (StreamContent::new(plan, side, content), StreamContent::new(plan, side.other(), content));
    let planned_exit = plan.ending.planned_exit(side, plan.greeting());
    let moment = planned_exit.map(|(moment, _)| moment);
    let (read_progress, progress_of_reading) = watch::channel(ReadProgress::default());
    // Both survive the futures that fill them, which may be dropped halfway.
    let mut write_progress = WriteProgress::default();
    let mut checker = StreamChecker::new(&expected);
    if !first.is_empty() {
        checker.feed(first);
        read_progress.send_replace(ReadProgress { received: first.len() as u64, finished: false });
    }
    let (mut incoming, mut outgoing) = stream.split();
    let read = Reading { plan, side, moment, read_progress };
    let write = Writing {
        plan,
        side,
        moment,
        read_progress: progress_of_reading,
        stream: &own,
        write_progress: &mut write_progress,
    };
    let end = timeout(LIMIT, run_both(read.run(&mut incoming, &mut checker), write.run(&mut outgoing))).await;
    if planned_exit.is_some_and(|(_, reset)| reset) && end == Ok(ConnectionEnd::Left) {
        // If this fails, the connection is broken already.
        let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    }
    drop(stream);
    result(end.unwrap_or(ConnectionEnd::TimedOut), &write_progress, &checker)
}

fn result(end: ConnectionEnd, write_progress: &WriteProgress, checker: &StreamChecker<'_>) -> EndpointResult {
    let rejected = checker.is_rejection();
    // The first call after a reset gets the error, and the other then sees an end of file. After a
    // FIN the error is EPIPE (tcp_reset, net/ipv4/tcp_input.c).
    let writer_got_reset = write_progress.error == Some(io::ErrorKind::ConnectionReset);
    EndpointResult {
        sent: write_progress.count,
        sent_hash: write_progress.hash.finalize(),
        finished: write_progress.finished,
        write_error: write_progress.error,
        received: if rejected { 0 } else { checker.received },
        received_hash: checker.hash.finalize(),
        errors: if rejected { StreamErrors::default() } else { checker.errors.clone() },
        rejected,
        end: if writer_got_reset && end == ConnectionEnd::Fin { ConnectionEnd::Reset } else { end },
    }
}

/// How the writing half stopped.
enum WriteEnd {
    /// It has written everything, or failed: the reading half determines the end.
    Stopped,
    /// The planned moment to close has come.
    Left,
}

/// Both directions, until the connection has ended for this side.
async fn run_both(
    reading: impl Future<Output = ConnectionEnd>,
    writing: impl Future<Output = WriteEnd>,
) -> ConnectionEnd {
    tokio::pin!(reading, writing);
    tokio::select! {
        // The polling order must be deterministic: only the seed governs chance.
        biased;
        wrote = &mut writing => match wrote {
            WriteEnd::Left => ConnectionEnd::Left,
            WriteEnd::Stopped => reading.await,
        },
        end = &mut reading => match end {
            ConnectionEnd::Fin => match writing.await {
                WriteEnd::Left => ConnectionEnd::Left,
                WriteEnd::Stopped => ConnectionEnd::Fin,
            },
            other => other,
        },
    }
}

struct Reading<'a> {
    plan: &'a Plan,
    side: Side,
    moment: Option<Moment>,
    read_progress: watch::Sender<ReadProgress>,
}

impl Reading<'_> {
    async fn run(self, socket: &mut ReadHalf<'_>, checker: &mut StreamChecker<'_>) -> ConnectionEnd {
        let mut buffer = vec![0; 64 << 10];
        let mut stalls = self.plan.sent_by(self.side.other()).stalls.clone().into_iter().peekable();
        loop {
            let received = checker.received;
            while let Some(stall) = stalls.next_if(|stall: &Delay| stall.at <= received) {
                sleep(stall.length()).await;
            }
            let go = match self.moment {
                Some(Moment::Read(count)) => Some(count),
                _ => None,
            };
            if go.is_some_and(|go| go <= received) {
                return ConnectionEnd::Left;
            }
            let mark = stalls.peek().map(|stall| stall.at).into_iter().chain(go).min();
            let limit = mark.map_or(u64::MAX, |mark| mark - received);
            let limit = usize::try_from(limit).unwrap_or(usize::MAX).min(buffer.len());
            match socket.read(buffer.get_mut(..limit).unwrap_or_default()).await {
                Ok(0) => {
                    self.read_progress.send_modify(|progress| progress.finished = true);
                    return ConnectionEnd::Fin;
                }
                Ok(count) => {
                    checker.feed(buffer.get(..count).unwrap_or_default());
                    self.read_progress.send_modify(|progress| progress.received += count as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return ConnectionEnd::Reset,
                Err(error) => return ConnectionEnd::Failed(format!("reading: {error}")),
            }
        }
    }
}

/// Progress of the writing half.
#[derive(Debug, Default)]
struct WriteProgress {
    count: u64,
    hash: blake3::Hasher,
    finished: bool,
    error: Option<io::ErrorKind>,
}

struct Writing<'a> {
    plan: &'a Plan,
    side: Side,
    moment: Option<Moment>,
    read_progress: watch::Receiver<ReadProgress>,
    stream: &'a StreamContent<'a>,
    write_progress: &'a mut WriteProgress,
}

impl Writing<'_> {
    async fn run(mut self, socket: &mut WriteHalf<'_>) -> WriteEnd {
        match self.write(socket).await {
            Ok(wrote) => wrote,
            Err(error) => {
                self.write_progress.error = Some(error.kind());
                WriteEnd::Stopped
            }
        }
    }

    async fn write(&mut self, socket: &mut WriteHalf<'_>) -> io::Result<WriteEnd> {
        let leaves_silently =
            matches!((self.plan.ending, self.side), (Ending::ClientLeavesSilently { .. }, Side::Client));
        if leaves_silently || self.moment == Some(Moment::Read(0)) {
            // It closes without sending a byte, when its reading half reaches the planned moment.
            return Ok(WriteEnd::Stopped);
        }
        let awaited = self.plan.awaits(self.side);
        // The reading half has already ended: its result is the end of this session.
        if self
            .read_progress
            .wait_for(|progress| progress.received >= awaited || progress.finished)
            .await
            .is_err()
        {
            return Ok(WriteEnd::Stopped);
        }
        let stream = self.plan.sent_by(self.side);
        let until = match self.moment {
            Some(Moment::Sent(count)) => count,
            _ => stream.len - stream.held_back,
        };
        self.pieces(socket, until).await?;
        if matches!(self.moment, Some(Moment::Sent(_))) {
            return Ok(WriteEnd::Left);
        }
        if self.plan.ending == Ending::ClosesFirst(self.side.other()) {
            if self.read_progress.wait_for(|progress| progress.finished).await.is_err() {
                return Ok(WriteEnd::Stopped);
            }
            self.pieces(socket, stream.len).await?;
        }
        socket.shutdown().await?;
        self.write_progress.finished = true;
        Ok(WriteEnd::Stopped)
    }

    /// Writes up to `until`, in the pieces and with the pauses of the plan.
    async fn pieces(&mut self, socket: &mut WriteHalf<'_>, until: u64) -> io::Result<()> {
        let stream = self.plan.sent_by(self.side);
        let mut sizes = ChaCha8Rng::seed_from_u64(stream.pieces_seed);
        let from = self.write_progress.count;
        let pauses: Vec<_> = stream.pauses.iter().copied().filter(|pause| pause.at >= from).collect();
        let mut pauses = pauses.into_iter().peekable();
        loop {
            let sent = self.write_progress.count;
            while let Some(pause) = pauses.next_if(|pause: &Delay| pause.at <= sent) {
                sleep(pause.length()).await;
            }
            if sent >= until {
                return Ok(());
            }
            let next = pauses.peek().map_or(until, |pause| pause.at.min(until));
            let size = sizes.random_range(1..=stream.max_piece).min(next - sent);
            let piece = self.stream.piece(sent, size);
            let written = socket.write(piece).await?;
            self.write_progress.hash.update(piece.get(..written).unwrap_or_default());
            self.write_progress.count += written as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::verdict::check;

    /// Both sides connected without a daemon: any failure here is an error of the soak itself.
    #[test]
    fn sessions_without_a_daemon_pass() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let content = Content::new(9);
        let numbers: Vec<_> = (0..300)
            .filter(|number| {
                let plan = Plan::draw(9, *number);
                plan.up.len.max(plan.down.len) < 4 << 20
                // Only the daemon rejects clients.
                && !matches!(plan.ending, Ending::BackendLeavesSilently { .. })
            })
            .collect();
        for numbers in numbers.chunks(32) {
            let pairs = numbers.iter().map(|number| pair(&content, *number));
            runtime.block_on(futures::future::join_all(pairs));
        }
    }

    async fn pair(content: &Content, number: u64) {
        let plan = Plan::draw(9, number);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connected = TcpStream::connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(connected, listener.accept());
        let (client, (backend, _)) = (client.unwrap(), accepted.unwrap());
        let (client, backend) = tokio::join!(
            run_conversation(client, &plan, Side::Client, content, &[]),
            run_conversation(backend, &plan, Side::Backend, content, &[]),
        );
        assert_eq!(check(&plan, &client, Some(&backend)), Ok(()), "{plan}\n{client:#?}\n{backend:#?}");
        if plan.ending.clean() {
            assert_eq!((client.sent, backend.sent), (plan.up.len, plan.down.len));
        }
    }
}
