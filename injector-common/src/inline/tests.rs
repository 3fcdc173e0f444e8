//! Examples.

use super::*;
use crate::SeqNumber;

extern crate std;

const FIRST: SeqNumber = SeqNumber(1000);
const LEN: u32 = 28;

fn flow(flags: &[Flag]) -> Flow {
    let client = SeqState::new(FIRST);
    let (backend, backend_first) = (SeqState::new(SeqNumber(7)), SeqNumber(7));
    let client_top = FIRST + 10_000;
    let mut flow =
        Flow { first: FIRST, client_top, header_len: LEN, client, backend, backend_first, ..Flow::default() };
    flags.iter().for_each(|flag| flow.set(*flag));
    flow
}

fn from_client(flags: u8, sequence: SeqNumber, payload: u32) -> Segment {
    Segment { flags, sequence, payload, acknowledgement: SeqNumber(7), window: 500 }
}

fn from_backend(flags: u8, acknowledgement: SeqNumber, payload: u32) -> Segment {
    Segment { flags, sequence: SeqNumber(7), acknowledgement, payload, window: 500 }
}

#[test]
fn no_padding() {
    assert_eq!(size_of::<Key>(), 40);
    assert_eq!(size_of::<Entry>(), 12);
    assert_eq!(size_of::<Direction>(), 32 + 40);
    assert_eq!(size_of::<Flow>() % 8, 0);
    assert_eq!(size_of::<Event>(), 16);
    assert_eq!(size_of::<Template>(), 12 + HEADER_CAPACITY);
}

#[test]
fn segments_of_the_client() {
    for (state, segment, expected) in [
        // The handshake, and its repetitions.
        (&[][..], from_client(ACK, FIRST, 0), ToBackend::Append),
        (&[Flag::Sent], from_client(ACK, FIRST, 0), ToBackend::Append),
        (&[Flag::Sent], from_client(SYN, FIRST - 1, 0), ToBackend::Drop),
        // Data or an end before, and after.
        (&[][..], from_client(ACK | PSH, FIRST, 5), ToBackend::Prepend),
        (&[][..], from_client(ACK | PSH | FIN, FIRST, 5), ToBackend::Follow),
        (&[][..], from_client(ACK | URG, FIRST, 5), ToBackend::Follow),
        (&[][..], from_client(ACK, FIRST + 5, 5), ToBackend::Drop),
        (&[][..], from_client(ACK, FIRST + 1, 0), ToBackend::Drop),
        (&[][..], from_client(ACK | FIN, FIRST, 0), ToBackend::Follow),
        (&[Flag::Sent], from_client(ACK, FIRST, 5), ToBackend::Shift),
        (&[Flag::Sent], from_client(ACK | FIN, FIRST, 0), ToBackend::Shift),
        (&[Flag::Sent], from_client(ACK, FIRST + 5, 0), ToBackend::Shift),
        // Before the first byte: for a keep-alive probe it is too early, and the rest has no place there.
        (&[Flag::Sent], from_client(ACK, FIRST - 1, 0), ToBackend::Drop),
        (&[Flag::Acknowledged], from_client(ACK, FIRST - 1, 0), ToBackend::Shift),
        (&[Flag::Acknowledged], from_client(ACK, FIRST - 1, 1), ToBackend::Drop),
        (&[Flag::Sent], from_client(ACK, FIRST - 1, 1), ToBackend::Drop),
        (&[][..], from_client(ACK | PSH, FIRST - LEN, LEN), ToBackend::Drop),
        (&[Flag::Sent], from_client(ACK | FIN, FIRST - 1, 0), ToBackend::Drop),
        (&[Flag::Sent], from_client(ACK | URG, FIRST - 1, 0), ToBackend::Drop),
        (&[][..], from_client(ACK | URG, FIRST, 0), ToBackend::Drop),
        // Without the backend's number, or with another.
        (&[][..], from_client(PSH, FIRST, 5), ToBackend::Drop),
        (
            &[][..],
            Segment { acknowledgement: SeqNumber(7) + LEN, ..from_client(ACK | PSH, FIRST, 5) },
            ToBackend::Drop,
        ),
        (
            &[Flag::Sent],
            Segment { acknowledgement: SeqNumber(6), ..from_client(ACK, FIRST + 5, 5) },
            ToBackend::Drop,
        ),
        // Resets must have exactly the number that the backend expects (RFC 5961).
        (&[][..], from_client(RST, FIRST, 0), ToBackend::Pass),
        (&[Flag::Sent], from_client(RST, FIRST, 0), ToBackend::Shift),
        (&[][..], from_client(RST, FIRST, 5), ToBackend::Drop),
        (&[Flag::Sent], from_client(RST | FIN, FIRST, 0), ToBackend::Drop),
        (&[Flag::Acknowledged], from_client(RST | ACK, FIRST + 1, 0), ToBackend::Shift),
        (
            &[Flag::Acknowledged],
            Segment { acknowledgement: SeqNumber(8), ..from_client(ACK, FIRST, 5) },
            ToBackend::Drop,
        ),
        // Acknowledged once is acknowledged for good, however far the numbers have come.
        (&[Flag::Acknowledged], from_client(ACK, FIRST, 0), ToBackend::Shift),
        (&[Flag::Acknowledged, Flag::Far], from_client(ACK, FIRST - 9, 100), ToBackend::Shift),
        (&[Flag::Acknowledged], from_client(ACK, FIRST - 9, 100), ToBackend::Drop),
    ] {
        assert_eq!(to_backend(&flow(state), &segment), expected, "{state:?} {segment:?}");
    }
}

