//! Limits per source: what each source has, by listener and over all of them.
//!
//! A connection counts from its SYN on. `Flow::source` has where, so that it leaves exactly once, whatever ends it.

use core::{
    ffi::c_void,
    intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd, atomic_xchg},
};

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{HashMap, LruHashMap},
    helpers::generated::bpf_loop,
    macros::btf_map,
};
use injector_common::{
    guard::{CountWord, Counted, Enter, Rate, SourceKey, SourceLimits, SourcePlaces},
    inline::{Flow, Usage},
};

use super::{bans, maps};

const SIZED_BY_THE_DAEMON: usize = 1;
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;
/// `BPF_NOEXIST`
const NOEXIST: u64 = 1;
const RELAXED: AtomicOrdering = AtomicOrdering::Relaxed;

/// How often entering is tried, while other processors change the same count or remove it.
const ATTEMPTS: u32 = 4;

/// Of how many sources the rate is remembered.
const RATES: usize = 16_384;

/// Connections of each source, as a [`CountWord`].
#[btf_map]
static SOURCE_COUNTS: HashMap<SourceKey, u64, SIZED_BY_THE_DAEMON, NO_PREALLOC> = HashMap::new();

/// Sessions of the other engines. Written by the daemon.
#[btf_map]
static SOURCE_SESSIONS: HashMap<SourceKey, u32, SIZED_BY_THE_DAEMON, NO_PREALLOC> = HashMap::new();

/// How much of its rate each source has used.
#[btf_map]
static SOURCE_RATES: LruHashMap<SourceKey, Rate, RATES> = LruHashMap::new();

/// Counts the handshake of a flow that no entry names yet; `false` if that exceeds a limit.
#[inline(always)]
pub(super) fn enter(flow: &mut Flow, own: &Usage, all: &Usage) -> bool {
    if !own.source_limits.is_set() && !all.source_limits.is_set() {
        return true;
    }
    // SAFETY: a map value.
    unsafe { source_enter(flow, Counted::Pending as u64) != 0 }
}

/// The backend has revived a connection that was taken for reset: it counts again, whatever the limits.
#[inline(always)]
pub(super) fn enter_again(flow: &mut Flow) {
    // Mapped or global.
    if flow.source_ip[2] | flow.source_ip[0] != 0 {
        // What ends it meanwhile may have found nothing to leave: the sweep does, before the slot is free.
        // SAFETY: a map value.
        unsafe { source_enter(flow, Counted::Established as u64) };
    }
}

/// Counts it; 0 if that exceeds a limit. A function that the verifier follows once, not at each call, because its linkage is global.
///
/// # Safety
/// `flow` must be null or a map value.
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn source_enter(flow: *mut Flow, what: u64) -> i64 {
    // SAFETY: by the caller.
    let Some(flow) = (unsafe { flow.as_mut() }) else { return 0 };
    enter_each(flow, what).into()
}

#[inline(always)]
fn enter_each(flow: &mut Flow, what: u64) -> bool {
    let (Some(own), Some(all)) = (maps::usage(flow.listener), maps::usage(Usage::ALL)) else { return true };
    let client = &flow.client_side.tuple.destination;
    if matches!(Counted::of(what), Counted::Pending) {
        let ipv6 = flow.client_side.tuple.ipv6 != 0;
        if bans::is_allowed(&if ipv6 { *client } else { bans::mapped(client[0]) }) {
            return true;
        }
        // Read before it is known which is needed: LLVM would join two reads into one at a variable offset.
        // SAFETY: a field of a map value.
        let mask_ipv4 = unsafe { (&raw const all.source_mask_ipv4).read_volatile() };
        flow.source_ip = if ipv6 {
            let mask = &all.source_mask_ipv6;
            [client[0] & mask[0], client[1] & mask[1], client[2] & mask[2], client[3] & mask[3]]
        } else {
            bans::mapped(client[0] & mask_ipv4)
        };
    }
    let mut key = SourceKey { ip: flow.source_ip, listener: flow.listener };
    let mut places = SourcePlaces::of(Counted::of(what));
    if own.source_limits.is_set() {
        if !count(&key, what) {
            return false;
        }
        places = places.with_own();
    }
    if all.source_limits.is_set() {
        key.listener = Usage::ALL;
        if !count(&key, what) {
            if places.has_own() {
                key.listener = flow.listener;
                uncount(&key, what);
            }
            return false;
        }
        places = places.with_all();
    }
    // SAFETY: a word of a map value.
    let before = unsafe { atomic_xchg::<u64, RELAXED>(&raw mut flow.source, places.0) };
    if before != 0 {
        // It has not yet left as what it was.
        leave_each(flow, before);
    }
    true
}

