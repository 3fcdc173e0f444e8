//! The properties themselves.

use injector_common::{
    SeqNumber,
    inline::{ACK, FIN, Flag, Flow, SYN, Segment, SeqState, payload_len},
};
use proptest::prelude::*;

use crate::segments::{NUMBERS, history};
use crate::testbed::{Testbed, prop_assert_that};

/// Histories to a property; `PROPTEST_CASES` asks for others.
fn cases() -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: asked.unwrap_or(1500),
        max_shrink_iters: 20_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases())]

    /// P1, P2, P5, P6: `Testbed::step` checks them after every segment.
    #[test]
    fn the_header_is_this_connections_or_nothing(
        steps in history(), waits: bool, cookies: bool, seed in 1..u32::MAX
    ) {
        let mut testbed = Testbed::new(waits, cookies, seed);
        for step in &steps {
            testbed.step(step)?;
        }
    }

    /// P3: no history decides about a new connection, not even one of the same numbers.
    #[test]
    fn a_syn_opens_anew(
        steps in history(), waits: bool, cookies: bool, seed in 1..u32::MAX,
        number in prop_oneof![prop::sample::select(&NUMBERS[..]), any::<u32>()]
    ) {
        let mut testbed = Testbed::new(waits, cookies, seed);
        for step in &steps {
            testbed.step(step)?;
        }
        testbed.newcomer_is_served(number)?;
    }

    /// A backend in TIME_WAIT takes a SYN only if its number is behind all that it has acknowledged (RFC 9293, section 3.6.1).
    #[test]
    fn a_connection_from_the_same_port_begins_behind_the_earlier_one(
        earlier in (any::<u32>(), any::<u32>(), 28_u32..232, 0_u32..1 << 30),
        later in (any::<u32>(), any::<u32>()),
    ) {
        let (first, offset, header_len, sent) = earlier;
        let earlier = Flow {
            first: SeqNumber(first),
            client_top: SeqNumber(first) + sent,
            offset,
            header_len,
            ..Flow::default()
        };
        let (first, offset) = later;
        let mut later = Flow { first: SeqNumber(first), offset, ..Flow::default() };
        later.follow(&earlier);
        let received = earlier.client_top + earlier.shift();
        let ahead = (later.first + later.offset) - received;
        prop_assert!((1..=1 << 30).contains(&ahead), "{ahead} ahead");
    }

    /// P5: a sender that does not know the numbers neither ends a connection nor moves what the end is judged by.
    #[test]
    fn who_does_not_know_the_numbers_ends_nothing(
        first: u32, sent in 0..5000_u32, acked in 0..5000_u32, segments in prop::collection::vec(stray(), 1..20)
    ) {
        let first = SeqNumber(first);
        let mut flow = Flow { first, client: SeqState::new(first), backend: SeqState::new(SeqNumber(7)), ..Flow::default() };
        flow.client.note_sent(&Segment { flags: ACK, sequence: first, payload: sent, ..Segment::default() }, true);
        flow.client.note_acked(first + acked.min(sent));
        let before = (flow.client.end, flow.client.acked, flow.backend.end);
        for (from, segment) in segments {
            // Beyond what is known, by whatever number.
            let sequence = flow.client.end + 1 + from % (u32::MAX - sent - 1);
            flow.note_from_client(&Segment { sequence, ..segment }, || 1);
            prop_assert!(!flow.closed() && !flow.is(Flag::ClientFin), "{flow:?}");
            prop_assert_eq!((flow.client.end, flow.client.acked, flow.backend.end), before);
        }
    }

    /// P5: what the backend sends after an end revives the entry, once what was under way has passed.
    #[test]
    fn traffic_after_a_reset_revives(segment in stray(), by_client: bool, after_ms in 0..5000_u64) {
        let mut flow = Flow { client: SeqState::new(SeqNumber(5)), backend: SeqState::new(SeqNumber(7)), ..Flow::default() };
        let reset = |sequence| Segment { flags: injector_common::inline::RST, sequence, ..Segment::default() };
        if by_client { flow.note_from_client(&reset(SeqNumber(5)), || 1) } else { flow.note_from_backend(&reset(SeqNumber(7)), || 1) }
        prop_assert!(flow.closed());
        let segment = Segment { flags: segment.1.flags & !injector_common::inline::RST, ..segment.1 };
        flow.note_from_backend(&segment, || 1 + after_ms * 1_000_000);
        prop_assert_eq!(flow.is_reset(), after_ms < 1000);
    }

    /// P5: a connection that both sides have finished is known as finished, in whatever order their segments come and are
    /// acknowledged.
    #[test]
    fn two_fins_end_a_connection(first: u32, pieces in prop::collection::vec(1..2000_u32, 0..12), order: u64) {
        let first = SeqNumber(first);
        let mut flow = Flow { first, client: SeqState::new(first), backend: SeqState::new(SeqNumber(7)), ..Flow::default() };
        flow.set(Flag::Sent);
        flow.set(Flag::Acknowledged);
        let mut next = first;
        let mut segments: Vec<_> = pieces.iter().map(|payload| {
            let segment = Segment { flags: ACK, sequence: next, payload: *payload, acknowledgement: SeqNumber(7), window: 1 };
            next = next + *payload;
            segment
        }).collect();
        segments.push(Segment { flags: ACK | FIN, sequence: next, payload: 0, acknowledgement: SeqNumber(7), window: 1 });
        let fin = next + 1;
        shuffle(&mut segments, order);
        segments.iter().for_each(|segment| flow.note_from_client(segment, || 1));
        // The backend acknowledges all of it with its own FIN.
        let last = Segment { flags: ACK | FIN, sequence: SeqNumber(7), acknowledgement: fin, payload: 0, window: 1 };
        flow.note_from_backend(&last, || 1);
        prop_assert!(flow.closed(), "{flow:?}");
    }

    /// P7: the length comes from IP, whatever the frame has behind the packet; and what is not whole has none.
    #[test]
    fn the_length_is_that_of_ip(headers in 40..=120_u32, payload in 0..65_000_u32, padding in 0..46_u32, cut in 1..200_u32) {
        let total = headers + payload;
        prop_assert_eq!(payload_len(total, headers, total + padding, false), Some(payload));
        prop_assert_eq!(payload_len(total, headers, total - cut.min(total), false), None);
        prop_assert_eq!(payload_len(headers - cut.min(headers), headers, total + padding, false), None);
        // BIG TCP: no length fits into the header.
        prop_assert_eq!(payload_len(0, headers, total, true), Some(payload));
    }
}

