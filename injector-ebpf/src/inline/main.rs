//! The inline engine: `client_in` remembers who sends a SYN, `backend_out` opens the flow, adds the header and shifts what the
//! client sends, `backend_in` shifts what the backend acknowledges and gives it the header again if it was lost; `sweep` takes
//! out what has ended.
//!
//! Decisions are in `injector_common::inline`; here they are carried out. Each program of a device exists twice: for devices
//! with an Ethernet header, and for those without (`…_raw`).
#![no_std]
#![no_main]

#[path = "../object.rs"]
mod object;

mod backend_in;
mod backend_out;
mod client_in;
mod header;
mod maps;
mod mem;
mod packet;
mod sweep;

/// To the next program, and then on its way (`TCX_NEXT`; `TC_ACT_UNSPEC` for older kernels).
const NEXT: i32 = -1;
/// Nowhere (`TC_ACT_SHOT`, `TCX_DROP`).
const DROP: i32 = 2;

/// `skb->mark` of a retransmitted header on its way to the egress of the device by which the backend's
/// segment came. Its sequence numbers are already rewritten.
const MARK_RETRANSMIT: u32 = 0x1A9E_C70F;

/// `skb->mark` of a copy of the client's first segment, whose payload the header replaces.
const MARK_HEADER_COPY: u32 = 0x1A9E_C710;
