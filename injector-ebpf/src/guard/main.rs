//! The guard: drops TCP packets of banned sources that are sent to a listener. All others go on.
//!
//! `guard` and `guard_raw` run at the ingress of devices with and without an Ethernet header, behind engine inline, which drops SYNs of
//! banned sources itself. `guard_xdp` runs before them, at the driver; what it cannot read in one piece it leaves to them.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "atomic instructions have no other name on this target")]

#[path = "../bans.rs"]
mod bans;
#[path = "../fib.rs"]
#[expect(dead_code, reason = "engine inline uses the rest")]
mod fib;
mod frame;
mod listener;
#[path = "../mem.rs"]
#[expect(dead_code, reason = "the other programs use the rest")]
mod mem;
mod not_banned;
#[path = "../object.rs"]
mod object;

use aya_ebpf::{
    bindings::xdp_action,
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use injector_common::guard::{
    Counter,
    packet::{self, Content, MAX_EXTENSIONS},
};
use network_types::eth::{EthHdr, EtherType};

use self::frame::Frame;

/// To the next program, and then on its way (`TCX_NEXT`; `TC_ACT_UNSPEC` for older kernels).
const NEXT: i32 = -1;
/// Nowhere (`TC_ACT_SHOT`, `TCX_DROP`).
const DROP: i32 = 2;

const IPV4: u16 = EtherType::Ipv4 as u16;
const IPV6: u16 = EtherType::Ipv6 as u16;
/// `ETH_P_8021Q` and `ETH_P_8021AD`, as they stand in a frame.
const VLAN: [u16; 2] = [0x8100_u16.to_be(), 0x88A8_u16.to_be()];
/// The length of a VLAN's tag.
const TAG: usize = 4;

/// 1 in the self-test, whose packets without an Ethernet header belong to no device. Set by the loader.
#[unsafe(no_mangle)]
static SELF_TEST: u32 = 0;

#[inline(always)]
fn is_self_test() -> bool {
    // SAFETY: a constant of the loaded program.
    unsafe { (&raw const SELF_TEST).read_volatile() != 0 }
}

#[classifier]
fn guard(skb: TcContext) -> i32 {
    at_ingress::<{ EthHdr::LEN }>(&skb)
}

#[classifier]
fn guard_raw(skb: TcContext) -> i32 {
    at_ingress::<0>(&skb)
}

#[xdp]
fn guard_xdp(frame: XdpContext) -> u32 {
    /// Where the Ethernet type stands.
    const TYPE: usize = 12;

    let kind = match frame::half(&frame, TYPE) {
        Some(kind) if VLAN.contains(&kind) => match frame::half(&frame, TYPE + TAG) {
            Some(kind) if VLAN.contains(&kind) => {
                let Some(kind) = frame::half(&frame, TYPE + 2 * TAG) else { return xdp_action::XDP_PASS };
                return at_driver::<{ EthHdr::LEN + 2 * TAG }>(&frame, kind);
            }
            Some(kind) => return at_driver::<{ EthHdr::LEN + TAG }>(&frame, kind),
            None => return xdp_action::XDP_PASS,
        },
        Some(kind) => kind,
        None => return xdp_action::XDP_PASS,
    };
    at_driver::<{ EthHdr::LEN }>(&frame, kind)
}

#[inline(always)]
fn at_driver<const IP: usize>(frame: &XdpContext, kind: u16) -> u32 {
    if is_banned::<_, IP>(frame, kind) && listener::is_own(frame) {
        bans::count(Counter::Xdp);
        return xdp_action::XDP_DROP;
    }
    xdp_action::XDP_PASS
}

#[inline(always)]
fn at_ingress<const IP: usize>(skb: &TcContext) -> i32 {
    /// `PACKET_HOST`: for this device, not for one that shares its wire (a bridge, macvlan).
    const FOR_THIS_DEVICE: u32 = 0;
    /// The number in a tag (`VLAN_VID_MASK`).
    const VLAN_NUMBER: u32 = 0x0FFF;

    // SAFETY: the program's own context.
    let (to, tagged, tag, kind) = unsafe {
        let skb = &*skb.skb.skb;
        (skb.pkt_type, skb.vlan_present, skb.vlan_tci, skb.protocol as u16)
    };
    let is_ours = to == FOR_THIS_DEVICE || (IP == 0 && is_self_test());
    // A tagged packet is that of the VLAN's device; without a number the tag is a priority only.
    if !is_ours || (tagged != 0 && tag & VLAN_NUMBER != 0) {
        return NEXT;
    }
    if is_banned::<_, IP>(skb, kind) {
        bans::count(Counter::Tc);
        return DROP;
    }
    NEXT
}

/// Whether this packet is a banned source's, for a listener. Its IP header begins at `IP`, and its Ethernet type is `kind`.
///
/// What tells most packets apart comes first, and needs no hash: whether anything is banned, and the port.
#[inline(always)]
fn is_banned<F: Frame, const IP: usize>(frame: &F, kind: u16) -> bool {
    if !bans::is_any() {
        return false;
    }
    match kind {
        IPV4 => {
            let Some(header) = frame::words::<F, IP, { packet::IPV4_LEN / 4 }>(frame) else { return false };
            let [first, fragment, protocol, source, destination] = header;
            let content = packet::ipv4(
                u32::from_be(first).to_be_bytes()[0],
                u32::from_be(fragment) as u16,
                (u32::from_be(protocol) >> 16) as u8,
            );
            let ends = Ends { source: [source, 0, 0, 0], destination: [destination, 0, 0, 0], ipv6: false };
            port::<F, IP, { packet::IPV4_LEN }>(frame, content).is_some_and(|port| {
                listener::has_port(port)
                    && not_banned::is_banned(&bans::mapped(source))
                    && listener::is_at(frame, &ends, port)
            })
        }
        IPV6 => {
            let Some(header) = frame::words::<F, IP, { packet::IPV6_LEN / 4 }>(frame) else { return false };
            let [_, length, s0, s1, s2, s3, d0, d1, d2, d3] = header;
            let content = packet::ipv6((u32::from_be(length) >> 8) as u8);
            let ends = Ends { source: [s0, s1, s2, s3], destination: [d0, d1, d2, d3], ipv6: true };
            port::<F, IP, { packet::IPV6_LEN }>(frame, content).is_some_and(|port| {
                listener::has_port(port)
                    && not_banned::is_banned(&ends.source)
                    && listener::is_at(frame, &ends, port)
            })
        }
        _ => false,
    }
}

/// The addresses of a packet, as they stand in it. One of IPv4 is in the first word.
struct Ends {
    source: [u32; 4],
    destination: [u32; 4],
    ipv6: bool,
}

/// The port that a packet with this content is for: 0 if it cannot be read, so that the address alone decides; `None` for what no ban
/// concerns. `LEN` is the length of an IP header without options.
#[inline(always)]
fn port<F: Frame, const IP: usize, const LEN: usize>(frame: &F, content: Content) -> Option<u16> {
    let mut content = content;
    if F::READS_ALL {
        for _ in 0..MAX_EXTENSIONS {
            let Content::Extension(kind, at) = content else { break };
            content = match frame.load::<[u8; 4]>(IP + at) {
                Some(header) => packet::extension(kind, at, header),
                None => Content::Portless,
            };
        }
    }
    match content {
        Content::Tcp(at) => match frame.port::<IP, LEN>(at) {
            Some(port) => Some(u16::from_be(port)),
            None if F::READS_ALL => Some(0),
            None => None,
        },
        Content::Portless => Some(0),
        // More than senders have.
        Content::Extension(..) if F::READS_ALL => Some(0),
        Content::Extension(..) | Content::Other => None,
    }
}
