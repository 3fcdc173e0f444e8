//! The edge: the real decisions over the two connections that an entry of `FLOWS` names, the established one and the one that is being
//! opened. There is one pair of addresses and ports, as with `source = "client"`, so that every connection meets what others
//! have left.

use injector_common::{
    SeqNumber,
    inline::{
        ClientOwner, Flag, Flow, HEADER_CAPACITY, HeaderAddresses, OnSyn, OnSynAck, SYN, Segment, Syn,
        Template, ToBackend, ToClient, acknowledges, client_owner, on_syn, on_syn_ack, to_backend, to_client,
    },
};

/// The header's length.
pub(crate) const H: u32 = 28;

/// Where a byte on its way to the backend comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Byte {
    /// The header of this client, at this offset.
    Header(u8, u32),
    /// The client side's, with this sequence number as it sent it.
    Client(SeqNumber),
}

/// A segment on its way to the backend, with the numbers that the backend sees.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) segment: Segment,
    pub(crate) bytes: Vec<Byte>,
}

impl Sent {
    pub(crate) fn has_header(&self) -> bool {
        self.bytes.iter().any(|byte| matches!(byte, Byte::Header(..)))
    }
}

/// What becomes of a segment of the backend's.
#[derive(Debug, Default)]
pub(crate) struct Received {
    pub(crate) to_client: Option<Segment>,
    /// It was turned round.
    pub(crate) to_backend: Option<Sent>,
}

#[derive(Clone, Debug)]
pub(crate) struct Edge {
    pub(crate) established: Option<Flow>,
    pub(crate) pending: Option<Flow>,
    /// Whether headers wait for the client's first bytes.
    waits: bool,
    /// What the next offset is made of.
    seed: u32,
    pub(crate) now_ns: u64,
    /// The next rewriting fails, as a helper of the kernel's may.
    pub(crate) failing: bool,
    /// Connections whose end was reported; by whose reset, if it was one.
    pub(crate) reported: Vec<Flow>,
}

impl Edge {
    pub(crate) fn new(waits: bool, seed: u32) -> Self {
        let now_ns = 1_000_000_000;
        let (established, pending) = (None, None);
        Self { established, pending, waits, seed, now_ns, failing: false, reported: Vec::new() }
    }

    /// A SYN of this client's, which was read at ingress.
    pub(crate) fn syn(&mut self, client: u8, segment: &Segment) -> Option<Sent> {
        let syn = Syn { first: segment.sequence + 1, listener: 1, addresses: of(client) };
        match on_syn(self.pending.as_ref(), &syn, segment) {
            // The host's own socket is no part of the model.
            OnSyn::Socket => return None,
            OnSyn::Repeat => self.pending.as_mut()?.syn_repeats += 1,
            OnSyn::Open => {
                let template =
                    Template { len: H, sum: 0, waits: self.waits.into(), bytes: [0; HEADER_CAPACITY] };
                let mut flow = Flow { addresses: syn.addresses, ..Flow::default() };
                // A generator after Marsaglia, in place of the kernel's.
                self.seed ^= self.seed << 13;
                self.seed ^= self.seed >> 17;
                self.seed ^= self.seed << 5;
                flow.open(syn.first, syn.listener, &template, self.seed, self.now_ns);
                if let Some(earlier) = &self.established {
                    flow.follow(earlier);
                }
                self.pending = Some(flow);
            }
        }
        let sequence = segment.sequence + self.pending?.offset;
        let bytes = (0..segment.payload).map(|at| Byte::Client(segment.sequence + at)).collect();
        Some(Sent { segment: Segment { sequence, ..*segment }, bytes })
    }

