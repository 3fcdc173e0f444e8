//! Takes what is over out of the maps, by a timer of the kernel's: no daemon is needed. It walks through `CONNECTIONS` about once a
//! second, a part of it at a time.

use core::{ffi::c_void, mem::MaybeUninit};

use aya_ebpf::{
    bindings::bpf_timer,
    btf_maps::Array,
    helpers::generated::{
        bpf_loop, bpf_timer_cancel, bpf_timer_init, bpf_timer_set_callback, bpf_timer_start,
    },
    macros::{btf_map, classifier},
    programs::TcContext,
};
use injector_common::inline::{
    Counter, Event, Flag, Flow, Key, Phase, Pressure, Settings, Sweep, Usage, sweep,
};

use super::{established, maps, maps::Count, source};

/// How many are looked at each time.
const PART: u32 = 2048;
/// How often all of them are looked at.
const ROUND_NS: u64 = 1_000_000_000;
const CLOCK_MONOTONIC: u64 = 1;
const EBUSY: i64 = -16;

/// The kernel knows the timer by the name of its type.
#[repr(C)]
struct Timer {
    timer: bpf_timer,
    /// The next index to look at.
    next: u32,
    reserved: u32,
}

#[btf_map]
static TIMER: Array<Timer, 1> = Array::new();

/// One part of a round.
struct Part {
    first: u32,
    now_ns: u64,
    opening: Pressure,
    slots: Pressure,
}

/// Starts the timer, or has it go on with this program's function. Run by the daemon (`BPF_PROG_TEST_RUN`).
#[classifier]
fn start_sweep(_: TcContext) -> i32 {
    let Some(timer) = TIMER.get_ptr_mut(0) else { return -1 };
    // SAFETY: a map value, and its map.
    unsafe {
        let timer = &raw mut (*timer).timer;
        // An earlier daemon may have done that.
        if bpf_timer_init(timer, (&raw const TIMER).cast_mut().cast(), CLOCK_MONOTONIC) == EBUSY {
            bpf_timer_cancel(timer);
        }
        let set = bpf_timer_set_callback(timer, tick as *mut c_void);
        if set != 0 {
            return set as i32;
        }
        bpf_timer_start(timer, 0, 0) as i32
    }
}

extern "C" fn tick(_map: *mut c_void, _key: *mut u32, timer: *mut Timer) -> i32 {
    // SAFETY: the kernel gives the map value that the timer is in.
    let timer = unsafe { &mut *timer };
    let mut wait_ns = ROUND_NS;
    if let (Some(settings), Some(all)) = (maps::settings(), maps::usage(Usage::ALL)) {
        let first = if timer.next < settings.slots { timer.next } else { 0 };
        let mut part = Part {
            first,
            now_ns: maps::now(),
            opening: Pressure::of(all.pending, settings.max_pending).max(all.pressure_of_handshakes()),
            slots: Pressure::of(all.slots, settings.slots),
        };
        // SAFETY: the function gets this value back.
        unsafe { bpf_loop(PART, visit as *mut c_void, (&raw mut part).cast(), 0) };
        timer.next = first + PART;
        wait_ns = ROUND_NS / u64::from(rounds(settings));
    }
    // SAFETY: our own timer.
    unsafe { bpf_timer_start(&raw mut timer.timer, wait_ns, 0) };
    0
}

/// How many parts a round has.
#[inline(always)]
fn rounds(settings: &Settings) -> u32 {
    settings.slots / PART + 1
}

/// One slot; 0 goes on.
extern "C" fn visit(index: u32, part: *mut c_void) -> i64 {
    // SAFETY: the value that `tick` gave.
    let part = unsafe { &*part.cast::<Part>() };
    let slot = part.first + index;
    let Some(flow) = maps::connection(slot) else { return 0 };
    match sweep(flow, part.now_ns, opening(flow, part), part.slots) {
        Sweep::Keep => {}
        Sweep::Release => {
            // A packet that was under way may have had it count again.
            established::set_counted(flow, false);
            flow.phase = Phase::Free as u64;
            maps::return_slot(slot);
        }
        Sweep::Abandon => {
            if maps::move_on(flow, Phase::Pending, Phase::Removed) {
                maps::change(flow.listener, Count::Pending, false);
                source::leave(flow);
                maps::count(Counter::Abandoned);
                remove(slot, flow);
            }
        }
        Sweep::Forget => {
            if maps::move_on(flow, Phase::Established, Phase::Removed) {
                established::set_counted(flow, false);
                remove(slot, flow);
            }
        }
        Sweep::Expire => {
            if maps::move_on(flow, Phase::Established, Phase::Removed) {
                flow.set(Flag::Expired);
                established::set_counted(flow, false);
                maps::count(Counter::Expired);
                maps::emit_event(Event::EXPIRED, slot, flow);
                remove(slot, flow);
            }
        }
    }
    0
}

/// The pressure on a handshake: that on its listener may be higher than that on all.
#[inline(always)]
fn opening(flow: &Flow, part: &Part) -> Pressure {
    match maps::usage(flow.listener) {
        Some(usage) if flow.phase == Phase::Pending as u64 => {
            part.opening.max(usage.pressure_of_handshakes())
        }
        _ => part.opening,
    }
}

/// Takes a connection out of `FLOWS`. Its slot becomes free in the next round.
#[inline(always)]
fn remove(slot: u32, flow: &Flow) {
    for tuple in [&flow.client_side.tuple, &flow.backend_side.tuple] {
        let mut key = MaybeUninit::<Key>::uninit();
        maps::leave(maps::reversed_key(tuple, &mut key), slot);
    }
}
