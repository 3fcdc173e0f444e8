//! Asking for a route (bpf_fib_lookup).

use aya_ebpf::bindings::bpf_fib_lookup as Lookup;
use injector_common::guard::packet::TCP;

use super::mem;

/// `AF_INET`, `AF_INET6`
pub(super) const AF_INET: u8 = 2;
pub(super) const AF_INET6: u8 = 10;

/// What bpf_fib_lookup returns (enum in include/uapi/linux/bpf.h): a route; an address that is not forwarded to, local among others;
/// a route that tunnels; a route whose neighbour is not known, which bpf_redirect_neigh resolves; a route with a smaller MTU.
pub(super) const SUCCESS: i64 = 0;
pub(super) const NOT_FORWARDED: i64 = 4;
pub(super) const UNSUPPORTED_TUNNEL: i64 = 6;
pub(super) const NO_NEIGHBOUR: i64 = 7;
pub(super) const FRAGMENTATION_NEEDED: i64 = 8;

/// Fills in a request for the route of a TCP packet that has come in by this device. IPv4 addresses are in the first word.
///
/// # Safety
/// `place` must be valid for writing.
#[inline(always)]
pub(super) unsafe fn request<'a>(
    place: *mut Lookup,
    device: u32,
    source: &[u32; 4],
    destination: &[u32; 4],
    ipv6: bool,
) -> &'a mut Lookup {
    // SAFETY: by the caller; zeroed, it is a request.
    let request = unsafe {
        mem::zero(place);
        &mut *place
    };
    request.l4_protocol = TCP;
    request.ifindex = device;
    if ipv6 {
        request.family = AF_INET6;
        request.__bindgen_anon_3.ipv6_src = *source;
        request.__bindgen_anon_4.ipv6_dst = *destination;
    } else {
        request.family = AF_INET;
        request.__bindgen_anon_3.ipv4_src = source[0];
        request.__bindgen_anon_4.ipv4_dst = destination[0];
    }
    request
}
