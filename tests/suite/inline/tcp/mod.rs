//! TCP features pass unchanged: options, windows, closes and errors, losses in mid-stream, and
//! sequence numbers that wrap around.

mod closes;
mod options;
mod path_mtu;
mod sequence_numbers;
mod windows;

use self::closes::{early_reset, half_close, refused, reset, same_ports, simultaneous_close};
use self::options::{sack, syn_cookies, with};
pub(crate) use self::path_mtu::{forget_path_mtu, narrow_link};
use self::path_mtu::{own_answer, path_mtu};
pub(crate) use self::sequence_numbers::{WRAPPING_ISNS, five_gibibytes, transfer_from_isn};
use self::sequence_numbers::{wrap, wrap_with_loss};
use self::windows::{keepalive, zero_window};
use crate::WireRun;
use crate::wire::Direction;

pub(crate) const TRIALS: &[(&str, WireRun)] = &[
    ("without timestamps", |testbed, family| with(testbed, family, &[("net/ipv4/tcp_timestamps", "0")])),
    ("without SACK", |testbed, family| with(testbed, family, &[("net/ipv4/tcp_sack", "0")])),
    ("without window scaling", |testbed, family| {
        with(testbed, family, &[("net/ipv4/tcp_window_scaling", "0")])
    }),
    ("without any option", |testbed, family| {
        let off = [
            ("net/ipv4/tcp_timestamps", "0"),
            ("net/ipv4/tcp_sack", "0"),
            ("net/ipv4/tcp_window_scaling", "0"),
        ];
        with(testbed, family, &off)
    }),
    ("with ECN", |testbed, family| with(testbed, family, &[("net/ipv4/tcp_ecn", "1")])),
    ("with SYN cookies", syn_cookies),
    ("losses in mid-stream, SACK blocks are valid", sack),
    ("zero windows", zero_window),
    ("half-close, the client first", |testbed, family| half_close(testbed, family, Direction::ToBackend)),
    ("half-close, the backend first", |testbed, family| half_close(testbed, family, Direction::ToClient)),
    ("both ends close at once", simultaneous_close),
    ("reset by the client", |testbed, family| reset(testbed, family, Direction::ToBackend)),
    ("reset by the backend", |testbed, family| reset(testbed, family, Direction::ToClient)),
    ("reset by the client before the header arrived", early_reset),
    ("refused by the backend", refused),
    ("ports reused after a reset", |testbed, family| same_ports(testbed, family, true)),
    ("ports reused, TIME_WAIT at the backend", |testbed, family| same_ports(testbed, family, false)),
    ("keep-alive probes", keepalive),
    ("path MTU discovery behind the edge", |testbed, family| path_mtu(testbed, family, Direction::ToBackend)),
    ("path MTU discovery in front of the client", |testbed, family| {
        path_mtu(testbed, family, Direction::ToClient)
    }),
    ("a packet too long for the backend's link", |testbed, family| {
        own_answer(testbed, family, Direction::ToBackend)
    }),
    ("a packet too long for the client's link", |testbed, family| {
        own_answer(testbed, family, Direction::ToClient)
    }),
    ("sequence numbers wrap around", wrap),
    ("sequence numbers wrap around, header lost", wrap_with_loss),
];

const BYTES: usize = 1 << 20;