#[test]
fn segments_of_a_client_that_speaks_first() {
    let waits = |flags: &[Flag]| Flow { waits: 1, ..flow(flags) };
    for (state, segment, expected) in [
        // The end of the handshake waits once.
        (&[][..], from_client(ACK, FIRST, 0), ToBackend::Defer),
        (&[Flag::Deferred], from_client(ACK, FIRST, 0), ToBackend::Append),
        // A keep-alive probe is no end of a handshake.
        (&[Flag::Deferred], from_client(ACK, FIRST - 1, 0), ToBackend::Drop),
        (&[Flag::Deferred], from_client(ACK | PSH, FIRST, 5), ToBackend::Prepend),
        // Its own acknowledgement was lost before it came here.
        (&[][..], from_client(ACK | PSH, FIRST, 5), ToBackend::Prepend),
        (&[Flag::Deferred], from_client(ACK | URG, FIRST, 5), ToBackend::Follow),
        // Sent again, and what comes behind.
        (&[Flag::Deferred, Flag::Sent], from_client(ACK | PSH, FIRST, 5), ToBackend::Follow),
        (&[Flag::Deferred, Flag::Sent], from_client(ACK, FIRST + 5, 5), ToBackend::Shift),
        (&[Flag::Deferred], from_client(ACK, FIRST + 5, 5), ToBackend::Drop),
        // It leaves, with a word and without.
        (&[Flag::Deferred], from_client(ACK | FIN, FIRST, 5), ToBackend::Follow),
        (&[Flag::Deferred], from_client(ACK | FIN, FIRST, 0), ToBackend::Follow),
        (&[Flag::Deferred, Flag::Sent], from_client(ACK | FIN, FIRST, 0), ToBackend::Shift),
        (&[Flag::Deferred], from_client(RST, FIRST, 0), ToBackend::Pass),
        (&[Flag::Acknowledged], from_client(ACK, FIRST, 5), ToBackend::Shift),
    ] {
        assert_eq!(to_backend(&waits(state), &segment), expected, "{state:?} {segment:?}");
    }
}

#[test]
fn segments_of_the_backend() {
    let sent = &[Flag::Sent][..];
    for (state, segment, expected) in [
        // Refused.
        (&[][..], from_backend(RST | ACK, FIRST, 0), ToClient::ClampAck),
        (sent, from_backend(RST, SeqNumber(0), 0), ToClient::Pass),
        // The header is missing, in whole or in part.
        (sent, from_backend(ACK, FIRST, 0), ToClient::Retransmit),
        (sent, from_backend(ACK, FIRST + LEN - 1, 0), ToClient::Retransmit),
        (&[][..], from_backend(ACK, FIRST, 0), ToClient::Retransmit),
        (sent, from_backend(ACK, FIRST, 9), ToClient::ClampAck),
        (sent, from_backend(ACK | FIN, FIRST, 0), ToClient::ClampAck),
        // It has come, and there is nothing else to say, or there is.
        (sent, from_backend(ACK, FIRST + LEN, 0), ToClient::DropAck),
        (sent, Segment { window: 0, ..from_backend(ACK, FIRST + LEN, 0) }, ToClient::Shift),
        (sent, from_backend(ACK, FIRST + LEN, 9), ToClient::Shift),
        (sent, from_backend(ACK | FIN, FIRST + LEN, 0), ToClient::Shift),
        (sent, from_backend(ACK, FIRST + LEN + 1, 0), ToClient::Shift),
        (sent, from_backend(ACK, FIRST + LEN + 5000, 40), ToClient::Shift),
        (sent, from_backend(ACK, FIRST - 1, 0), ToClient::Pass),
        // What was never sent cannot have come.
        (&[][..], from_backend(ACK, FIRST + LEN, 0), ToClient::Drop),
        (&[][..], from_backend(ACK, FIRST + LEN + 5, 9), ToClient::Drop),
        // And stays so, 2 GiB later too.
        (&[Flag::Acknowledged], from_backend(ACK, FIRST + (3 << 30), 0), ToClient::Shift),
        (&[Flag::Acknowledged], from_backend(ACK, FIRST, 0), ToClient::Shift),
    ] {
        assert_eq!(to_client(&flow(state), &segment), expected, "{state:?} {segment:?}");
    }
}

