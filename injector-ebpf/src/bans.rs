//! The maps with bans. They belong to the guard, whose daemon pins them. Engine inline asks them about a SYN; without a guard it has empty
//! ones of its own.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, lpm_trie},
    helpers::generated::bpf_ktime_get_boot_ns,
    macros::btf_map,
};
use injector_common::guard::{Ban, Counter, Listed, Settings};

/// Placeholder: the daemon sets the real size.
const SIZED_BY_THE_DAEMON: usize = 1;

/// Banned addresses: IPv6 in network order, IPv4 mapped into it.
#[btf_map]
static BANNED_ADDRESSES: HashMap<[u32; 4], Ban, SIZED_BY_THE_DAEMON, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// Banned networks.
#[btf_map]
static BANNED_NETWORKS: LpmTrie<[u32; 4], Ban, SIZED_BY_THE_DAEMON> = LpmTrie::new();

/// Networks that no ban concerns.
#[btf_map]
static GUARD_ALLOWED: LpmTrie<[u32; 4], u32, 65_536> = LpmTrie::new();

/// What need not be looked up.
#[btf_map]
static GUARD_SETTINGS: Array<Settings, 1> = Array::new();

/// One place for each [`Counter`].
#[btf_map]
static GUARD_COUNTERS: PerCpuArray<u64, { Counter::ALL.len() }> = PerCpuArray::new();

/// An IPv4 address, in network order, as bans have it.
#[inline(always)]
pub(super) const fn mapped(ip: u32) -> [u32; 4] {
    [0, 0, 0xFFFF_u32.to_be(), ip]
}

/// Counts a dropped packet.
#[inline(always)]
pub(super) fn count(counter: Counter) {
    if let Some(slot) = GUARD_COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a per-CPU slot, written by programs of this processor alone; a statistic.
        unsafe { *slot += 1 };
    }
}

/// Whether no ban and no limit concerns this source.
#[inline(always)]
pub(super) fn is_allowed(source: &[u32; 4]) -> bool {
    GUARD_ALLOWED.get(&lpm_trie::Key::new(128, *source)).is_some()
}

/// Whether anything is banned. Engine inline, which asks about SYNs alone, need not know.
#[inline(always)]
pub(super) fn is_any() -> bool {
    GUARD_SETTINGS.get(0).is_some_and(Settings::has_bans)
}

/// Of which bans a lookup tells ([`Settings::generation`]).
#[inline(always)]
pub(super) fn generation() -> u64 {
    // SAFETY: a value of the map. The daemon may write it between two reads.
    GUARD_SETTINGS.get_ptr(0).map_or(0, |settings| unsafe { settings.read_volatile() }.generation())
}

/// Whether nothing of this source may pass.
#[inline(always)]
pub(super) fn is_banned(source: &[u32; 4]) -> bool {
    // SAFETY: a reference.
    unsafe { guard_is_banned(source) != 0 }
}

/// The same; a function that the verifier follows once, not at each call, because its linkage is global.
///
/// # Safety
/// `source` must be null or valid.
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn guard_is_banned(source: *const [u32; 4]) -> i64 {
    if source.is_null() {
        return 0;
    }
    // On this function's stack: Linux 6.1 takes no key that a global function was given.
    // SAFETY: by the caller.
    let source = unsafe { source.read_volatile() };
    look_up(&source).into()
}

#[inline(always)]
fn look_up(source: &[u32; 4]) -> bool {
    let Some(settings) = GUARD_SETTINGS.get(0) else { return false };
    let mut listed = Listed::default();
    if settings.has_addresses()
        && let Some(ban) = BANNED_ADDRESSES.get_ptr(source)
    {
        // SAFETY: a word of a map value.
        listed.address_until_ns = unsafe { (*ban).until_ns };
    }
    if settings.has_networks()
        && let Some(ban) = BANNED_NETWORKS.get(&lpm_trie::Key::new(128, *source))
    {
        listed.network_until_ns = ban.until_ns;
    }
    if listed.address_until_ns == 0 && listed.network_until_ns == 0 {
        return false;
    }
    listed.allowed = is_allowed(source);
    // SAFETY: takes nothing.
    listed.is_banned(unsafe { bpf_ktime_get_boot_ns() })
}
