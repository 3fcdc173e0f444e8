//! Which packets are for a listener.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::bpf_fib_lookup as Lookup,
    btf_maps::{Array, HashMap},
    helpers::generated::bpf_fib_lookup,
    macros::btf_map,
    programs::XdpContext,
};
use injector_common::{
    guard::{PORT_WORDS, port_bit},
    inline::Address,
};

use super::{
    Ends, bans, fib,
    frame::{self, Frame},
    mem,
};

/// The addresses of listeners, which may be unspecified; with port 0 their hosts.
#[btf_map]
static GUARDED: HashMap<Address, u32, 4096> = HashMap::new();

/// The ports of these addresses, as bits ([`port_bit`]); 0 is one of them. Most packets are for none, and are not looked at further.
#[btf_map]
static GUARDED_PORTS: Array<u64, PORT_WORDS> = Array::new();

/// The Ethernet addresses of devices, by index.
#[btf_map]
static GUARD_DEVICES: HashMap<u32, [u16; 4], 1024> = HashMap::new();

/// Whether the frame is for its device, and not for another one behind it: a container's, or a virtual machine's.
#[inline(always)]
pub(super) fn is_own(frame: &XdpContext) -> bool {
    let Some(address) = GUARD_DEVICES.get_ptr(frame.device()) else { return false };
    // SAFETY: a map value.
    let [a, b, c, _] = unsafe { *address };
    // The destination stands first.
    frame::half(frame, 0) == Some(a) && frame::half(frame, 2) == Some(b) && frame::half(frame, 4) == Some(c)
}

/// Whether a listener has this port, at any address.
#[inline(always)]
pub(super) fn has_port(port: u16) -> bool {
    let (word, bit) = port_bit(port);
    GUARDED_PORTS.get(word).is_some_and(|word| word & bit != 0)
}

/// Whether a listener is at the packet's destination. With port 0, whether any port of its host has one.
#[inline(always)]
pub(super) fn is_at<F: Frame>(frame: &F, ends: &Ends, port: u16) -> bool {
    let mut address = MaybeUninit::<Address>::uninit();
    // SAFETY: the value's own place; zeroed, it is one.
    let address = unsafe {
        mem::zero(address.as_mut_ptr());
        address.assume_init_mut()
    };
    address.port = port;
    if !ends.ipv6 {
        address.set_mapped(0);
    }
    // A listener of all addresses: but a packet may be for another host, to which this one forwards it.
    if GUARDED.get_ptr(&*address).is_some() && !is_forwarded(frame, ends) {
        return true;
    }
    address.set(if ends.ipv6 { ends.destination } else { bans::mapped(ends.destination[0]) });
    GUARDED.get_ptr(&*address).is_some()
}

/// Whether this host would forward the packet.
#[inline(always)]
fn is_forwarded<F: Frame>(frame: &F, ends: &Ends) -> bool {
    /// A route to another host; one that tunnels; one whose neighbour is not known; one with a smaller MTU.
    const FORWARDED: [i64; 4] =
        [fib::SUCCESS, fib::UNSUPPORTED_TUNNEL, fib::NO_NEIGHBOUR, fib::FRAGMENTATION_NEEDED];

    let mut request = MaybeUninit::<Lookup>::uninit();
    let Ends { source, destination, ipv6 } = ends;
    // SAFETY: the value's own place.
    let request = unsafe { fib::request(request.as_mut_ptr(), frame.device(), source, destination, *ipv6) };
    // SAFETY: the program's own context, and a value of this size.
    let result = unsafe { bpf_fib_lookup(frame.context(), request, size_of::<Lookup>() as i32, 0) };
    FORWARDED.contains(&result)
}
