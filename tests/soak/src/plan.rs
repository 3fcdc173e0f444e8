//! The plan of a session, drawn from the seed: the same seed and number give the same plan on every
//! machine.

use std::fmt;
use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use injector_testbed::netns::Family;

/// The largest size of a stream, without its prefix.
pub(crate) const MAX_STREAM: u64 = 64 << 20;

/// Number of start positions of streams in the content: enough that no two streams are alike.
pub(crate) const STARTS: u64 = 16 << 20;

/// Approximate maximum of pieces per stream; twice as many if they come out small.
const MAX_PIECES: u64 = 500;

/// One side of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Side {
    Client,
    Backend,
}

impl Side {
    pub(crate) const ALL: [Self; 2] = [Self::Client, Self::Backend];

    pub(crate) const fn other(self) -> Self {
        match self {
            Self::Client => Self::Backend,
            Self::Backend => Self::Client,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Client => "client",
            Self::Backend => "backend",
        })
    }
}

/// Which side speaks first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opening {
    /// The server (SMTP); the client waits for the whole greeting unless it is `early`.
    Server {
        /// The client sends before the greeting.
        early: bool,
    },
    /// The client (IMAP over TLS).
    Client,
}

/// A delay after `at` bytes of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Delay {
    pub(crate) at: u64,
    pub(crate) ms: u32,
}

impl Delay {
    pub(crate) fn length(self) -> Duration {
        Duration::from_millis(self.ms.into())
    }
}

/// One direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stream {
    /// Its length, prefix included.
    pub(crate) len: u64,
    /// Its start position in the content that all streams share.
    pub(crate) start: u64,
    /// The largest piece per write.
    pub(crate) max_piece: u64,
    /// Seed of the sizes of the pieces.
    pub(crate) pieces_seed: u64,
    /// When its writer pauses, in order.
    pub(crate) pauses: Vec<Delay>,
    /// When its reader stalls, in order.
    pub(crate) stalls: Vec<Delay>,
    /// The receive buffer that its reader sets.
    pub(crate) receive_buffer: Option<u32>,
    /// The last bytes, which its writer holds back until the other side's FIN.
    pub(crate) held_back: u64,
}

/// When a side closes: after a number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Bytes of its own stream, written.
    Sent(u64),
    /// Bytes of the other stream, read.
    Read(u64),
}

/// How a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// This side sends its FIN first, and the other side only after it has seen that.
    ClosesFirst(Side),
    /// Each side sends its FIN after its last byte.
    Together,
    /// This side resets the connection.
    Reset {
        /// The side.
        by: Side,
        /// When.
        when: Moment,
    },
    /// The client closes without sending a byte.
    ClientLeavesSilently {
        /// By a reset, not a FIN.
        reset: bool,
        /// After reading the greeting, not at once.
        greeted: bool,
    },
    /// The backend reads the header and closes without sending a byte.
    BackendLeavesSilently {
        /// By a reset, not a FIN.
        reset: bool,
    },
}

impl Ending {
    /// Whether both sides must receive everything.
    pub(crate) fn clean(self) -> bool {
        matches!(self, Self::ClosesFirst(_) | Self::Together)
    }

    /// When this side closes early, and whether by a reset.
    pub(crate) fn planned_exit(self, side: Side, greeting: u64) -> Option<(Moment, bool)> {
        match (self, side) {
            (Self::Reset { by, when }, side) if by == side => Some((when, true)),
            (Self::ClientLeavesSilently { reset, greeted }, Side::Client) => {
                Some((Moment::Read(if greeted { greeting } else { 0 }), reset))
            }
            (Self::BackendLeavesSilently { reset }, Side::Backend) => Some((Moment::Read(0), reset)),
            _ => None,
        }
    }
}

/// The plan of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) number: u64,
    pub(crate) family: Family,
    pub(crate) opening: Opening,
    /// Client to backend.
    pub(crate) up: Stream,
    /// Backend to client.
    pub(crate) down: Stream,
    pub(crate) ending: Ending,
}