#[test]
fn a_syn_is_answered_by_its_own_syn_ack() {
    let established = Flow { offset: 100, ..flow(&[Flag::Accepted, Flag::Sent]) };
    let done = Flow { offset: 100, ..flow(&[Flag::Accepted, Flag::Sent, Flag::Acknowledged]) };
    let pending = Flow { offset: 3000, ..flow(&[]) };
    let answered = Flow { offset: 3000, ..flow(&[Flag::Accepted]) };
    let left = Flow { offset: 3000, ..flow(&[Flag::Refused]) };
    let syn_ack = |sequence: u32, offset: u32| Segment {
        sequence: SeqNumber(sequence) - 1,
        ..from_backend(SYN | ACK, FIRST + offset, 0)
    };
    for (entries, segment, expected) in [
        ((None, None), syn_ack(9, 0), OnSynAck::Pass),
        ((None, Some(&pending)), syn_ack(9, 3000), OnSynAck::Accept),
        ((Some(&done), Some(&pending)), syn_ack(9, 3000), OnSynAck::Accept),
        ((None, Some(&answered)), syn_ack(7, 3000), OnSynAck::Accept),
        ((None, Some(&left)), syn_ack(7, 3000), OnSynAck::Drop),
        // SYN cookies of two minutes.
        ((None, Some(&answered)), syn_ack(9, 3000), OnSynAck::Drop),
        // Of an earlier SYN, which is no more: by itself it opens nothing, and beside an established one it would.
        ((None, Some(&pending)), syn_ack(9, 3001), OnSynAck::Pass),
        ((Some(&done), Some(&pending)), syn_ack(9, 3001), OnSynAck::Drop),
        ((Some(&done), None), syn_ack(9, 3001), OnSynAck::Drop),
        // Its own once more, while the header may have been lost with the answer; with another number it is another one.
        ((Some(&established), None), syn_ack(7, 100), OnSynAck::Repeated),
        ((Some(&established), None), syn_ack(8, 100), OnSynAck::Drop),
        ((Some(&done), None), syn_ack(7, 100), OnSynAck::Drop),
        ((Some(&established), None), Segment { flags: SYN, ..syn_ack(7, 100) }, OnSynAck::Drop),
    ] {
        assert_eq!(on_syn_ack(entries.0, entries.1, &segment), expected, "{entries:?} {segment:?}");
    }
}

#[test]
fn a_segment_is_that_of_who_is_established() {
    let (pending, unanswered) = (flow(&[Flag::Accepted]), flow(&[]));
    let owner = |established, pending, segment| client_owner(established, pending, &segment);
    let answer = from_client(ACK, FIRST, 0);
    assert_eq!(owner(true, None, answer), ClientOwner::Established);
    assert_eq!(owner(true, Some(&pending), answer), ClientOwner::Accepts);
    assert_eq!(owner(false, Some(&pending), answer), ClientOwner::Accepts);
    assert_eq!(owner(false, Some(&unanswered), answer), ClientOwner::None, "the backend has not answered");
    let other = Segment { acknowledgement: SeqNumber(8), ..answer };
    assert_eq!(owner(false, Some(&pending), other), ClientOwner::None);
    assert_eq!(owner(false, None, answer), ClientOwner::None);
    assert_eq!(owner(false, Some(&pending), from_client(RST, SeqNumber(99), 0)), ClientOwner::Pending);
    assert_eq!(
        owner(false, Some(&pending), from_client(RST, SeqNumber(99), 5)),
        ClientOwner::None,
        "with data"
    );
    assert_eq!(owner(false, None, from_client(RST, SeqNumber(99), 0)), ClientOwner::None);
    // The host's socket has these connections.
    let twice = Flow { syn_repeats: 1, ..unanswered };
    let refused = flow(&[Flag::Refused]);
    for left in [&refused, &twice] {
        assert_eq!(owner(false, Some(left), from_client(RST, SeqNumber(99), 0)), ClientOwner::None);
    }
    let repeated = Flow { syn_repeats: 1, ..pending };
    assert_eq!(owner(false, Some(&repeated), from_client(RST, SeqNumber(99), 0)), ClientOwner::Pending);
    // Beside an established one, by its own answer alone.
    assert_eq!(owner(true, Some(&unanswered), answer), ClientOwner::Established);
    assert_eq!(owner(true, Some(&pending), other), ClientOwner::Established);
    assert_eq!(owner(true, Some(&pending), from_client(ACK, FIRST + 1, 0)), ClientOwner::Established);
    assert_eq!(owner(true, Some(&pending), from_client(RST | ACK, FIRST, 0)), ClientOwner::Established);
}

