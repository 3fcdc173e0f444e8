//! `verdict`: redirects what a spliced socket receives to the other socket of its connection.

use core::ptr::NonNull;

use aya_ebpf::{
    EbpfContext as _, bindings::sk_action, helpers::generated::bpf_get_socket_cookie, macros::stream_verdict,
    programs::SkBuffContext,
};
use injector_common::{
    SeqNumber,
    splice::{Counter, Flow, Verdict},
};
use seq_macro::seq;

use super::maps;

#[stream_verdict]
fn verdict(payload: SkBuffContext) -> u32 {
    match carry(&payload) {
        Ok(counter) => {
            maps::count(counter);
            sk_action::SK_PASS
        }
        Err(counter) => {
            maps::count(counter);
            sk_action::SK_DROP
        }
    }
}

#[inline(always)]
fn carry(payload: &SkBuffContext) -> Result<Counter, Counter> {
    // The kernel runs the program for a bare FIN too. Redirecting an empty segment makes the target's
    // backlog worker fail and shut the target down (sk_psock_backlog, net/core/skmsg.c).
    let len = payload.len();
    if len == 0 {
        return Err(Counter::Empty);
    }
    // SAFETY: the program's own context.
    let source = unsafe { bpf_get_socket_cookie(payload.as_ptr()) };
    let flow = maps::flow(source).ok_or(Counter::NoFlow)?;
    if maps::broken(flow) {
        return Err(Counter::AfterLoss);
    }
    let Some(len) = cut_repeated(payload, flow, len) else {
        maps::add_lost(flow, len.into());
        maps::notify(flow, source);
        return Err(Counter::OutOfOrder);
    };
    match maps::verdict(flow, source) {
        Verdict::Redirect => {}
        Verdict::Resume => {
            maps::resume(flow);
            maps::count(Counter::Resumed);
        }
        // The payload stays with its own socket. TCP charges it to the receive buffer and closes the
        // window.
        Verdict::Pass => {
            maps::add_passed(flow, len.into());
            maps::notify(flow, source);
            return Ok(Counter::Passed);
        }
    }
    // Counted before it leaves, so the daemon never reads less than what is on its way.
    maps::add_redirected(flow, len.into());
    maps::notify(flow, source);
    if maps::redirect(payload, source) {
        return Ok(Counter::Redirected);
    }
    maps::add_lost(flow, len.into());
    maps::notify(flow, source);
    Err(Counter::NoTarget)
}

/// Removes the bytes that the segment repeats, and returns the length of the rest; `None` if it does not
/// continue the stream.
///
/// In general a program must not change a segment's length: the kernel takes the remaining length as the
/// length it has read (tcp_eat_skb, net/ipv4/tcp_bpf.c). For repeated bytes that is correct.
#[inline(always)]
fn cut_repeated(payload: &SkBuffContext, flow: NonNull<Flow>, len: u32) -> Option<u32> {
    /// The most that sk_skb_adjust_room (net/core/filter.c) removes in one call. 64 calls are enough for
    /// the largest possible segment.
    const AT_A_TIME: u32 = 0xfff;

    // The control block is TCP's own (struct tcp_skb_cb, include/net/tcp.h). It starts with the sequence
    // number.
    // SAFETY: the program's own context.
    let sequence = SeqNumber(unsafe { (*payload.skb.skb).cb[0] });
    let repeated = maps::repeated(flow, sequence, len)?;
    if repeated == 0 {
        return Some(len);
    }
    // Unrolled, with one path from a piece to the next. For a loader without CAP_PERFMON the verifier
    // also follows branches that are never taken, and rejects a loop ("The sequence of 8193 jumps is too
    // complex").
    let mut left = repeated;
    seq!(_ in 0..64 {
        if left <= AT_A_TIME {
            payload.adjust_room(-left.cast_signed(), 0, 0).ok()?;
            maps::count(Counter::Trimmed);
            return Some(len - repeated);
        }
        payload.adjust_room(-AT_A_TIME.cast_signed(), 0, 0).ok()?;
        left -= AT_A_TIME;
    });
    None
}