    /// Any other segment of the client side's.
    pub(crate) fn client_sends(&mut self, segment: &Segment) -> Vec<Sent> {
        let with = |sequence: SeqNumber| Sent {
            segment: Segment { sequence, ..*segment },
            bytes: (0..segment.payload).map(|at| Byte::Client(segment.sequence + at)).collect(),
        };
        match client_owner(self.established.is_some(), self.pending.as_ref(), segment) {
            ClientOwner::None => return Vec::new(),
            ClientOwner::Pending => {
                let offset = self.pending.map_or(0, |flow| flow.offset);
                return vec![with(segment.sequence + offset)];
            }
            ClientOwner::Accepts => self.established = self.pending.take(),
            ClientOwner::Established => {}
        }
        let failing = std::mem::take(&mut self.failing);
        let Some(flow) = &mut self.established else { return Vec::new() };
        let shifted = segment.sequence + flow.shift();
        let plain = segment.sequence + flow.offset;
        let header = header(flow);
        let alone = |flags| Sent {
            segment: Segment { flags, sequence: plain, payload: H, ..*segment },
            bytes: header.clone(),
        };
        let now_ns = self.now_ns;
        let sent = match to_backend(flow, segment) {
            ToBackend::Drop => return Vec::new(),
            ToBackend::Defer => {
                flow.set(Flag::Deferred);
                return Vec::new();
            }
            ToBackend::Pass => vec![with(plain)],
            ToBackend::Shift | ToBackend::ShiftOlder if failing => return Vec::new(),
            ToBackend::Shift => vec![with(shifted)],
            ToBackend::ShiftOlder => {
                let mut older = with(shifted);
                older.segment.acknowledgement = older.segment.acknowledgement - Flow::LESS;
                vec![older]
            }
            ToBackend::Append | ToBackend::Prepend if failing => return Vec::new(),
            ToBackend::Append => {
                flow.set(Flag::Sent);
                vec![alone(segment.flags)]
            }
            ToBackend::Prepend => {
                flow.set(Flag::Sent);
                let mut both = with(plain);
                both.segment.payload += flow.header_len;
                both.bytes.splice(..0, header);
                vec![both]
            }
            ToBackend::Follow => {
                // As `header::replace` makes it of a copy.
                let ahead =
                    alone(segment.flags & !(injector_common::inline::FIN | injector_common::inline::URG));
                flow.set(Flag::Sent);
                if failing { vec![ahead] } else { vec![ahead, with(shifted)] }
            }
        };
        flow.last_ns = now_ns;
        flow.note_from_client(segment, || now_ns);
        self.report();
        sent
    }

    /// A segment of the backend's, or one that says it is.
    pub(crate) fn backend_sends(&mut self, segment: &Segment) -> Received {
        let earlier = |less: u32| Received {
            to_client: Some(Segment { acknowledgement: segment.acknowledgement - less, ..*segment }),
            to_backend: None,
        };
        let before_header = |flow: Option<Flow>| earlier(flow.map_or(0, |flow| flow.offset));
        if segment.is(SYN) {
            return match on_syn_ack(self.established.as_ref(), self.pending.as_ref(), segment) {
                OnSynAck::Accept => {
                    self.established = None;
                    if let Some(flow) = &mut self.pending {
                        flow.accept(segment);
                    }
                    before_header(self.pending)
                }
                OnSynAck::Repeated => before_header(self.established),
                OnSynAck::Pass => before_header(self.pending),
                OnSynAck::Drop => Received::default(),
            };
        }
        if let Some(flow) = &mut self.pending
            && flow.is_refused_by(segment)
        {
            flow.set(Flag::Refused);
            return Received::default();
        }
        let failing = std::mem::take(&mut self.failing);
        let now_ns = self.now_ns;
        let Some(flow) = &mut self.established else { return before_header(self.pending) };
        let way = to_client(flow, segment);
        if acknowledges(flow, segment) {
            flow.set(Flag::Acknowledged);
        }
        if way != ToClient::Drop {
            // The backend has sent it, whatever becomes of it.
            flow.last_ns = now_ns;
            flow.note_from_backend(segment, || now_ns);
        }
        let received = match way {
            ToClient::Drop => Received::default(),
            ToClient::Pass => earlier(flow.offset),
            ToClient::DropAck => Received::default(),
            ToClient::Shift | ToClient::ClampAck | ToClient::Retransmit if failing => Received::default(),
            ToClient::Shift => earlier(flow.shift()),
            ToClient::ClampAck => earlier(segment.acknowledgement - flow.first),
            ToClient::Retransmit => {
                flow.set(Flag::Sent);
                let numbers = Segment {
                    flags: injector_common::inline::ACK | injector_common::inline::PSH,
                    sequence: flow.first + flow.offset,
                    acknowledgement: flow.backend.acked,
                    payload: flow.header_len,
                    window: 500,
                };
                let answer = Sent { segment: numbers, bytes: header(flow) };
                Received { to_client: None, to_backend: Some(answer) }
            }
        };
        self.report();
        received
    }

    /// As `maps::emit_end`.
    fn report(&mut self) {
        if let Some(flow) = &mut self.established
            && flow.closed()
            && !flow.is(Flag::EndReported)
        {
            flow.set(Flag::EndReported);
            self.reported.push(*flow);
        }
    }
}

/// The addresses of a client, which are in its header.
pub(crate) fn of(client: u8) -> HeaderAddresses {
    let mut addresses = HeaderAddresses::default();
    addresses.bytes[3] = client;
    addresses
}

fn header(flow: &Flow) -> Vec<Byte> {
    (0..flow.header_len).map(|at| Byte::Header(flow.addresses.bytes[3], at)).collect()
}