#[test]
fn a_refusal_acknowledges_the_syn() {
    let pending = Flow { offset: 100, ..flow(&[]) };
    assert!(pending.is_refused_by(&from_backend(RST | ACK, FIRST + 100, 0)));
    assert!(!pending.is_refused_by(&from_backend(RST | ACK, FIRST + 101, 0)));
    assert!(!pending.is_refused_by(&from_backend(RST, FIRST + 100, 0)));
    assert!(!pending.is_refused_by(&from_backend(ACK, FIRST + 100, 0)));
    let accepted = Flow { offset: 100, ..flow(&[Flag::Accepted]) };
    assert!(!accepted.is_refused_by(&from_backend(RST | ACK, FIRST + 100, 0)));
}

#[test]
fn an_error_about_the_syn_refuses_it_until_it_is_answered() {
    let pending = Flow { offset: 100, ..flow(&[]) };
    assert!(pending.is_unreachable_by(FIRST + 99));
    for other in [FIRST + 98, FIRST + 100] {
        assert!(!pending.is_unreachable_by(other));
    }
    assert!(!Flow { offset: 100, ..flow(&[Flag::Accepted]) }.is_unreachable_by(FIRST + 99));
}

#[test]
fn the_header_is_acknowledged_once() {
    assert!(acknowledges(&flow(&[Flag::Sent]), &from_backend(ACK, FIRST + LEN, 0)));
    assert!(acknowledges(&flow(&[Flag::Sent]), &from_backend(ACK, FIRST + LEN + 10_000, 0)));
    assert!(!acknowledges(&flow(&[Flag::Sent]), &from_backend(ACK, FIRST + LEN + 10_001, 0)), "not sent");
    assert!(!acknowledges(&flow(&[Flag::Sent]), &from_backend(ACK, FIRST, 0)));
    assert!(!acknowledges(&flow(&[]), &from_backend(ACK, FIRST + LEN, 0)));
    assert!(!acknowledges(&flow(&[Flag::Sent]), &from_backend(PSH, FIRST + LEN, 0)));
    assert!(!acknowledges(&flow(&[Flag::Acknowledged]), &from_backend(ACK, FIRST + LEN, 0)));
}

#[test]
fn the_decisions_hold_across_the_wrap() {
    let first = SeqNumber(u32::MAX - 5);
    let flow = Flow { first, client: SeqState::new(first), ..flow(&[Flag::Sent]) };
    assert_eq!(to_client(&flow, &from_backend(ACK, SeqNumber(u32::MAX - 5), 0)), ToClient::Retransmit);
    assert_eq!(to_client(&flow, &from_backend(ACK, SeqNumber(21), 0)), ToClient::Retransmit);
    assert_eq!(to_client(&flow, &from_backend(ACK, SeqNumber(22), 0)), ToClient::DropAck);
    assert_eq!(to_client(&flow, &from_backend(ACK, SeqNumber(23), 0)), ToClient::Shift);
    assert_eq!(to_client(&flow, &from_backend(ACK, SeqNumber(u32::MAX - 6), 0)), ToClient::Pass);
}

#[test]
fn an_address_is_set_in_place() {
    let mut address = Address::new([0; 16], 25);
    address.set_mapped(u32::from_ne_bytes([10, 0, 0, 255]));
    address.set_mapped(u32::from_ne_bytes([192, 0, 2, 1]));
    assert_eq!(address, Address::new(Address::mapped([192, 0, 2, 1]), 25));
    let ip = *b"0123456789abcdef";
    let (words, _) = ip.as_chunks::<4>();
    address.set(core::array::from_fn(|at| u32::from_ne_bytes(words[at])));
    assert_eq!(address, Address::new(ip, 25));
}

