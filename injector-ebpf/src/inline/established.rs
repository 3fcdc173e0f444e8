//! Whether a connection counts as established: of its listener, of all, and of its source.

use core::intrinsics::{AtomicOrdering, atomic_xchg};

use injector_common::inline::{Counter, Event, Flag, Flow};

use super::{
    maps::{self, Count},
    source,
};

/// Has a connection count as established, or no longer; `false` if it did so before.
#[inline(always)]
pub(super) fn set_counted(flow: &mut Flow, counts: bool) -> bool {
    const RELAXED: AtomicOrdering = AtomicOrdering::Relaxed;
    // SAFETY: a word of a map value.
    let before = unsafe { atomic_xchg::<u64, RELAXED>(&raw mut flow.counted, counts.into()) };
    let changes = before != u64::from(counts);
    if changes {
        maps::change(flow.listener, Count::Established, counts);
    }
    if !counts {
        source::leave(flow);
    }
    changes
}

/// Notifies the daemon of the connection's end, once. The notification may come with a packet after the
/// last FIN: when both sides finish at the same moment, programs on two processors may each see one FIN
/// only, and the packet that acknowledges the FINs sees both.
#[inline(always)]
pub(super) fn emit_end(slot: u32, flow: &mut Flow) {
    if (flow.closed() || flow.is(Flag::Superseded)) && !flow.is(Flag::EndReported) {
        flow.set(Flag::EndReported);
        set_counted(flow, false);
        maps::count(Counter::Ended);
        maps::emit_event(Event::ENDED, slot, flow);
    }
}

/// Another connection has taken its place: nothing that its client still sends goes to the backend.
#[inline(always)]
pub(super) fn supersede(slot: u32, flow: &mut Flow) {
    if !flow.is(Flag::Superseded) {
        flow.set(Flag::Superseded);
        maps::count(Counter::Superseded);
    }
    emit_end(slot, flow);
}
