//! What may happen: steps with numbers near those that matter.

use injector_common::inline::{ACK, FIN, PSH, RST, SYN, URG};
use proptest::prelude::*;

use super::edge::H;

/// One thing that happens.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// A client sends a SYN with one of a few numbers, so that they meet again.
    Syn { client: u8, number: u32, flags: u8, payload: u32 },
    /// The client side sends anything else.
    Client { anchor: usize, at: u32, acknowledges: Acknowledges, flags: u8, payload: u32 },
    /// The backend sends so many bytes, or a FIN.
    Say { payload: u32, fin: bool },
    /// The backend sends its last once more.
    Repeat,
    /// The backend resets the connection.
    Reset,
    /// The backend starts again.
    Reboot,
    /// Somebody sends in the backend's name.
    Forged { at: u32, acknowledges: u32, flags: u8 },
    /// Time passes.
    Wait { ms: u64 },
    /// A minute begins, by which SYN cookies count.
    Minute,
    /// Other SYNs push the one that is being opened out of its map.
    Evict,
    /// The next rewriting fails.
    Fail,
    /// What goes to the backend next is lost behind the edge.
    LoseToBackend,
    /// What the backend answers next is lost before the edge.
    LoseToEdge,
}

/// What a segment of the client side acknowledges.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Acknowledges {
    /// One of the numbers that have come from the backend, from the latest on, and as much more.
    Heard(usize, u32),
    /// Anything.
    Any(u32),
}

/// Initial sequence numbers: near each other by the header's length, and near the wrap.
pub(crate) const NUMBERS: [u32; 6] =
    [1000, 1000 + H, 1000 - H, 1001, u32::MAX - 5, (u32::MAX - 5).wrapping_add(H)];

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..3_u8, prop::sample::select(&NUMBERS[..]), syn_flags(), prop_oneof![9 => Just(0), 1 => 1..40_u32])
            .prop_map(|(client, number, flags, payload)| Step::Syn { client, number, flags, payload }),
        30 => (0..4_usize, any_offset(), any_acknowledgement(), any_flags(), any_payload()).prop_map(
            |(anchor, at, acknowledges, flags, payload)| Step::Client { anchor, at, acknowledges, flags, payload }
        ),
        5 => (1..60_u32, prop::bool::weighted(0.2)).prop_map(|(payload, fin)| Step::Say { payload, fin }),
        4 => Just(Step::Repeat),
        1 => Just(Step::Reset),
        1 => Just(Step::Reboot),
        3 => (any_offset(), any_offset(), any_flags())
            .prop_map(|(at, acknowledges, flags)| Step::Forged { at, acknowledges, flags }),
        2 => prop_oneof![Just(1), Just(600), Just(5_000), Just(31_000), Just(61_000)].prop_map(|ms| Step::Wait { ms }),
        1 => Just(Step::Minute),
        1 => Just(Step::Evict),
        1 => Just(Step::Fail),
        1 => Just(Step::LoseToBackend),
        1 => Just(Step::LoseToEdge),
    ]
}

/// A short history in which the handshake is not left to chance.
pub(crate) fn history() -> impl Strategy<Value = Vec<Step>> {
    let opening = (0..3_u8, prop::sample::select(&NUMBERS[..]), prop::bool::weighted(0.7)).prop_map(
        |(client, number, answers)| {
            let mut steps = vec![Step::Syn { client, number, flags: SYN, payload: 0 }];
            if answers {
                let acknowledges = Acknowledges::Heard(0, 0);
                steps.push(Step::Client { anchor: 0, at: 0, acknowledges, flags: ACK, payload: 0 });
            }
            steps
        },
    );
    let part = prop_oneof![1 => opening, 5 => any_step().prop_map(|step| vec![step])];
    prop::collection::vec(part, 1..40).prop_map(|parts| parts.concat())
}

/// From the client's first byte on.
fn any_offset() -> impl Strategy<Value = u32> {
    prop_oneof![
        6 => Just(0_u32),
        4 => Just(H.wrapping_neg()),
        2 => Just((H + 1).wrapping_neg()),
        2 => Just(1_u32.wrapping_neg()),
        2 => Just(H),
        2 => Just(1),
        8 => 0..80_u32,
        4 => (0..80_u32).prop_map(u32::wrapping_neg),
        1 => Just(1 << 31),
        1 => Just((1 << 31) - 1),
        1 => any::<u32>(),
    ]
}

fn any_acknowledgement() -> impl Strategy<Value = Acknowledges> {
    prop_oneof![
        8 => Just(Acknowledges::Heard(0, 0)),
        4 => (0..6_usize, prop_oneof![2 => Just(0), 1 => 0..80_u32]).prop_map(|(ago, more)| Acknowledges::Heard(ago, more)),
        1 => any::<u32>().prop_map(Acknowledges::Any),
    ]
}

fn syn_flags() -> impl Strategy<Value = u8> {
    prop_oneof![
        12 => Just(SYN),
        1 => Just(SYN | ACK),
        1 => Just(SYN | FIN),
        1 => Just(SYN | RST),
        1 => Just(SYN | URG),
        1 => Just(SYN | PSH),
    ]
}

fn any_flags() -> impl Strategy<Value = u8> {
    prop_oneof![
        6 => Just(ACK),
        6 => Just(ACK | PSH),
        2 => Just(ACK | FIN),
        2 => Just(ACK | URG),
        1 => Just(ACK | FIN | URG),
        2 => Just(RST),
        1 => Just(RST | ACK),
        2 => any::<u8>().prop_map(|flags| flags & !SYN),
    ]
}

fn any_payload() -> impl Strategy<Value = u32> {
    prop_oneof![3 => Just(0), 2 => Just(H), 1 => Just(1), 4 => 1..80_u32]
}
