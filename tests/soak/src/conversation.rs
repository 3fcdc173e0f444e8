//! One end of a session: does what the plan says and notes what it sees.

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

use super::content::{Content, Faults, Follower, Script};
use super::plan::{Ending, Moment, Plan, Rest, Side};

/// A session takes seconds. One that takes longer hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// How an end saw the other go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// A FIN.
    Fin,
    /// A reset.
    Reset,
    /// It was itself the one that went, as planned.
    Gone,
    /// Nothing, until the time was over.
    Stuck,
    /// Another error, or no connection at all.
    Failed(String),
}

/// What one end has done and seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Bytes written.
    pub(crate) sent: u64,
    /// Hash of these.
    pub(crate) sent_hash: blake3::Hash,
    /// Its FIN was sent.
    pub(crate) finished: bool,
    /// What ended its writing before its time.
    pub(crate) write_error: Option<io::ErrorKind>,
    /// Bytes read; none where the daemon spoke for the backend.
    pub(crate) received: u64,
    /// Hash of these.
    pub(crate) received_hash: blake3::Hash,
    /// What was wrong with them.
    pub(crate) faults: Faults,
    /// The daemon turned the client away in SMTP's words.
    pub(crate) refused: bool,
    /// How it ended.
    pub(crate) end: End,
}

impl Seen {
    /// An end that came without a byte.
    pub(crate) fn ended(end: End) -> Self {
        let nothing = blake3::hash(&[]);
        Self {
            sent: 0,
            sent_hash: nothing,
            finished: false,
            write_error: None,
            received: 0,
            received_hash: nothing,
            faults: Faults::default(),
            refused: false,
            end,
        }
    }
}

/// How far the reading is, for the writing to wait for.
#[derive(Clone, Copy, Debug, Default)]
struct Heard {
    received: u64,
    finished: bool,
}

/// Carries a connected socket through the plan; `first` was read of it before.
pub(crate) async fn converse(
    mut stream: TcpStream,
    plan: &Plan,
    side: Side,
    content: &Content,
    first: &[u8],
) -> Seen {
    let (own, other) = (Script::new(plan, side, content), Script::new(plan, side.other(), content));
    let departure = plan.ending.departure(side, plan.greeting());
    let moment = departure.map(|(moment, _)| moment);
    let (heard, listening) = watch::channel(Heard::default());
    // Both survive the futures that fill them, which may be dropped half way.
    let mut said = Said::default();
    let mut follower = Follower::new(&other);
    if !first.is_empty() {
        follower.take(first);
        heard.send_replace(Heard { received: first.len() as u64, finished: false });
    }
    let (mut incoming, mut outgoing) = stream.split();
    let read = Reading { plan, side, moment, heard };
    let write = Writing { plan, side, moment, listening, script: &own, said: &mut said };
    let end = timeout(LIMIT, both(read.run(&mut incoming, &mut follower), write.run(&mut outgoing))).await;
    if departure.is_some_and(|(_, reset)| reset) && end == Ok(End::Gone) {
        // If it fails, the connection is broken already.
        let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    }
    drop(stream);
    seen(end.unwrap_or(End::Stuck), &said, &follower)
}

fn seen(end: End, said: &Said, follower: &Follower<'_>) -> Seen {
    let refused = follower.is_refusal();
    // Whichever call comes first after a reset is told, and the other then takes it for an end of file. Behind a FIN
    // the error is EPIPE (tcp_reset, net/ipv4/tcp_input.c).
    let told_the_writer = said.error == Some(io::ErrorKind::ConnectionReset);
    Seen {
        sent: said.count,
        sent_hash: said.hash.finalize(),
        finished: said.finished,
        write_error: said.error,
        received: if refused { 0 } else { follower.received },
        received_hash: follower.hash.finalize(),
        faults: if refused { Faults::default() } else { follower.faults.clone() },
        refused,
        end: if told_the_writer && end == End::Fin { End::Reset } else { end },
    }
}

/// How the writing stopped.
enum Wrote {
    /// All of it, or as far as it got: the reading tells the end.
    Stopped,
    /// The moment to go has come.
    Gone,
}

/// Both directions, until the connection is over for this end.
async fn both(reading: impl Future<Output = End>, writing: impl Future<Output = Wrote>) -> End {
    tokio::pin!(reading, writing);
    tokio::select! {
        // The order in which they are polled must not depend on chance that the seed does not govern.
        biased;
        wrote = &mut writing => match wrote {
            Wrote::Gone => End::Gone,
            Wrote::Stopped => reading.await,
        },
        end = &mut reading => match end {
            End::Fin => match writing.await {
                Wrote::Gone => End::Gone,
                Wrote::Stopped => End::Fin,
            },
            other => other,
        },
    }
}

struct Reading<'a> {
    plan: &'a Plan,
    side: Side,
    moment: Option<Moment>,
    heard: watch::Sender<Heard>,
}

