//! Next hops.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_fib_lookup as Lookup, bpf_redir_neigh},
    btf_maps::PerCpuArray,
    helpers::generated::{bpf_check_mtu, bpf_fib_lookup, bpf_redirect_neigh, bpf_skb_change_head},
    macros::btf_map,
    programs::TcContext,
};
use injector_common::inline::{NextHop, Tuple};
use network_types::eth::EthHdr;

use super::{
    fib,
    packet::{Failed, Link},
};

/// The loopback device. Routes are looked up as for packets of the host's own sockets, which a proxy's would be: policy rules and
/// several next hops count as for those.
const LOOPBACK: u32 = 1;

/// What bpf_fib_lookup never returns.
const UNASKED: i64 = -1;

/// 1 in the self-test, which has no routes. Set by the loader.
#[unsafe(no_mangle)]
static SELF_TEST: u32 = 0;

/// Whether this is the self-test, which has neither devices nor routes.
#[inline(always)]
pub(super) fn is_self_test() -> bool {
    // SAFETY: a constant of the loaded program.
    unsafe { (&raw const SELF_TEST).read_volatile() != 0 }
}

/// Looks up the next hop; `false` if there is none. Then the old one stays as it is.
#[inline(never)]
pub(super) fn look_up(skb: &TcContext, tuple: &Tuple, hop: &mut NextHop, now_ns: u64) -> bool {
    if is_self_test() {
        let family = if tuple.ipv6 != 0 { fib::AF_INET6 } else { fib::AF_INET };
        *hop = NextHop {
            family: family.into(),
            address: tuple.destination,
            ifindex: LOOPBACK,
            mtu: 1500,
            looked_up: NextHop::clock(now_ns),
        };
        return true;
    }
    let result = ask(skb, tuple);
    if result != fib::SUCCESS && result != fib::NO_NEIGHBOUR {
        return false;
    }
    let Some(found) = LOOKUP.get(0) else { return false };
    // SAFETY: words of unions, of which all bits are valid.
    let (address, mtu) =
        unsafe { (found.__bindgen_anon_4.ipv6_dst, u32::from(found.__bindgen_anon_1.mtu_result)) };
    hop.family = found.family.into();
    if found.family == fib::AF_INET6 {
        hop.address = address;
    } else {
        hop.address[0] = address[0];
    }
    hop.ifindex = found.ifindex;
    hop.mtu = if result == fib::SUCCESS { mtu } else { device_mtu(skb, found.ifindex) };
    hop.looked_up = NextHop::clock(now_ns);
    true
}

/// Whether a packet to this address is for the host itself.
#[inline(never)]
pub(super) fn is_local(skb: &TcContext, tuple: &Tuple) -> bool {
    ask(skb, tuple) == fib::NOT_FORWARDED
}

/// Where the kernel is asked, since the stack is small.
#[btf_map]
static LOOKUP: PerCpuArray<Lookup, 1> = PerCpuArray::new();

/// Asks for a route, which is in `LOOKUP` then.
#[inline(always)]
fn ask(skb: &TcContext, tuple: &Tuple) -> i64 {
    let Some(request) = LOOKUP.get_ptr_mut(0) else { return UNASKED };
    let Tuple { source, destination, ipv6, .. } = tuple;
    // SAFETY: a per-CPU slot.
    let request = unsafe { fib::request(request, LOOPBACK, source, destination, *ipv6 != 0) };
    // A length has the kernel answer with the path's MTU.
    request.__bindgen_anon_1.tot_len = 1;
    let ports = tuple.ports.to_ne_bytes();
    request.sport = u16::from_ne_bytes([ports[0], ports[1]]);
    request.dport = u16::from_ne_bytes([ports[2], ports[3]]);
    // SAFETY: the program's own context, and a value of this size.
    unsafe { bpf_fib_lookup(skb.as_ptr(), request, size_of::<Lookup>() as i32, 0) }
}

/// The MTU of a device. Kernels that have to know the neighbour answer without one where they do not.
#[inline(always)]
fn device_mtu(skb: &TcContext, ifindex: u32) -> u32 {
    const SMALLEST: u32 = 576;

    let mut mtu = 0_u32;
    // SAFETY: the program's own context; the kernel writes to `mtu` alone.
    unsafe { bpf_check_mtu(skb.as_ptr(), ifindex, &raw mut mtu, 0, 0) };
    if mtu == 0 { SMALLEST } else { mtu }
}

/// Has the packet leave to the next hop.
#[inline(always)]
pub(super) fn leave<L: Link>(skb: &TcContext, hop: &NextHop) -> Result<i32, Failed> {
    if L::LEN == 0 {
        // The helper takes away an Ethernet header (__bpf_redirect_neigh, net/core/filter.c).
        // SAFETY: the program's own context.
        if unsafe { bpf_skb_change_head(skb.as_ptr().cast(), EthHdr::LEN as u32, 0) } != 0 {
            return Err(Failed);
        }
    }
    // SAFETY: the next hop begins as this struct does; the kernel reads it.
    let neighbour = (&raw const *hop).cast_mut().cast::<bpf_redir_neigh>();
    Ok(unsafe { bpf_redirect_neigh(hop.ifindex, neighbour, size_of::<bpf_redir_neigh>() as i32, 0) } as i32)
}

const _: () = assert!(size_of::<bpf_redir_neigh>() == 20);
