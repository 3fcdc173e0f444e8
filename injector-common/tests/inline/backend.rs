//! A model of the backend's TCP (RFC 9293), for one pair of addresses and ports: what it takes, what it answers, and what is read
//! from it. It computes with plain numbers, so that it does not share the arithmetic under test.

use std::collections::{BTreeMap, BTreeSet};

use injector_common::{
    SeqNumber,
    inline::{ACK, FIN, RST, SYN, Segment},
};

use super::edge::{Byte, Sent};

const WINDOW: u32 = 65_535;

/// A connection that the backend has, or had.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    /// The sequence number of the client's first byte.
    pub(crate) first: u32,
    /// Who may be named in its header.
    pub(crate) clients: BTreeSet<u8>,
    /// What was read, in order.
    pub(crate) read: Vec<Byte>,
    /// What lies behind a gap.
    ahead: BTreeMap<u32, Byte>,
    pub(crate) next: u32,
    fin: Option<u32>,
    /// Nothing comes behind a FIN.
    finished: bool,
    send_next: u32,
    /// It has said its FIN,
    said_fin: bool,
    /// and how long ago it was last spoken to.
    silent_ms: u64,
    pub(crate) open: bool,
}

#[derive(Clone, Debug)]
enum State {
    Listen,
    SynReceived { first: u32, start: u32 },
    Established,
}

#[derive(Clone, Debug)]
pub(crate) struct Backend {
    /// It keeps nothing of a SYN, and takes whatever answers one of its own numbers.
    cookies: bool,
    state: State,
    /// What its next initial sequence number is made of.
    epoch: u32,
    pub(crate) connections: Vec<Connection>,
    /// Who has sent a SYN with this number.
    syns: BTreeMap<u32, BTreeSet<u8>>,
}

impl Backend {
    pub(crate) fn new(cookies: bool) -> Self {
        Self { cookies, state: State::Listen, epoch: 1, connections: Vec::new(), syns: BTreeMap::new() }
    }

    /// Its initial sequence number for a SYN. A cookie is a secret of the addresses and the minute, the SYN's number, and the index of
    /// a segment size, all added (secure_tcp_syn_cookie, net/ipv4/syncookies.c).
    fn start(syn: u32, epoch: u32) -> u32 {
        epoch.wrapping_mul(0x9E37_79B9).wrapping_add(syn).wrapping_add(2)
    }

    /// Whether this is the cookie of a SYN with this number: so it is for those nearby, with another segment size.
    fn is_cookie(&self, start: u32, syn: u32) -> bool {
        (self.epoch.saturating_sub(1)..=self.epoch)
            .any(|epoch| start.wrapping_sub(Self::start(syn, epoch)).wrapping_add(2) < 4)
    }

    fn current(&mut self) -> Option<&mut Connection> {
        match self.state {
            State::Established => self.connections.last_mut(),
            _ => None,
        }
    }

    pub(crate) fn open_connection(&self) -> Option<&Connection> {
        match self.state {
            State::Established => self.connections.last(),
            _ => None,
        }
    }

    pub(crate) fn tick(&mut self) {
        self.epoch += 1;
    }

    /// Time passes: what waits for the other side's FIN is forgotten after a minute.
    pub(crate) fn wait(&mut self, ms: u64) {
        let Some(connection) = self.current() else { return };
        connection.silent_ms += ms;
        if connection.said_fin && connection.silent_ms >= 60_000 {
            self.close();
        }
    }

    /// It starts again, with other secrets.
    pub(crate) fn reboot(&mut self) {
        self.close();
        self.epoch += 1000;
    }

    /// It has no connection any more, and says nothing.
    fn close(&mut self) {
        let first = match self.state {
            State::Listen => None,
            State::SynReceived { first, .. } => Some(first),
            State::Established => self.connections.last().map(|connection| connection.first),
        };
        if let Some(connection) = self.current() {
            connection.open = false;
        }
        self.state = State::Listen;
        if !self.cookies {
            self.epoch += 1;
            first.map(|first| self.syns.remove(&first));
        }
    }

    /// Takes a segment; `client` is whose SYN it is, if it is one. Returns what it answers.
    pub(crate) fn take(&mut self, sent: &Sent, client: u8) -> Option<Segment> {
        let segment = &sent.segment;
        if segment.is(SYN) && !segment.is(ACK) {
            self.syns.entry(segment.sequence.0).or_default().insert(client);
        }
        match self.state {
            State::Listen => self.listen(sent),
            State::SynReceived { first, start } => self.syn_received(sent, first, start),
            State::Established => self.established(sent),
        }
    }

    fn listen(&mut self, sent: &Sent) -> Option<Segment> {
        let segment = &sent.segment;
        if segment.is(RST) {
            return None;
        }
        if segment.is(ACK) {
            let (syn, start) =
                (segment.sequence.0.wrapping_sub(1), segment.acknowledgement.0.wrapping_sub(1));
            if self.cookies && !segment.is(SYN) && self.is_cookie(start, syn) {
                return self.establish(sent, segment.sequence.0, start);
            }
            return Some(refusal(segment));
        }
        if segment.is(SYN) && !segment.is(FIN) {
            let start = Self::start(segment.sequence.0, self.epoch);
            let first = segment.sequence.0.wrapping_add(1);
            if !self.cookies {
                self.state = State::SynReceived { first, start };
            }
            return Some(syn_ack(start, first));
        }
        None
    }

