//! `verdict`: hands what a spliced socket receives to the other socket of its connection.

use aya_ebpf::{
    EbpfContext as _, bindings::sk_action, helpers::generated::bpf_get_socket_cookie, macros::stream_verdict,
    programs::SkBuffContext,
};
use injector_common::splice::Counter;

use super::maps;

#[stream_verdict]
fn verdict(payload: SkBuffContext) -> u32 {
    match carry(&payload) {
        Ok(way) => {
            maps::count(way);
            sk_action::SK_PASS
        }
        Err(way) => {
            maps::count(way);
            sk_action::SK_DROP
        }
    }
}

#[inline(always)]
fn carry(payload: &SkBuffContext) -> Result<Counter, Counter> {
    // The kernel runs the program for a bare FIN too. Redirecting nothing makes the target's backlog worker fail
    // and declare the target dead (sk_psock_backlog, net/core/skmsg.c).
    let len = payload.len();
    if len == 0 {
        return Err(Counter::Empty);
    }
    // SAFETY: the program's own context.
    let source = unsafe { bpf_get_socket_cookie(payload.as_ptr()) };
    let flow = maps::flow(source).ok_or(Counter::NoFlow)?;
    // Left to the socket itself: it is charged to its receive buffer there, so that TCP closes the window.
    if maps::passes(flow, source) {
        maps::ring(flow, source);
        return Ok(Counter::Passed);
    }
    // Counted before it leaves: whoever reads the count never sees less than what is under way.
    maps::add_redirected(flow, len.into());
    maps::ring(flow, source);
    if maps::redirect(payload, source) {
        return Ok(Counter::Redirected);
    }
    maps::add_lost(flow, len.into());
    Err(Counter::NoTarget)
}