/// The same connection's numbers fit a SYN cookie again one header's length away.
#[test]
fn a_connection_that_may_be_forgotten_begins_no_other() {
    let alive = flow(&[Flag::Sent, Flag::Acknowledged]);
    let mut finished = alive;
    finished.note_from_backend(
        &Segment { sequence: SeqNumber(7), ..from_backend(ACK | FIN, FIRST + LEN, 60) },
        || 1,
    );
    let mut reset = alive;
    reset.note_from_backend(&Segment { sequence: SeqNumber(99), ..from_backend(RST, SeqNumber(0), 0) }, || 1);
    let mut by_client = alive;
    by_client.note_from_client(&from_client(RST, FIRST + 9, 0), || 1);
    assert!(!reset.closed() && !by_client.closed(), "with other numbers than the expected ones");
    // Of the client's bytes k and of the backend's m have come.
    let at = |flags, k: u32, m: u32, payload| Segment {
        flags,
        sequence: FIRST + k,
        acknowledgement: SeqNumber(7) + m,
        payload,
        window: 500,
    };
    for flow in [finished, reset, by_client] {
        for (k, m) in [(0, LEN), (9, 9 + LEN), (5, LEN + 5 + 4), (5, LEN + 5 - 4), (200, 200 + LEN)] {
            assert!(flow.may_begin_another(&at(ACK, k, m, 40)), "{k} {m}");
            assert!(flow.may_begin_another(&at(ACK, k, m, 0)), "{k} {m}: bytes may follow");
            assert!(flow.may_begin_another(&at(ACK | FIN, k, m, 1)), "{k} {m}");
            assert!(flow.may_begin_another(&at(ACK | FIN | URG, k, m, 0)), "{k} {m}");
            assert!(
                !flow.may_begin_another(&at(ACK | FIN, k, m, 0))
                    && !flow.may_begin_another(&at(RST, k, m, 0))
            );
            assert!(!alive.may_begin_another(&at(ACK, k, m, 40)), "{k} {m}");
            let mut heard = flow;
            heard.backend.end = SeqNumber(7) + m;
            assert_eq!(to_backend(&heard, &at(ACK, k, m, 40)), ToBackend::ShiftOlder, "{k} {m}");
            assert!(!heard.may_begin_another(&at(ACK, k, m - Flow::LESS, 40)), "{k} {m}: what it becomes");
        }
        for (k, m) in [(0, 0), (0, LEN + 5), (0, LEN - 5), (100, 0), (100, 100)] {
            assert!(!flow.may_begin_another(&at(ACK, k, m, 40)), "{k} {m}");
        }
    }
}

/// Nor does what would follow a header that a backend has no connection for any more.
#[test]
fn no_other_begins_behind_a_header_of_its_own() {
    let mut finished = flow(&[]);
    finished.note_from_backend(&from_backend(ACK | FIN, FIRST, 60), || 1);
    let first = |acknowledgement| Segment { acknowledgement, ..from_client(ACK | FIN, FIRST, 5) };
    assert_eq!(to_backend(&finished, &first(SeqNumber(7))), ToBackend::Follow);
    assert_eq!(to_backend(&finished, &first(SeqNumber(7) + LEN)), ToBackend::Drop);
}

/// What an honest client sends passes, in every state that it can be in.
#[test]
fn a_client_closes_as_it_does() {
    let mut flow = flow(&[Flag::Sent, Flag::Acknowledged]);
    let mut pass = |segment: Segment| {
        assert_eq!(to_backend(&flow, &segment), ToBackend::Shift, "{segment:?}");
        flow.note_from_client(&segment, || 1);
    };
    pass(from_client(ACK | PSH, FIRST, 10));
    pass(from_client(ACK | FIN, FIRST + 10, 0));
    // The acknowledgements behind its FIN, the FIN again, and a probe.
    pass(from_client(ACK, FIRST + 11, 0));
    pass(from_client(ACK | FIN, FIRST + 10, 0));
    pass(from_client(ACK, FIRST + 10, 0));
    flow.note_from_backend(&from_backend(ACK | FIN, FIRST + LEN + 11, 0), || 2);
    assert!(flow.closed());
    let last = Segment { acknowledgement: SeqNumber(8), ..from_client(ACK, FIRST + 11, 0) };
    assert_eq!(to_backend(&flow, &last), ToBackend::Shift);
}

#[test]
fn what_is_before_the_first_byte_is_known_for_good() {
    let at = |acked: u32, far: bool| {
        let mut flow = flow(&[Flag::Sent, Flag::Acknowledged]);
        flow.client.acked = FIRST + acked;
        if far {
            flow.set(Flag::Far);
        }
        flow
    };
    // The first gigabyte: by the first byte itself, whatever is sent again.
    for acked in [0, 1, 5000, (1 << 30) - 1] {
        let flow = at(acked, false);
        assert!(flow.is_before_first(FIRST - 1) && flow.is_before_first(FIRST - LEN), "{acked}");
        assert!(!flow.is_before_first(FIRST) && !flow.is_before_first(FIRST + acked), "{acked}");
        assert!(!flow.is_before_first(FIRST + ((1 << 31) - 1)), "{acked}");
    }
    // Then by the largest window, across the wrap of all numbers as well.
    for acked in [1 << 30, 1 << 31, 3 << 30, u32::MAX - 5, 0, 1000] {
        let flow = at(acked, true);
        let end = FIRST + acked;
        assert!(!flow.is_before_first(end) && !flow.is_before_first(end - (1 << 30)), "{acked}");
        assert!(flow.is_before_first(end - ((1 << 30) + 1)), "{acked}");
    }
}