    fn syn_received(&mut self, sent: &Sent, first: u32, start: u32) -> Option<Segment> {
        let segment = &sent.segment;
        if segment.is(SYN) {
            return (segment.sequence.0.wrapping_add(1) == first).then(|| syn_ack(start, first));
        }
        if segment.sequence.0.wrapping_sub(first) > WINDOW {
            return Some(plain_ack(start.wrapping_add(1), first));
        }
        if segment.is(RST) {
            self.state = State::Listen;
            return None;
        }
        if !segment.is(ACK) {
            return None;
        }
        if segment.acknowledgement.0 != start.wrapping_add(1) {
            return Some(refusal(segment));
        }
        self.establish(sent, first, start)
    }

    fn establish(&mut self, sent: &Sent, first: u32, start: u32) -> Option<Segment> {
        let clients = self.syns.get(&first.wrapping_sub(1)).cloned().unwrap_or_default();
        self.connections.push(Connection {
            first,
            clients,
            read: Vec::new(),
            ahead: BTreeMap::new(),
            next: first,
            fin: None,
            finished: false,
            send_next: start.wrapping_add(1),
            said_fin: false,
            silent_ms: 0,
            open: true,
        });
        self.state = State::Established;
        self.established(sent)
    }

    fn established(&mut self, sent: &Sent) -> Option<Segment> {
        let segment = &sent.segment;
        let connection = self.connections.last_mut()?;
        let challenge = plain_ack(connection.send_next, connection.next);
        if segment.is(RST) {
            let beyond = segment.sequence.0.wrapping_sub(connection.next);
            if beyond == 0 {
                self.close();
                return None;
            }
            return (beyond <= WINDOW).then_some(challenge);
        }
        if segment.is(SYN) {
            return Some(challenge);
        }
        if !segment.is(ACK)
            || segment.acknowledgement.0.wrapping_sub(connection.send_next).wrapping_sub(1) < 1 << 31
        {
            return None;
        }
        // What lies before the window altogether is not looked at (RFC 9293, section 3.10.7.4).
        let fin = u32::from(segment.is(FIN));
        let end = segment.sequence.0.wrapping_add(segment.payload).wrapping_add(fin);
        if end.wrapping_sub(connection.next) >= 1 << 31 {
            return Some(challenge);
        }
        connection.store(sent);
        connection.silent_ms = 0;
        // The last acknowledgement of a connection that both sides have finished.
        let answer = plain_ack(connection.send_next, connection.next);
        if connection.said_fin && connection.finished && segment.acknowledgement.0 == connection.send_next {
            self.close();
            return (segment.payload != 0 || segment.is(FIN)).then_some(answer);
        }
        let connection = self.connections.last_mut()?;
        let something = segment.payload != 0 || segment.is(FIN);
        something.then(|| plain_ack(connection.send_next, connection.next))
    }

    /// It sends so many bytes, or a FIN.
    pub(crate) fn say(&mut self, payload: u32, fin: bool) -> Option<Segment> {
        let connection = self.current()?;
        let payload = if connection.said_fin { 0 } else { payload };
        let fin = fin && !connection.said_fin;
        if fin {
            (connection.said_fin, connection.silent_ms) = (true, 0);
        }
        let flags = ACK | if fin { FIN } else { 0 };
        let said = Segment { flags, payload, ..plain_ack(connection.send_next, connection.next) };
        connection.send_next = connection.send_next.wrapping_add(payload + u32::from(fin));
        Some(said)
    }

    /// It asks for what is missing, or says its SYN again.
    pub(crate) fn repeat(&mut self) -> Option<Segment> {
        match self.state {
            State::Listen => None,
            State::SynReceived { first, start } => Some(syn_ack(start, first)),
            State::Established => self.say(0, false),
        }
    }

    /// It resets the connection.
    pub(crate) fn reset(&mut self) -> Option<Segment> {
        let said = self.say(0, false)?;
        self.close();
        Some(Segment { flags: RST | ACK, ..said })
    }
}

impl Connection {
    /// Bytes in their place; what came first stays.
    fn store(&mut self, sent: &Sent) {
        let start = sent.segment.sequence.0;
        let beyond = |sequence: u32| sequence.wrapping_sub(self.next);
        let end = start.wrapping_add(sent.segment.payload);
        if beyond(start) > WINDOW && beyond(end) > WINDOW {
            return;
        }
        for (at, byte) in (0..).zip(&sent.bytes) {
            let sequence = start.wrapping_add(at);
            if beyond(sequence) <= WINDOW {
                self.ahead.entry(sequence).or_insert(*byte);
            }
        }
        if sent.segment.is(FIN) {
            self.fin.get_or_insert(end);
        }
        while !self.finished {
            if self.fin == Some(self.next) {
                self.finished = true;
                self.next = self.next.wrapping_add(1);
            } else if let Some(byte) = self.ahead.remove(&self.next) {
                self.read.push(byte);
                self.next = self.next.wrapping_add(1);
            } else {
                break;
            }
        }
    }
}

const fn plain_ack(sequence: u32, acknowledgement: u32) -> Segment {
    let (sequence, acknowledgement) = (SeqNumber(sequence), SeqNumber(acknowledgement));
    Segment { flags: ACK, sequence, acknowledgement, payload: 0, window: 500 }
}

const fn syn_ack(start: u32, first: u32) -> Segment {
    Segment { flags: SYN | ACK, ..plain_ack(start, first) }
}

/// RFC 9293, section 3.10.7.1.
fn refusal(segment: &Segment) -> Segment {
    if segment.is(ACK) {
        return Segment { flags: RST, sequence: segment.acknowledgement, ..Segment::default() };
    }
    let end = segment
        .sequence
        .0
        .wrapping_add(segment.payload + u32::from(segment.is(SYN)) + u32::from(segment.is(FIN)));
    Segment { flags: RST | ACK, acknowledgement: SeqNumber(end), ..Segment::default() }
}