impl Plan {
    /// Draws the plan of one session.
    pub(crate) fn draw(seed: u64, number: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Each session has its own random stream: its plan does not depend on how many were drawn
        // before.
        rng.set_stream(number);
        let family = if rng.random_bool(0.5) { Family::V4 } else { Family::V6 };
        let opening = if rng.random_bool(0.5) {
            Opening::Server { early: rng.random_bool(0.2) }
        } else {
            Opening::Client
        };
        let ending = kind(&mut rng, opening);
        let mut plan = Self { number, family, opening, up: stream(&mut rng), down: stream(&mut rng), ending };
        plan.lag(&mut rng);
        plan.words_and_bounds(&mut rng);
        plan.settle_ending(&mut rng);
        for side in Side::ALL {
            plan.place_rests(side, &mut rng);
        }
        plan
    }

    /// What a side sends.
    pub(crate) fn sent_by(&self, side: Side) -> &Stream {
        match side {
            Side::Client => &self.up,
            Side::Backend => &self.down,
        }
    }

    fn sent_by_mut(&mut self, side: Side) -> &mut Stream {
        match side {
            Side::Client => &mut self.up,
            Side::Backend => &mut self.down,
        }
    }

    /// The beginning of a side's stream, before its content: the greeting, or the session's number.
    pub(crate) fn prefix(&self, side: Side) -> String {
        match (side, self.opening) {
            (Side::Client, _) => format!("SOAK {:010}\n", self.number),
            (Side::Backend, Opening::Server { .. }) => format!("220 soak {:010}\r\n", self.number),
            (Side::Backend, Opening::Client) => String::new(),
        }
    }

    /// The length of the greeting.
    pub(crate) fn greeting(&self) -> u64 {
        self.prefix(Side::Backend).len() as u64
    }

    /// How many bytes of the other stream a side waits for before its first own byte.
    pub(crate) fn awaits(&self, side: Side) -> u64 {
        match (side, self.opening) {
            (Side::Client, Opening::Server { early: false }) => self.greeting(),
            _ => 0,
        }
    }

    /// The number of its readers' stalls.
    pub(crate) fn stalls(&self) -> usize {
        self.up.stalls.len() + self.down.stalls.len()
    }

    /// One direction in eight sessions gets a reader that lags behind, with much to read.
    fn lag(&mut self, rng: &mut ChaCha8Rng) {
        if !rng.random_ratio(1, 8) {
            return;
        }
        let side = if rng.random_bool(0.5) { Side::Client } else { Side::Backend };
        let size = power(rng, 18, 21);
        let stream = self.sent_by_mut(side);
        stream.len = stream.len.max(size);
        stream.max_piece = stream.max_piece.max(stream.len / MAX_PIECES);
        stream.receive_buffer = Some(1 << rng.random_range(14..=16));
        stream.stalls = (0..rng.random_range(1..=4)).map(|_| rest(rng, 4, 8)).collect();
        if rng.random_ratio(1, 8) {
            stream.stalls = vec![Delay { at: 0, ms: rng.random_range(1000..3000) }];
        }
    }

    fn words_and_bounds(&mut self, rng: &mut ChaCha8Rng) {
        for side in Side::ALL {
            let prefix = self.prefix(side).len() as u64;
            self.sent_by_mut(side).len += prefix;
        }
        let says_nothing = matches!(self.ending, Ending::ClientLeavesSilently { .. });
        // The header also identifies the session; a client that speaks first has to send something,
        // or it is rejected.
        let is_silent = self.up.len == self.prefix(Side::Client).len() as u64
            && matches!(self.opening, Opening::Server { .. })
            && rng.random_bool(0.5);
        if says_nothing || is_silent {
            self.up.len = 0;
        }
        if matches!(self.ending, Ending::BackendLeavesSilently { .. }) {
            self.down.len = 0;
        } else {
            // A backend that sends no byte before its FIN would count as failed.
            self.down.len = self.down.len.max(1);
        }
    }

    fn settle_ending(&mut self, rng: &mut ChaCha8Rng) {
        // A client that finishes without a byte, where the server speaks first, has the backend reset.
        let finishes = matches!(self.ending, Ending::ClosesFirst(Side::Client) | Ending::Together);
        if finishes && matches!(self.opening, Opening::Server { .. }) {
            self.up.len = self.up.len.max(1);
        }
        match self.ending {
            Ending::ClosesFirst(first) => {
                let prefix = self.prefix(first.other()).len() as u64;
                let second = self.sent_by_mut(first.other());
                // The greeting cannot wait for the client's FIN, because the client waits for the
                // greeting.
                second.held_back = rng.random_range(0..=second.len.saturating_sub(prefix.max(1)));
            }
            Ending::Reset { by, when } => {
                self.up.len = self.up.len.max(1);
                let when = match when {
                    Moment::Sent(_) => Moment::Sent(rng.random_range(0..self.sent_by(by).len)),
                    Moment::Read(_) => Moment::Read(rng.random_range(0..=self.sent_by(by.other()).len)),
                };
                self.ending = Ending::Reset { by, when };
            }
            _ => {}
        }
    }

