//! Client side, edge and backend together. After every step the properties are checked.

use std::collections::VecDeque;

use injector_common::{
    SeqNumber,
    inline::{ACK, FIN, Flag, PSH, RST, SYN, Segment, URG},
};
use proptest::test_runner::TestCaseError;

use super::backend::{Backend, Connection};
use super::edge::{Byte, Edge, H, Received, Sent};
use super::segments::{Acknowledges, NUMBERS, Step};

type Checked = Result<(), TestCaseError>;

#[derive(Clone, Debug)]
pub(crate) struct Testbed {
    pub(crate) edge: Edge,
    pub(crate) backend: Backend,
    /// What would be acknowledged next of each segment that has reached the client side; the latest first.
    heard: VecDeque<SeqNumber>,
    lose_to_backend: bool,
    lose_to_edge: bool,
    /// Nothing was lost, no other host has sent in the backend's name, and no SYN cookie can bring an ended connection back.
    pub(crate) undisturbed: bool,
    /// The client side has sent a FIN.
    finished: bool,
}

impl Testbed {
    pub(crate) fn new(waits: bool, cookies: bool, seed: u32) -> Self {
        Self {
            edge: Edge::new(waits, seed),
            backend: Backend::new(cookies),
            heard: VecDeque::new(),
            lose_to_backend: false,
            lose_to_edge: false,
            undisturbed: !cookies,
            finished: false,
        }
    }

    pub(crate) fn step(&mut self, step: &Step) -> Checked {
        match *step {
            Step::Syn { client, number, flags, payload } => self.syn(client, number, flags, payload)?,
            Step::Client { anchor, at, acknowledges, flags, payload } => {
                let sequence = self.anchor(anchor) + at;
                let acknowledgement = match acknowledges {
                    Acknowledges::Heard(ago, more) => self.heard(ago) + more,
                    Acknowledges::Any(number) => SeqNumber(number),
                };
                self.client(&Segment { flags, sequence, acknowledgement, payload, window: 500 })?;
            }
            Step::Say { payload, fin } => {
                let said = self.backend.say(payload, fin);
                self.receive(said)?;
            }
            Step::Repeat => {
                let said = self.backend.repeat();
                self.receive(said)?;
            }
            Step::Reset => {
                let said = self.backend.reset();
                self.receive(said)?;
            }
            Step::Reboot => {
                self.undisturbed = false;
                self.backend.reboot();
            }
            Step::Forged { at, acknowledges, flags } => self.forged(at, acknowledges, flags)?,
            Step::Wait { ms } => {
                self.edge.now_ns += ms * 1_000_000;
                self.backend.wait(ms);
            }
            Step::Minute => self.backend.tick(),
            Step::Evict => self.edge.pending = None,
            Step::Fail => {
                self.undisturbed = false;
                self.edge.failing = true;
            }
            Step::LoseToBackend => (self.lose_to_backend, self.undisturbed) = (true, false),
            Step::LoseToEdge => (self.lose_to_edge, self.undisturbed) = (true, false),
        }
        self.check()
    }

    /// The client's first byte, of one connection or another.
    fn anchor(&self, which: usize) -> SeqNumber {
        let entries = [self.edge.pending, self.edge.established].into_iter().flatten();
        let known: Vec<SeqNumber> = entries.map(|flow| flow.first).collect();
        let all: Vec<SeqNumber> =
            known.into_iter().chain(NUMBERS.map(|number| SeqNumber(number) + 1)).collect();
        all[which % all.len()]
    }

    fn heard(&self, ago: usize) -> SeqNumber {
        self.heard.get(ago).or(self.heard.front()).copied().unwrap_or_default()
    }

    pub(crate) fn syn(&mut self, client: u8, sequence: u32, flags: u8, payload: u32) -> Checked {
        let sequence = SeqNumber(sequence);
        let segment = Segment { flags, sequence, acknowledgement: self.heard(0), payload, window: 500 };
        if let Some(sent) = self.edge.syn(client, &segment) {
            // P1: what has SYN among its flags has nothing else.
            prop_assert_that(
                sent.segment.flags & (FIN | RST | ACK | URG) == 0 && sent.bytes.is_empty(),
                || format!("{sent:?} has passed"),
            )?;
            self.send_to_backend(vec![sent], client)?;
        }
        Ok(())
    }

    pub(crate) fn client(&mut self, segment: &Segment) -> Checked {
        // A client that goes on behind its FIN has two streams, and which of them the backend has is its own secret.
        self.undisturbed &= !self.finished;
        self.finished |= segment.is(FIN);
        // While the header is under way it is open which of two numbers the backend expects.
        let undecided = self.edge.established.is_some_and(|flow| {
            flow.is(Flag::ClientRst) || (flow.is(Flag::Sent) && !flow.is(Flag::Acknowledged))
        });
        let sent = self.edge.client_sends(segment);
        self.send_to_backend(sent, 0)?;
        if undecided { Ok(()) } else { self.check_reset() }
    }

    fn send_to_backend(&mut self, sent: Vec<Sent>, client: u8) -> Checked {
        for sent in sent {
            prop_assert_that(
                !sent.has_header() || sent.segment.flags & (URG | FIN | SYN | RST) == 0,
                || format!("P1: a header with other flags: {sent:?}"),
            )?;
            if std::mem::take(&mut self.lose_to_backend) {
                continue;
            }
            let answer = self.backend.take(&sent, client);
            self.check()?;
            self.receive(answer)?;
        }
        Ok(())
    }