#[test]
fn how_far_the_backend_has_come_is_noted() {
    let mut flow = flow(&[Flag::Sent, Flag::Acknowledged]);
    flow.client_top = FIRST + (1 << 30);
    let first = FIRST + LEN;
    for (acknowledgement, far) in
        [(first + 100, false), (first + (1 << 30) - 1, false), (first + (1 << 30), true)]
    {
        flow.note_from_backend(&from_backend(ACK, acknowledgement, 0), || 1);
        assert_eq!(flow.is(Flag::Far), far, "{acknowledgement:?}");
    }
}

fn of_client(last: u8) -> HeaderAddresses {
    let mut addresses = HeaderAddresses::default();
    addresses.bytes[3] = last;
    addresses
}

#[test]
fn a_tuple_and_its_answer() {
    let tuple = Tuple {
        source: [u32::from_ne_bytes([192, 0, 2, 1]), 0, 0, 0],
        destination: [u32::from_ne_bytes([10, 0, 0, 2]), 0, 0, 0],
        ports: Tuple::ports(40_000, 25),
        ipv6: 0,
    };
    let [client, backend] = [([192, 0, 2, 1], 40_000), ([10, 0, 0, 2], 25)]
        .map(|(ip, port)| Address::new(Address::mapped(ip), port));
    assert_eq!(tuple.read(), (client, backend));
    assert_eq!(tuple.reversed().read(), (backend, client));
    assert_eq!(tuple.reversed().reversed(), tuple);
    assert!(tuple.reversed().answers(&tuple) && !tuple.answers(&tuple));
    let words = core::array::from_fn(|at| u32::try_from(at).unwrap() << 20 | 7);
    let ipv6 = Tuple { source: words, destination: [5; 4], ipv6: 1, ..tuple };
    for at in 0..4 {
        let mut other = ipv6;
        other.destination[at] ^= 1;
        assert!(!other.reversed().answers(&ipv6) && ipv6.reversed().answers(&ipv6));
    }
    let mut key = Key::default();
    ipv6.reversed_key(&mut key);
    let mut source = Address::new([0; 16], 40_000);
    source.set(words);
    assert_eq!((key.destination, key.source.port), (source, 25));
}

#[test]
fn addresses_differ_by_any_byte() {
    for at in 0..HeaderAddresses::IPV6 {
        let mut other = HeaderAddresses::default();
        other.bytes[at] = 1;
        assert!(!other.same(&HeaderAddresses::default()) && other.same(&other), "{at}");
    }
    let other = HeaderAddresses { ipv6: 1, ..HeaderAddresses::default() };
    assert!(!other.same(&HeaderAddresses::default()));
}

fn syn(client: u8) -> Syn {
    Syn { first: FIRST, listener: 1, addresses: of_client(client) }
}

fn plain_syn() -> Segment {
    Segment { flags: SYN, sequence: FIRST - 1, ..Segment::default() }
}

#[test]
fn a_syn_is_a_connections_own_by_number_and_client() {
    let mut flow = Flow::default();
    let template = Template { len: LEN, sum: 0, waits: 1, bytes: [0; HEADER_CAPACITY] };
    flow.open(FIRST, 1, &template, 9, 5);
    assert!(flow.waits == 1 && flow.header_len == LEN && flow.offset == 9);
    flow.addresses = of_client(1);
    assert!(flow.is_of(&syn(1)));
    assert!(!flow.is_of(&Syn { first: FIRST + 1, ..syn(1) }));
    assert!(!flow.is_of(&syn(2)));
    assert!(!flow.is_of(&Syn { listener: 2, ..syn(1) }));
}

#[test]
fn a_syn_that_gets_no_answer_goes_to_the_socket() {
    let pending = |flags: &[Flag], syn_repeats| Flow {
        listener: 1,
        addresses: of_client(1),
        syn_repeats,
        ..flow(flags)
    };
    for (pending, syn, segment, expected) in [
        (None, syn(1), plain_syn(), OnSyn::Open),
        (Some(pending(&[], 0)), syn(1), plain_syn(), OnSyn::Repeat),
        (Some(pending(&[], 1)), syn(1), plain_syn(), OnSyn::Socket),
        (Some(pending(&[Flag::Accepted], 5)), syn(1), plain_syn(), OnSyn::Repeat),
        (Some(pending(&[Flag::Refused], 0)), syn(1), plain_syn(), OnSyn::Socket),
        (Some(pending(&[Flag::Refused], 9)), syn(2), plain_syn(), OnSyn::Open),
        (None, syn(1), Segment { payload: 5, ..plain_syn() }, OnSyn::Socket),
        (None, syn(1), Segment { flags: SYN | FIN, ..plain_syn() }, OnSyn::Socket),
    ] {
        assert_eq!(on_syn(pending.as_ref(), &syn, &segment), expected, "{pending:?}");
    }
}