    fn place_rests(&mut self, side: Side, rng: &mut ChaCha8Rng) {
        let hesitates = side == Side::Client && self.opening == Opening::Client && rng.random_ratio(1, 50);
        let stream = self.sent_by_mut(side);
        for rest in &mut stream.stalls {
            // Early, so that much follows.
            rest.at = rng.random_range(0..=stream.len / 2);
        }
        for rest in &mut stream.pauses {
            rest.at = rng.random_range(0..=stream.len);
        }
        if hesitates {
            // Longer than the header waits for the client's first bytes.
            stream.pauses.push(Delay { at: 0, ms: 1200 });
        }
        stream.stalls.sort_by_key(|rest| rest.at);
        stream.pauses.sort_by_key(|rest| rest.at);
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, family, opening, up, down, ending } = self;
        write!(
            f,
            "session {number} over {}, {opening:?} first, {ending:?}\n    up {up}\n  down {down}",
            family.name()
        )
    }
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes in pieces up to {}", self.len, self.max_piece)?;
        for (what, rests) in [("pauses", &self.pauses), ("stalls", &self.stalls)] {
            for rest in rests {
                write!(f, ", {what} {} ms at {}", rest.ms, rest.at)?;
            }
        }
        if let Some(buffer) = self.receive_buffer {
            write!(f, ", receive buffer {buffer}")?;
        }
        if self.held_back > 0 {
            write!(f, ", the last {} after the other's FIN", self.held_back)?;
        }
        Ok(())
    }
}

fn kind(rng: &mut ChaCha8Rng, opening: Opening) -> Ending {
    let greets = matches!(opening, Opening::Server { .. });
    match rng.random_range(0..100) {
        0..22 => Ending::ClosesFirst(Side::Client),
        22..44 => Ending::ClosesFirst(Side::Backend),
        44..68 => Ending::Together,
        // The byte count of the moment is drawn when the sizes are known.
        68..77 => Ending::Reset { by: Side::Client, when: Moment::Sent(0) },
        77..81 => Ending::Reset { by: Side::Client, when: Moment::Read(0) },
        81..90 => Ending::Reset { by: Side::Backend, when: Moment::Sent(0) },
        90..94 => Ending::Reset { by: Side::Backend, when: Moment::Read(0) },
        94..98 => Ending::ClientLeavesSilently {
            reset: rng.random_bool(0.5),
            greeted: greets && rng.random_bool(0.5),
        },
        _ => Ending::BackendLeavesSilently { reset: rng.random_bool(0.5) },
    }
}

/// A stream without prefix; its pauses and stalls get their positions later.
fn stream(rng: &mut ChaCha8Rng) -> Stream {
    let len = size(rng);
    let max_piece = power(rng, 0, 17).max(len / MAX_PIECES);
    let pauses = match rng.random_range(0..10) {
        0..5 => 0,
        5..9 => rng.random_range(1..=2),
        _ => rng.random_range(3..=8),
    };
    let stalls = if rng.random_ratio(1, 10) { rng.random_range(1..=2) } else { 0 };
    Stream {
        len,
        start: rng.random_range(0..STARTS),
        max_piece,
        pieces_seed: rng.random(),
        pauses: (0..pauses).map(|_| rest(rng, 0, 5)).collect(),
        stalls: (0..stalls).map(|_| rest(rng, 1, 6)).collect(),
        receive_buffer: None,
        held_back: 0,
    }
}

/// Most are small, a few large; about half a megabyte on average.
fn size(rng: &mut ChaCha8Rng) -> u64 {
    match rng.random_range(0..1000) {
        0..150 => 0,
        150..550 => power(rng, 0, 11),
        550..850 => power(rng, 12, 16),
        850..970 => power(rng, 17, 20),
        970..995 => power(rng, 21, 23),
        _ => power(rng, 24, 25),
    }
}

