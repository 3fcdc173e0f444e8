//! The options of a SYN.

use core::ffi::c_void;

use aya_ebpf::{
    btf_maps::PerCpuArray,
    helpers::generated::{bpf_csum_diff, bpf_loop},
    macros::btf_map,
    programs::TcContext,
};
use injector_common::inline::OptionRewriter;
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use super::{
    mem,
    packet::{CHECKSUM, Failed, Packet, add_to_checksum, load_bytes, store_bytes},
};

const MAX: usize = OptionRewriter::MAX;
/// Room for what an index below 64 may reach: a mask is what the verifier follows.
const ROOM: usize = 64;

/// Where options are rewritten. All of it is in a map: what the verifier knew of a value on the stack, each round of a loop would change.
struct Options {
    rewriter: OptionRewriter,
    old: [u8; ROOM],
    new: [u8; ROOM],
}

#[btf_map]
static OPTIONS: PerCpuArray<Options, 1> = PerCpuArray::new();

#[inline(always)]
fn options() -> Option<&'static mut Options> {
    // SAFETY: a per-CPU slot; one program after the other uses it.
    OPTIONS.get_ptr_mut(0).map(|options| unsafe { &mut *options })
}

/// Takes out what no translator can carry, and offers no larger segments than packets of `mtu` bytes take.
#[inline(never)]
pub(super) fn rewrite(skb: &TcContext, packet: &Packet, mtu: u32) -> Result<(), Failed> {
    // Read anew: the verifier forgets what an earlier check has said about a number that lies in a map.
    // SAFETY: a field.
    let len = || unsafe { (&raw const packet.tcp_len).read_volatile() }.wrapping_sub(TcpHdr::LEN);
    if len() == 0 || len() > MAX {
        return Ok(());
    }
    let headers = if packet.ipv6 { Ipv6Hdr::LEN } else { Ipv4Hdr::LEN } + TcpHdr::LEN;
    let options = options().ok_or(Failed)?;
    // SAFETY: words of a map value.
    unsafe {
        mem::zero((&raw mut options.old).cast::<[u32; ROOM / 4]>());
        mem::zero((&raw mut options.new).cast::<[u32; ROOM / 4]>());
    }
    let at = packet.tcp + TcpHdr::LEN;
    load_bytes(skb, at, &mut options.old, len())?;
    options.rewriter = OptionRewriter::new(len() as u32, mtu.saturating_sub(headers as u32));
    let mut nothing = 0_u64;
    let state = (&raw mut nothing).cast();
    // SAFETY: the functions take what is on the stack, and do not read it.
    unsafe {
        bpf_loop(MAX as u32, first as *mut c_void, state, 0);
        bpf_loop(MAX as u32, second as *mut c_void, state, 0);
    }
    let (from, to) = (options.old.as_mut_ptr().cast(), options.new.as_mut_ptr().cast());
    // SAFETY: as many bytes each.
    let sum = unsafe { bpf_csum_diff(from, ROOM as u32, to, ROOM as u32, 0) } as u32;
    add_to_checksum(skb, packet.tcp + CHECKSUM, sum)?;
    store_bytes(skb, at, &options.new, len())
}

/// The first round over a byte; 0 goes on.
extern "C" fn first(at: u32, _: *mut c_void) -> i64 {
    let Some(options) = options() else { return 1 };
    let index = at as usize & (ROOM - 1);
    options.new[index] = options.rewriter.first(at, options.old[index]);
    0
}

/// The second round.
extern "C" fn second(at: u32, _: *mut c_void) -> i64 {
    let Some(options) = options() else { return 1 };
    let index = at as usize & (ROOM - 1);
    options.new[index] = options.rewriter.second(at, options.new[index]);
    0
}