#[test]
fn slots_live_as_long_as_their_connections() {
    use super::{Phase::*, Pressure::*};
    let timeouts = Timeouts { idle: 300, half_closed: 90, client_fin: 15 };
    let at = |phase: Phase, flags: &[Flag]| Flow { phase: phase as u64, timeouts, ..flow(flags) };
    let both = &[Flag::ClientFin, Flag::BackendFin][..];
    let client_first = &[Flag::ClientFin, Flag::ClientFirst, Flag::BackendFin][..];
    for (flow, pressure, seconds, expected) in [
        (at(Free, &[]), High, 0, None),
        (at(Pending, &[]), Low, 60, Some(Sweep::Abandon)),
        (at(Pending, &[]), Medium, 5, Some(Sweep::Abandon)),
        (at(Pending, &[Flag::Accepted]), High, 2, Some(Sweep::Abandon)),
        (at(Pending, &[Flag::Refused]), Low, 4, Some(Sweep::Abandon)),
        (at(Established, &[]), High, 300, Some(Sweep::Expire)),
        (at(Established, &[Flag::ClientFin]), High, 90, Some(Sweep::Expire)),
        (at(Established, &[Flag::BackendFin]), High, 15, Some(Sweep::Expire)),
        (at(Established, both), Low, 60, Some(Sweep::Forget)),
        (at(Established, both), Medium, 60, Some(Sweep::Forget)),
        (at(Established, both), Full, 60, Some(Sweep::Forget)),
        (at(Established, client_first), Low, 60, Some(Sweep::Forget)),
        (at(Established, client_first), Medium, 30, Some(Sweep::Forget)),
        (at(Established, client_first), High, 10, Some(Sweep::Forget)),
        (at(Established, client_first), Full, 1, Some(Sweep::Forget)),
        (at(Established, &[Flag::Superseded]), Full, 10, Some(Sweep::Forget)),
        (
            at(Established, &[Flag::Superseded, Flag::ClientFin, Flag::BackendFin]),
            Full,
            60,
            Some(Sweep::Forget),
        ),
        (at(Established, &[Flag::BackendRst]), Low, 10, Some(Sweep::Forget)),
        (at(Established, &[Flag::ClientRst, Flag::ClientFin]), Low, 10, Some(Sweep::Forget)),
    ] {
        let after = |ns| sweep(&flow, ns, pressure, pressure);
        let limit = seconds * 1_000_000_000;
        assert_eq!(after(limit), Sweep::Keep, "{flow:?}");
        if let Some(expected) = expected {
            assert_eq!(after(limit + 1), expected, "{flow:?}");
        }
    }
    assert_eq!(sweep(&at(Removed, &[]), 0, Low, Low), Sweep::Release);
    assert_eq!(sweep(&at(Established, &[Flag::Replaced]), 0, Low, Low), Sweep::Forget);
    assert_eq!(
        [0, 31, 32, 47, 48, 55, 56, 64].map(|used| Pressure::of(used, 64)),
        [Low, Low, Medium, Medium, High, High, Full, Full]
    );
}

#[test]
fn a_client_has_its_time_to_finish_once_all_of_the_backend_was_delivered() {
    // Timeouts half_closed and client_fin, whether the client has acknowledged all, and the expected timeout and whether it is
    // for the client's FIN.
    for (half_closed, client_fin, delivered, expected) in [
        (660, 15, true, (15, true)),
        (660, 15, false, (60, false)),
        (660, 300, true, (300, true)),
        (10, 15, true, (10, false)),
        (10, 15, false, (10, false)),
    ] {
        let timeouts = Timeouts { idle: 7, half_closed, client_fin };
        let mut flow = Flow { timeouts, ..flow(&[Flag::BackendFin]) };
        flow.backend.acked = if delivered { flow.backend.end } else { flow.backend.end - 1 };
        assert_eq!((flow.timeout(), flow.waits_for_client_fin()), expected, "{timeouts:?} {delivered}");
        flow.state[Flag::BackendFin as usize] = 0;
        assert_eq!((flow.timeout(), flow.waits_for_client_fin()), (7, false));
        flow.set(Flag::ClientFin);
        assert_eq!((flow.timeout(), flow.waits_for_client_fin()), (half_closed, false));
    }
}

#[test]
fn handshakes_leave_soon_if_they_take_the_room_of_connections() {
    use super::Pressure::*;
    let usage =
        |pending, established, limit| Usage { pending, established, sessions: 4, limit, ..Usage::default() };
    for (pending, established, limit, expected) in [
        (31, 0, 68, Low),
        (32, 0, 68, Medium),
        (48, 0, 68, High),
        (64, 0, 68, Full),
        // Connections leave less room.
        (16, 32, 68, Medium),
        (1, 64, 68, Full),
        (0, 200, 68, Full),
    ] {
        let usage = usage(pending, established, limit);
        assert_eq!(usage.pressure_of_handshakes(), expected, "{usage:?}");
    }
    assert!(Low < Medium && Medium < High && High < Full);
}