/// The connection counts no more.
#[inline(always)]
pub(super) fn leave(flow: &mut Flow) {
    if flow.source != 0 {
        // SAFETY: a map value.
        unsafe { source_leave(flow) };
    }
}

/// Counts it no more. Its linkage is global, too.
///
/// # Safety
/// `flow` must be null or a map value.
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn source_leave(flow: *mut Flow) -> i64 {
    // SAFETY: by the caller.
    let Some(flow) = (unsafe { flow.as_mut() }) else { return 0 };
    // SAFETY: a word of a map value.
    let places = unsafe { atomic_xchg::<u64, RELAXED>(&raw mut flow.source, 0) };
    leave_each(flow, places);
    0
}

#[inline(never)]
fn leave_each(flow: &Flow, places: u64) {
    let places = SourcePlaces(places);
    let what = places.what() as u64;
    let mut key = SourceKey { ip: flow.source_ip, listener: flow.listener };
    if places.has_own() {
        uncount(&key, what);
    }
    if places.has_all() {
        key.listener = Usage::ALL;
        uncount(&key, what);
    }
}

/// The client has answered the backend: its address is proven, and its rate is used.
#[inline(always)]
pub(super) fn establish(flow: &mut Flow) {
    if flow.source != 0 {
        // SAFETY: a map value.
        unsafe { source_establish(flow) };
    }
}

/// Counts it as established. Its linkage is global, too.
///
/// # Safety
/// `flow` must be null or a map value.
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn source_establish(flow: *mut Flow) -> i64 {
    // SAFETY: by the caller.
    if let Some(flow) = unsafe { flow.as_mut() } {
        establish_each(flow);
    }
    0
}

#[inline(always)]
fn establish_each(flow: &mut Flow) {
    let places = SourcePlaces(flow.source);
    let (Some(own), Some(all)) = (maps::usage(flow.listener), maps::usage(Usage::ALL)) else { return };
    let mut key = SourceKey { ip: flow.source_ip, listener: flow.listener };
    if places.has_own() {
        move_on(&key, &own.source_limits);
    }
    if places.has_all() {
        key.listener = Usage::ALL;
        move_on(&key, &all.source_limits);
    }
    flow.source = places.established().0;
}

/// Counts one more of a source, of the listener in the key or of all; `false` if it has as many as it may, or comes too fast.
#[inline(always)]
fn count(key: &SourceKey, what: u64) -> bool {
    // SAFETY: a reference.
    unsafe { source_count(key, what) != 0 }
}

/// The same. Its linkage is global, too.
///
/// # Safety
/// `key` must be null or valid.
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn source_count(key: *const SourceKey, what: u64) -> i64 {
    if key.is_null() {
        return 0;
    }
    // On this function's stack: Linux 6.1 takes no key that a global function was given.
    // SAFETY: by the caller.
    let key = unsafe { key.read_volatile() };
    let Some(usage) = maps::usage(key.listener) else { return 0 };
    count_within(&key, &usage.source_limits, what).into()
}

#[inline(always)]
fn count_within(key: &SourceKey, limits: &SourceLimits, what: u64) -> bool {
    // SAFETY: map values; a wrong one, of an element that is used again, is another moment's.
    let (sessions, rate) = unsafe {
        (SOURCE_SESSIONS.get(key).copied().unwrap_or(0), SOURCE_RATES.get(key).copied().unwrap_or_default())
    };
    let most = match limits.connections {
        0 => u32::MAX,
        _ if !matches!(Counted::of(what), Counted::Pending) => u32::MAX,
        limit => limit.saturating_sub(sessions),
    };
    let own = CountWord::of(key);
    let mut entry = Entry { key, limits, rate, own, what, most, counted: 0 };
    // SAFETY: the function gets the entry.
    unsafe { bpf_loop(ATTEMPTS, attempt as *mut c_void, (&raw mut entry).cast(), 0) };
    entry.counted != 0
}