    fn receive(&mut self, said: Option<Segment>) -> Checked {
        let Some(segment) = said else { return Ok(()) };
        // A FIN is sent again until it has come, and is not lost for good.
        if std::mem::take(&mut self.lose_to_edge) && !segment.is(FIN) {
            if self.backend.open_connection().is_none() {
                // Of this end the edge cannot know. What then protects is said in docs/security.md, and is not tried here.
                self.backend.reboot();
            }
            return Ok(());
        }
        let received = self.edge.backend_sends(&segment);
        self.deliver(received)
    }

    fn deliver(&mut self, received: Received) -> Checked {
        if let Some(segment) = received.to_client {
            let fin_or_syn = u32::from(segment.is(SYN)) + u32::from(segment.is(FIN));
            self.heard.push_front(segment.sequence + (segment.payload + fin_or_syn));
            self.heard.truncate(8);
        }
        self.send_to_backend(received.to_backend.into_iter().collect(), 0)
    }

    /// In the backend's name: resets, or acknowledgements with its number, but never that the header has come when it was sent and has
    /// not, nor that it is there still when it has ended. A host that could send more to the edge is on the way to the backend, and could as well speak to it.
    fn forged(&mut self, at: u32, acknowledges: u32, flags: u8) -> Checked {
        let entry = self.edge.established.or(self.edge.pending);
        let Some(flow) = entry else { return Ok(()) };
        let flags = if flow.is(Flag::Sent) { flags & !ACK } else { flags };
        let (at, flags) = if flags & RST == 0 { (0, flags & !FIN) } else { (at, flags) };
        if flags & RST == 0 && (flow.is(Flag::BackendFin) || flow.is_reset()) {
            return Ok(());
        }
        let payload = 0;
        self.undisturbed = false;
        let segment = Segment {
            flags,
            sequence: flow.backend.end + at,
            acknowledgement: flow.first + flow.offset + acknowledges,
            payload,
            window: 500,
        };
        let received = self.edge.backend_sends(&segment);
        self.deliver(received)
    }

    fn check(&self) -> Checked {
        if let Some(flow) = self.edge.established {
            prop_assert_that(!flow.is(Flag::Acknowledged) || flow.is(Flag::Sent), || {
                format!("P1: acknowledged and never sent: {flow:?}")
            })?;
        }
        self.backend.connections.iter().try_for_each(check_read)
    }

    /// P5: an end by a reset of the client's, which has just come, is one that the backend has taken.
    fn check_reset(&self) -> Checked {
        let Some(flow) = self.edge.established else { return Ok(()) };
        if !self.undisturbed || !flow.is(Flag::ClientRst) {
            return Ok(());
        }
        let own = |connection: &&Connection| connection.first == (flow.first + flow.offset).0;
        prop_assert_that(!self.backend.open_connection().is_some_and(|connection| own(&connection)), || {
            format!("P5: reset for the edge, and open for the backend: {flow:?}")
        })
    }

    /// P3: after whatever has happened, somebody who has the backend listen connects, is named, and is heard.
    pub(crate) fn newcomer_is_served(&mut self, number: u32) -> Checked {
        const CLIENT: u8 = 9;
        self.backend.reboot();
        (self.lose_to_backend, self.lose_to_edge, self.edge.failing) = (false, false, false);
        self.edge.now_ns += 1_000_000;
        self.syn(CLIENT, number, SYN, 0)?;
        let first = SeqNumber(number) + 1;
        let before = self.backend.connections.len();
        let segment = |sequence, payload, flags, testbed: &Self| Segment {
            flags,
            sequence,
            acknowledgement: testbed.heard(0),
            payload,
            window: 500,
        };
        let answer = segment(first, 0, ACK, self);
        self.client(&answer)?;
        let data = segment(first, 40, ACK | PSH, self);
        self.client(&data)?;
        let Some(connection) = self.backend.connections.get(before) else {
            return prop_assert_that(false, || "P3: the newcomer has no connection".to_owned());
        };
        prop_assert_that(connection.read.len() == H as usize + 40, || {
            format!("P3: the newcomer is not heard: {:?}, {:?}", connection.read, self.edge)
        })?;
        prop_assert_that(connection.read[0] == Byte::Header(CLIENT, 0), || {
            format!("P3: the newcomer is taken for another: {:?}", connection.read[0])
        })
    }
}

/// P1, P2: what is read in the header's place is the header of the client whose SYN began the connection, whole, or nothing; and behind
/// it are the client's bytes in their order.
fn check_read(connection: &Connection) -> Checked {
    let read = &connection.read;
    prop_assert_that(read.is_empty() || read.len() >= H as usize, || {
        format!("P2: a part of a header: {read:?}")
    })?;
    let mut start = None;
    for (at, byte) in (0..).zip(read) {
        let right = match *byte {
            Byte::Header(client, offset) => at < H && offset == at && connection.clients.contains(&client),
            Byte::Client(sequence) => {
                let start = *start.get_or_insert(sequence - at);
                at >= H && sequence - at == start
            }
        };
        prop_assert_that(right, || format!("P1: {byte:?} at {at} of {connection:?}"))?;
    }
    let named: Vec<_> = read.iter().take(H as usize).collect();
    prop_assert_that(named.windows(2).all(|pair| same_client(pair[0], pair[1])), || {
        format!("P2: parts of two headers: {named:?}")
    })
}

fn same_client(one: &Byte, other: &Byte) -> bool {
    matches!((one, other), (Byte::Header(one, _), Byte::Header(other, _)) if one == other)
}

pub(crate) fn prop_assert_that(holds: bool, message: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(TestCaseError::fail(message())) }
}