#[test]
fn a_limit_counts_what_all_engines_have() {
    let usage = Usage { pending: 1, established: 2, sessions: 3, limit: 7, ..Usage::default() };
    assert!(usage.has_room() && !Usage { limit: 6, ..usage }.has_room());
    assert!(!Usage { pending: u32::MAX, ..usage }.has_room());
}

#[test]
fn a_handshake_ends_with_the_backends_number_and_no_other() {
    let accepted = Flow { backend_first: SeqNumber(50), ..flow(&[Flag::Accepted]) };
    let segment = |flags, acknowledgement| Segment { flags, acknowledgement, ..Segment::default() };
    assert!(accepted.is_accepted_by(&segment(ACK, SeqNumber(50))));
    assert!(accepted.is_accepted_by(&segment(ACK | FIN, SeqNumber(50))));
    assert!(
        !accepted.is_accepted_by(&segment(ACK, SeqNumber(51)))
            && !accepted.is_accepted_by(&segment(ACK, SeqNumber(49)))
    );
    assert!(!accepted.is_accepted_by(&segment(FIN, SeqNumber(50))));
    assert!(!Flow { backend_first: SeqNumber(50), ..flow(&[]) }.is_accepted_by(&segment(ACK, SeqNumber(50))));
}

#[test]
fn a_flow_ends_by_two_fins_or_one_reset() {
    for (state, closed) in [
        (&[Flag::ClientFin][..], false),
        (&[Flag::BackendFin], false),
        (&[Flag::ClientFin, Flag::BackendFin], true),
        (&[Flag::ClientRst], true),
        (&[Flag::BackendRst], true),
    ] {
        assert_eq!(flow(state).closed(), closed, "{state:?}");
    }
}

#[test]
fn a_template_and_its_addresses_are_the_header() {
    use crate::proxy::{Addresses, Command, v2};
    for (source, destination, ipv6) in
        [("198.51.100.7:40000", "192.0.2.10:25", false), ("[2001:db8::7]:40000", "[2001:db8:1::10]:25", true)]
    {
        let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
        let mut rendered = [0; 64];
        let addresses = Command::Proxy(Addresses::new(source, destination));
        let len = v2::encode(&addresses, &[], &mut rendered).unwrap();
        let template = Template::new(&rendered[..len], ipv6, false).unwrap();
        let count = if ipv6 { HeaderAddresses::IPV6 } else { HeaderAddresses::IPV4 };
        let mut addresses = HeaderAddresses { ipv6: ipv6.into(), ..HeaderAddresses::default() };
        addresses.bytes[..count].copy_from_slice(&rendered[16..16 + count]);
        let mut again = template.bytes;
        again[16..16 + count].copy_from_slice(&addresses.bytes[..count]);
        assert_eq!(again[..len], rendered[..len]);

        let address = |address: core::net::SocketAddr| {
            let ip = match address.ip() {
                core::net::IpAddr::V4(ip) => Address::mapped(ip.octets()),
                core::net::IpAddr::V6(ip) => ip.octets(),
            };
            Address::new(ip, address.port())
        };
        assert_eq!(addresses.read(), Some((address(source), address(destination))));
    }
    assert!(Template::new(&[0; 29], false, false).is_none());
    assert!(Template::new(&[0; 24], false, false).is_none());
    assert!(Template::new(&[0; 236], false, false).is_none());
}

#[test]
fn counters_stand_at_their_index() {
    for (index, counter) in Counter::ALL.into_iter().enumerate() {
        assert_eq!(counter as usize, index);
    }
}

#[test]
fn the_documentation_lists_every_counter_and_the_sizes() {
    let document = include_str!("../../../docs/inline.md");
    for label in Counter::ALL.map(Counter::label) {
        assert!(document.contains(&std::format!("\n| `{label}` | ")), "{label} is not in docs/inline.md");
    }
    for (map, size) in [
        ("CONNECTIONS", size_of::<Flow>()),
        ("TEMPLATES", size_of::<Template>()),
        ("BACKEND_TABLES", size_of::<BackendTable>()),
        ("USAGE", size_of::<Usage>()),
    ] {
        let row = document.lines().find(|line| line.starts_with(&std::format!("| `{map}` | ")));
        let last = row.and_then(|row| row.trim_end_matches([' ', '|']).rsplit(' ').next());
        assert_eq!(last, Some(&*std::format!("{size}")), "{map}");
    }
}
