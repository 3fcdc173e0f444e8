//! Remembers which sources are not banned: two lookups in large tables for the first packet of a session, none for those after it.

use core::intrinsics::{AtomicOrdering, atomic_xchg};

use aya_ebpf::{btf_maps::PerCpuArray, macros::btf_map};
use injector_common::guard::{NOT_BANNED_SLOTS, NotBanned};

use super::bans;

#[btf_map]
static NOT_BANNED: PerCpuArray<NotBanned, NOT_BANNED_SLOTS> = PerCpuArray::new();

/// As [`bans::is_banned`].
#[inline(always)]
pub(super) fn is_banned(source: &[u32; 4]) -> bool {
    let halves = halves(source);
    let Some(entry) = NOT_BANNED.get_ptr_mut(NotBanned::slot(halves)) else { return bans::is_banned(source) };
    let generation = bans::generation();
    // SAFETY: a value of the map.
    if unsafe { entry.read_volatile() }.holds(halves, generation) {
        return false;
    }
    // Orders memory: the tables are not read before the generation. A ban that is written after they were has another one.
    // SAFETY: a value of the map.
    unsafe { atomic_xchg::<u64, { AtomicOrdering::SeqCst }>(&raw mut (*entry).tag, 0) };
    if bans::is_banned(source) {
        return true;
    }
    // The first time, half of it may have been written.
    if bans::generation() == generation {
        // SAFETY: a value of the map.
        unsafe { entry.write_volatile(NotBanned::new(halves, generation)) };
    }
    false
}

#[inline(always)]
const fn halves(source: &[u32; 4]) -> [u64; 2] {
    let [a, b, c, d] = *source;
    [(a as u64) << 32 | b as u64, (c as u64) << 32 | d as u64]
}