impl Reading<'_> {
    async fn run(self, socket: &mut ReadHalf<'_>, follower: &mut Follower<'_>) -> End {
        let mut buffer = vec![0; 64 << 10];
        let mut stalls = self.plan.sent_by(self.side.other()).stalls.clone().into_iter().peekable();
        loop {
            let received = follower.received;
            while let Some(stall) = stalls.next_if(|stall: &Rest| stall.at <= received) {
                sleep(stall.length()).await;
            }
            let go = match self.moment {
                Some(Moment::Read(count)) => Some(count),
                _ => None,
            };
            if go.is_some_and(|go| go <= received) {
                return End::Gone;
            }
            let mark = stalls.peek().map(|stall| stall.at).into_iter().chain(go).min();
            let room = mark.map_or(u64::MAX, |mark| mark - received);
            let room = usize::try_from(room).unwrap_or(usize::MAX).min(buffer.len());
            match socket.read(buffer.get_mut(..room).unwrap_or_default()).await {
                Ok(0) => {
                    self.heard.send_modify(|heard| heard.finished = true);
                    return End::Fin;
                }
                Ok(count) => {
                    follower.take(buffer.get(..count).unwrap_or_default());
                    self.heard.send_modify(|heard| heard.received += count as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return End::Reset,
                Err(error) => return End::Failed(format!("reading: {error}")),
            }
        }
    }
}

/// What was written.
#[derive(Debug, Default)]
struct Said {
    count: u64,
    hash: blake3::Hasher,
    finished: bool,
    error: Option<io::ErrorKind>,
}

struct Writing<'a> {
    plan: &'a Plan,
    side: Side,
    moment: Option<Moment>,
    listening: watch::Receiver<Heard>,
    script: &'a Script<'a>,
    said: &'a mut Said,
}

impl Writing<'_> {
    async fn run(mut self, socket: &mut WriteHalf<'_>) -> Wrote {
        match self.write(socket).await {
            Ok(wrote) => wrote,
            Err(error) => {
                self.said.error = Some(error.kind());
                Wrote::Stopped
            }
        }
    }

    async fn write(&mut self, socket: &mut WriteHalf<'_>) -> io::Result<Wrote> {
        let leaves = matches!((self.plan.ending, self.side), (Ending::Leaves { .. }, Side::Client));
        if leaves || self.moment == Some(Moment::Read(0)) {
            // Without a word, when its reading says so.
            return Ok(Wrote::Stopped);
        }
        let awaited = self.plan.awaits(self.side);
        // The reading has ended otherwise: what it saw is the end of this session.
        if self.listening.wait_for(|heard| heard.received >= awaited || heard.finished).await.is_err() {
            return Ok(Wrote::Stopped);
        }
        let stream = self.plan.sent_by(self.side);
        let until = match self.moment {
            Some(Moment::Sent(count)) => count,
            _ => stream.len - stream.kept_back,
        };
        self.pieces(socket, until).await?;
        if matches!(self.moment, Some(Moment::Sent(_))) {
            return Ok(Wrote::Gone);
        }
        if self.plan.ending == Ending::FinishesFirst(self.side.other()) {
            if self.listening.wait_for(|heard| heard.finished).await.is_err() {
                return Ok(Wrote::Stopped);
            }
            self.pieces(socket, stream.len).await?;
        }
        socket.shutdown().await?;
        self.said.finished = true;
        Ok(Wrote::Stopped)
    }

    /// Writes on to that place, in the plan's pieces and with its pauses.
    async fn pieces(&mut self, socket: &mut WriteHalf<'_>, until: u64) -> io::Result<()> {
        let stream = self.plan.sent_by(self.side);
        let mut sizes = ChaCha8Rng::seed_from_u64(stream.pieces_seed);
        let from = self.said.count;
        let pauses: Vec<_> = stream.pauses.iter().copied().filter(|pause| pause.at >= from).collect();
        let mut pauses = pauses.into_iter().peekable();
        loop {
            let sent = self.said.count;
            while let Some(pause) = pauses.next_if(|pause: &Rest| pause.at <= sent) {
                sleep(pause.length()).await;
            }
            if sent >= until {
                return Ok(());
            }
            let next = pauses.peek().map_or(until, |pause| pause.at.min(until));
            let size = sizes.random_range(1..=stream.largest_piece).min(next - sent);
            let piece = self.script.piece(sent, size);
            let written = socket.write(piece).await?;
            self.said.hash.update(piece.get(..written).unwrap_or_default());
            self.said.count += written as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::verdict::judge;

    /// Both ends joined without a daemon in between: whatever is found wrong here is a fault of the soak.
    #[test]
    fn sessions_without_a_daemon_are_judged_good() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let content = Content::new(9);
        let numbers: Vec<_> = (0..300)
            .filter(|number| {
                let plan = Plan::draw(9, *number);
                plan.up.len.max(plan.down.len) < 4 << 20
                // Alone the daemon turns a client away.
                && !matches!(plan.ending, Ending::Speechless { .. })
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
            converse(client, &plan, Side::Client, content, &[]),
            converse(backend, &plan, Side::Backend, content, &[]),
        );
        assert_eq!(judge(&plan, &client, Some(&backend)), Ok(()), "{plan}\n{client:#?}\n{backend:#?}");
        if plan.ending.clean() {
            assert_eq!((client.sent, backend.sent), (plan.up.len, plan.down.len));
        }
    }
}