fn stray() -> impl Strategy<Value = (u32, Segment)> {
    (any::<u32>(), any::<u8>(), any::<u32>(), 0..3000_u32).prop_map(
        |(from, flags, acknowledgement, payload)| {
            (
                from,
                Segment {
                    flags: flags & !SYN,
                    sequence: SeqNumber(from),
                    acknowledgement: SeqNumber(acknowledgement),
                    payload,
                    window: 1,
                },
            )
        },
    )
}

fn shuffle(segments: &mut [Segment], mut order: u64) {
    for at in (1..segments.len()).rev() {
        order = order.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        segments.swap(at, (order >> 33) as usize % (at + 1));
    }
}

/// The model itself: without anything strange a connection is served, and its reset is one.
#[test]
fn a_plain_connection_is_served() {
    for (waits, cookies) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut testbed = Testbed::new(waits, cookies, 7);
        testbed.newcomer_is_served(1000).unwrap();
        let connection = testbed.backend.open_connection().unwrap();
        let sequence = SeqNumber(1001 + u32::try_from(connection.read.len()).unwrap() - 28);
        let flags = injector_common::inline::RST;
        testbed.client(&Segment { flags, sequence, ..Segment::default() }).unwrap();
        assert!(testbed.backend.open_connection().is_none() && testbed.edge.reported.len() == 1);
        prop_assert_that(testbed.edge.reported[0].is(Flag::ClientRst), String::new).unwrap();
    }
}

/// The steps reach what they are for: established connections with bytes behind the header, resets, and answers.
#[test]
fn histories_go_somewhere() {
    use proptest::strategy::ValueTree as _;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let (mut connections, mut with_header, mut with_bytes, mut ended) = (0, 0, 0, 0);
    for seed in 1..500 {
        let steps = history().new_tree(&mut runner).unwrap().current();
        let mut testbed = Testbed::new(seed % 2 == 0, seed % 3 == 0, seed);
        steps.iter().try_for_each(|step| testbed.step(step)).unwrap();
        connections += testbed.backend.connections.len();
        with_header += testbed.backend.connections.iter().filter(|one| !one.read.is_empty()).count();
        with_bytes += testbed.backend.connections.iter().filter(|one| one.read.len() > 28).count();
        ended += testbed.edge.reported.len();
    }
    println!(
        "{connections} connections, {with_header} with a header, {with_bytes} with bytes, {ended} ended"
    );
    assert!(connections > 250 && with_header > 200 && with_bytes > 40 && ended > 60);
}