/// A number of `low + 1` to `high + 1` binary digits, each length with the same probability.
fn power(rng: &mut ChaCha8Rng, low: u32, high: u32) -> u64 {
    let digits = rng.random_range(low..=high);
    rng.random_range(1 << digits..=(2 << digits))
}

fn rest(rng: &mut ChaCha8Rng, low: u32, high: u32) -> Delay {
    let ms = u32::try_from(power(rng, low, high)).unwrap_or(u32::MAX);
    Delay { at: 0, ms }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANY: u64 = 20_000;

    #[test]
    fn the_same_seed_draws_the_same_plans_in_any_order() {
        let forwards: Vec<_> = (0..200).map(|number| Plan::draw(7, number)).collect();
        let mut backwards: Vec<_> = (0..200).rev().map(|number| Plan::draw(7, number)).collect();
        backwards.reverse();
        assert_eq!(forwards, backwards);
        let other = Plan::draw(8, 3);
        assert_ne!(forwards[3], other);
        assert_ne!(Plan { number: 4, ..forwards[3].clone() }, forwards[4]);
    }

    #[test]
    fn plans_keep_to_their_bounds() {
        for plan in (0..MANY).map(|number| Plan::draw(1, number)) {
            for side in Side::ALL {
                let stream = plan.sent_by(side);
                let prefix = plan.prefix(side).len() as u64;
                assert!(stream.len <= MAX_STREAM + prefix, "{plan}");
                assert!(stream.start < STARTS && stream.max_piece > 0, "{plan}");
                assert!(stream.len / stream.max_piece <= 2 * MAX_PIECES + 21, "{plan}");
                assert!(stream.stalls.iter().all(|rest| rest.at <= stream.len && rest.ms <= 3000), "{plan}");
                assert!(stream.pauses.is_sorted_by_key(|rest| rest.at), "{plan}");
                let rests = stream.pauses.iter().chain(&stream.stalls).map(|rest| rest.ms).sum::<u32>();
                assert!(rests < 5000, "{plan}");
            }
        }
    }

    /// Otherwise each side would wait for the other forever.
    #[test]
    fn no_plan_waits_for_itself() {
        for plan in (0..MANY).map(|number| Plan::draw(2, number)) {
            let awaited = plan.awaits(Side::Client);
            let at_once = plan.down.len - plan.down.held_back;
            assert!(at_once >= awaited || !plan.ending.clean(), "{plan}");
            assert!(plan.up.held_back == 0 || plan.down.held_back == 0, "{plan}");
            if plan.ending.clean() {
                assert!(at_once > 0, "{plan}");
                assert!(plan.up.len > plan.up.held_back || plan.opening != Opening::Client, "{plan}");
            }
        }
    }

    #[test]
    fn a_reset_comes_before_the_end_of_its_stream() {
        for plan in (0..MANY).map(|number| Plan::draw(3, number)) {
            if let Ending::Reset { by, when } = plan.ending {
                match when {
                    Moment::Sent(count) => assert!(count < plan.sent_by(by).len, "{plan}"),
                    Moment::Read(count) => assert!(count <= plan.sent_by(by.other()).len, "{plan}"),
                }
            }
        }
    }

    #[test]
    fn every_kind_is_drawn_often_enough() {
        let plans: Vec<_> = (0..MANY).map(|number| Plan::draw(4, number)).collect();
        let share = |what: &dyn Fn(&Plan) -> bool| {
            plans.iter().filter(|plan| what(plan)).count() * 1000 / plans.len()
        };
        assert!(share(&|plan| matches!(plan.ending, Ending::ClosesFirst(_))) > 400);
        assert!(share(&|plan| matches!(plan.ending, Ending::Reset { .. })) > 200);
        assert!(share(&|plan| matches!(plan.ending, Ending::ClientLeavesSilently { .. })) > 20);
        assert!(share(&|plan| plan.stalls() > 0) > 200);
        assert!(share(&|plan| plan.opening == Opening::Server { early: true }) > 70);
        assert!(share(&|plan| plan.up.len == 0) > 20);
        assert!(share(&|plan| plan.up.len.max(plan.down.len) > 16 << 20) > 5);
        let mean = plans.iter().map(|plan| plan.up.len + plan.down.len).sum::<u64>() / MANY;
        assert!((500_000..2_000_000).contains(&mean), "{mean}");
    }
}