/// A connection that is about to be counted. Small: functions that call each other have 512 bytes of stack together
/// (check_max_stack_depth, kernel/bpf/verifier.c).
struct Entry<'a> {
    key: &'a SourceKey,
    limits: &'a SourceLimits,
    rate: Rate,
    own: CountWord,
    what: u64,
    most: u32,
    /// 1 when it was.
    counted: u32,
}

/// Tries to count it; 1 if that needs not be tried again.
extern "C" fn attempt(_: u32, entry: *mut c_void) -> i64 {
    // SAFETY: the value that `count` gave.
    let entry = unsafe { &mut *entry.cast::<Entry<'_>>() };
    let what = Counted::of(entry.what);
    let handshake = matches!(what, Counted::Pending);
    if let Some(word) = SOURCE_COUNTS.get_ptr_mut(entry.key) {
        // SAFETY: a word of a map value.
        let before = CountWord(unsafe { word.read_volatile() });
        let after = match before.enter(entry.own, what, entry.most) {
            Enter::Retry => return 0,
            Enter::Full => return 1,
            Enter::Exchange(after) => after,
        };
        if handshake && entry.rate.is_exceeded(entry.limits, before.pending(), maps::now()) {
            return 1;
        }
        // SAFETY: as above.
        let exchanged = unsafe { atomic_cxchg::<u64, RELAXED, RELAXED>(word, before.0, after.0) }.1;
        entry.counted = exchanged.into();
        return exchanged.into();
    }
    if entry.most == 0 || (handshake && entry.rate.is_exceeded(entry.limits, 0, maps::now())) {
        return 1;
    }
    // Dead until it is in the map; then it is this processor's to begin.
    if SOURCE_COUNTS.insert(entry.key, &CountWord::DEAD.0, NOEXIST).is_err() {
        return 0;
    }
    if let Some(word) = SOURCE_COUNTS.get_ptr_mut(entry.key) {
        // SAFETY: as above.
        let _ = unsafe { atomic_xchg::<u64, RELAXED>(word, entry.own.with(what).0) };
        entry.counted = 1;
    }
    1
}

/// Counts one less of a source, which was counted.
#[inline(never)]
fn uncount(key: &SourceKey, what: u64) {
    let what = Counted::of(what);
    let Some(word) = SOURCE_COUNTS.get_ptr_mut(key) else { return };
    // SAFETY: a word of a map value, which stays the source's as long as something is counted.
    let _ = unsafe { atomic_xadd::<u64, u64, RELAXED>(word, CountWord::leave(what)) };
    let zero = CountWord::of(key).0;
    // By now it may be another's, whose word differs.
    // SAFETY: as above.
    let is_zero = unsafe { word.read_volatile() } == zero;
    // SAFETY: as above.
    if is_zero && unsafe { atomic_cxchg::<u64, RELAXED, RELAXED>(word, zero, CountWord::DEAD.0) }.1 {
        let _ = SOURCE_COUNTS.remove(key);
    }
}

/// A counted handshake is finished.
#[inline(never)]
fn move_on(key: &SourceKey, limits: &SourceLimits) {
    if let Some(word) = SOURCE_COUNTS.get_ptr_mut(key) {
        // SAFETY: as in `uncount`.
        let _ = unsafe { atomic_xadd::<u64, u64, RELAXED>(word, CountWord::ESTABLISH) };
    }
    if limits.burst == 0 {
        return;
    }
    let now_ns = maps::now();
    let Some(rate) = SOURCE_RATES.get_ptr_mut(key) else {
        if let Some(rate) = Rate::default().take(limits, now_ns) {
            let _ = SOURCE_RATES.insert(key, &rate, NOEXIST);
        }
        return;
    };
    // SAFETY: a word of a map value.
    let before = Rate { arrival_ns: unsafe { (&raw const (*rate).arrival_ns).read_volatile() } };
    let after = before.used(limits, now_ns);
    // What another processor has just used is not used again.
    // SAFETY: as above.
    let _ = unsafe {
        atomic_cxchg::<u64, RELAXED, RELAXED>(
            &raw mut (*rate).arrival_ns,
            before.arrival_ns,
            after.arrival_ns,
        )
    };
}
