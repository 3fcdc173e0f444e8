//! `peer_isn`: records a backend's initial sequence number. Attached to a socket while it connects.
//!
//! `verdict` has to know which bytes of a segment are new. For accepted connections the daemon reads
//! the initial sequence number from the saved SYN (`TCP_SAVED_SYN`). For connections that it opens the
//! kernel has no interface to read it.

use aya_ebpf::{
    EbpfContext as _, helpers::generated::bpf_get_socket_cookie, macros::socket_filter,
    programs::SkBuffContext,
};

use super::maps;

/// The packet's whole length: the filter passes everything.
const WHOLE: i64 = u32::MAX as i64;
/// In the TCP header, where a socket filter's packet starts (sk_filter_trim_cap, net/core/filter.c).
const SEQUENCE: usize = 4;
const FLAGS: usize = 13;
const SYN: u8 = 0x02;

#[socket_filter]
fn peer_isn(segment: SkBuffContext) -> i64 {
    if segment.load::<u8>(FLAGS).is_ok_and(|flags| flags & SYN != 0)
        && let Ok(sequence) = segment.load::<u32>(SEQUENCE)
    {
        // SAFETY: the program's own context.
        let cookie = unsafe { bpf_get_socket_cookie(segment.as_ptr()) };
        maps::record_peer_isn(cookie, u32::from_be(sequence));
    }
    WHOLE
}
