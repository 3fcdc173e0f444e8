//! `anchor`: where a backend's stream begins. On a socket that connects, until it is connected.
//!
//! `verdict` has to know which bytes of a segment are new, and the kernel tells nobody the sequence number at which a
//! connection that it opened begins: of accepted ones the saved SYN has it (`TCP_SAVED_SYN`).

use aya_ebpf::{
    EbpfContext as _, helpers::generated::bpf_get_socket_cookie, macros::socket_filter,
    programs::SkBuffContext,
};

use super::maps;

/// Passes everything.
const WHOLE: i64 = u32::MAX as i64;
/// In the TCP header, where a socket filter's packet starts (sk_filter_trim_cap, net/core/filter.c).
const SEQUENCE: usize = 4;
const FLAGS: usize = 13;
const SYN: u8 = 0x02;

#[socket_filter]
fn anchor(segment: SkBuffContext) -> i64 {
    if segment.load::<u8>(FLAGS).is_ok_and(|flags| flags & SYN != 0)
        && let Ok(sequence) = segment.load::<u32>(SEQUENCE)
    {
        // SAFETY: the program's own context.
        let cookie = unsafe { bpf_get_socket_cookie(segment.as_ptr()) };
        maps::set_anchor(cookie, u32::from_be(sequence));
    }
    WHOLE
}
