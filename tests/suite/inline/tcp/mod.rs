//! What TCP is made of goes through: its options, windows, ends and errors, losses in mid-stream and numbers that wrap around.

mod closes;
mod options;
mod path_mtu;
mod sequence_numbers;
mod windows;

use self::closes::{early_reset, half_close, refused, reset, same_ports, simultaneous_close};
use self::options::{sack, syn_cookies, with};
use self::path_mtu::path_mtu;
pub(crate) use self::path_mtu::{forget_path_mtu, narrow_link};
pub(crate) use self::sequence_numbers::{EDGES, begins_at, five_gibibytes};
use self::sequence_numbers::{wrap, wrap_with_loss};
use self::windows::{keepalive, zero_window};
use crate::LabRun;
use crate::wire::Way;

pub(crate) const TRIALS: &[(&str, LabRun)] = &[
    ("without timestamps", |lab, family| with(lab, family, &[("net/ipv4/tcp_timestamps", "0")])),
    ("without SACK", |lab, family| with(lab, family, &[("net/ipv4/tcp_sack", "0")])),
    ("without window scaling", |lab, family| with(lab, family, &[("net/ipv4/tcp_window_scaling", "0")])),
    ("without any option", |lab, family| {
        let off = [
            ("net/ipv4/tcp_timestamps", "0"),
            ("net/ipv4/tcp_sack", "0"),
            ("net/ipv4/tcp_window_scaling", "0"),
        ];
        with(lab, family, &off)
    }),
    ("with ECN", |lab, family| with(lab, family, &[("net/ipv4/tcp_ecn", "1")])),
    ("with SYN cookies", syn_cookies),
    ("losses in mid-stream, SACK blocks fit", sack),
    ("windows closed for a while", zero_window),
    ("half-close, the client first", |lab, family| half_close(lab, family, Way::ToBackend)),
    ("half-close, the backend first", |lab, family| half_close(lab, family, Way::ToClient)),
    ("both ends close at once", simultaneous_close),
    ("reset by the client", |lab, family| reset(lab, family, Way::ToBackend)),
    ("reset by the backend", |lab, family| reset(lab, family, Way::ToClient)),
    ("reset by the client before the header has come", early_reset),
    ("refused by the backend", refused),
    ("same ports again after a reset", |lab, family| same_ports(lab, family, true)),
    ("same ports again, TIME_WAIT at the backend", |lab, family| same_ports(lab, family, false)),
    ("keep-alive probes", keepalive),
    ("path MTU found behind the edge", path_mtu),
    ("numbers that wrap around", wrap),
    ("numbers that wrap around, header lost", wrap_with_loss),
];

const BYTES: usize = 1 << 20;
