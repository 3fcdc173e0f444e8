//! The maps of the inline engine, behind functions. They are pinned, and outlive the program and the daemon.

use core::{
    intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd},
    mem::MaybeUninit,
};

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, Queue, RingBuf, lpm_trie},
    helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns},
    macros::btf_map,
};
use injector_common::inline::{
    Address, Backend, BackendTable, Counter, Entry, Event, Flag, Flow, HeaderAddresses, IPV6_MIN_MTU, Key,
    Listener, MAX_BACKENDS, Phase, Settings, Template, Tuple, Usage,
};

use super::{mem, packet::Packet};

/// Placeholder: the daemon sets the real size.
const SIZED_BY_THE_DAEMON: usize = 1;

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

/// Addresses of a packet → its connection.
#[btf_map]
static FLOWS: HashMap<Key, Entry, SIZED_BY_THE_DAEMON> = HashMap::new();

/// Connections, by the indices in `FLOWS`; the first is not used. The daemon maps their memory.
#[btf_map]
static CONNECTIONS: Array<Flow, SIZED_BY_THE_DAEMON, MMAPABLE> = Array::new();

/// Indices of `CONNECTIONS` that are free.
#[btf_map]
static FREE_SLOTS: Queue<u32, SIZED_BY_THE_DAEMON> = Queue::new();

/// Listening address → listener. The address may be unspecified.
#[btf_map]
static LISTENERS: HashMap<Address, Listener, 256> = HashMap::new();

/// Headers without their addresses, by [`Template::index`].
#[btf_map]
static TEMPLATES: Array<Template, { Usage::COUNT as usize * 2 }> = Array::new();

/// Which backend each client gets.
#[btf_map]
static BACKEND_TABLES: Array<BackendTable, { BackendTable::COUNT as usize }> = Array::new();

/// Backends, by the indices in `BACKEND_TABLES`.
#[btf_map]
static BACKENDS: Array<Backend, { MAX_BACKENDS as usize }> = Array::new();

/// Addresses of this host, for connections to backends.
#[btf_map]
static SOURCES: Array<[u32; 4], { MAX_BACKENDS as usize }> = Array::new();

/// PROXY ports of backends; with port 0 their hosts.
#[btf_map]
static PROXY_PORTS: HashMap<Address, u32, { MAX_BACKENDS as usize * 2 }> = HashMap::new();

/// Networks of addresses that are no client's own: a listener's id, and an address.
#[btf_map]
static TRANSLATED_SOURCES: LpmTrie<[u32; 5], u32, 2048> = LpmTrie::new();

/// Networks from which PROXY ports may be reached through this host.
#[btf_map]
static PEERS: LpmTrie<[u8; 16], u32, 1024> = LpmTrie::new();

/// How many connections each listener has. The daemon maps their memory.
#[btf_map]
static USAGE: Array<Usage, { Usage::COUNT as usize }, MMAPABLE> = Array::new();

/// What the daemon has found out about the host.
#[btf_map]
static SETTINGS: Array<Settings, 1> = Array::new();

/// Where a packet is read into, since the stack is small: IPv4, and IPv6. Each has its own, so that what is zero in all mapped
/// addresses has not to be written (`Address::set_mapped`).
#[btf_map]
static PACKET: PerCpuArray<Packet, 2> = PerCpuArray::new();

/// Where the client's first bytes lie while the header is put in front of them.
#[btf_map]
static PAYLOAD: PerCpuArray<[u8; IPV6_MIN_MTU], 1> = PerCpuArray::new();

/// Notifies the daemon of what happened to a connection.
#[btf_map]
static EVENTS: RingBuf<Event, { 256 * 1024 }> = RingBuf::new();

/// One place for each [`Counter`].
#[btf_map]
static COUNTERS: PerCpuArray<u64, { Counter::ALL.len() }> = PerCpuArray::new();

/// `BPF_NOEXIST`
const NOEXIST: u64 = 1;

/// Counts an outcome.
#[inline(always)]
pub(super) fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a per-CPU slot, written by programs of this processor alone; a statistic.
        unsafe { *slot += 1 };
    }
}

/// `CLOCK_MONOTONIC`, in nanoseconds.
#[inline(always)]
pub(super) fn now() -> u64 {
    // SAFETY: takes nothing.
    unsafe { bpf_ktime_get_ns() }
}

/// Notes that a packet of this flow has come now, unless it has ended: then nothing prolongs it. Returns the time, to a tick.
#[inline(always)]
pub(super) fn touch(flow: &mut Flow) -> u64 {
    if flow.is(Flag::EndReported) {
        return now();
    }
    // SAFETY: takes nothing.
    let tick = unsafe { bpf_jiffies64() } as u32;
    if flow.last_tick != tick {
        flow.last_tick = tick;
        flow.last_ns = now();
    }
    flow.last_ns
}

/// Where this program reads its packet into.
#[inline(always)]
pub(super) fn packet(ipv6: bool) -> Option<&'static mut Packet> {
    // SAFETY: a per-CPU slot. Programs of this hook run with softirqs disabled, one after the other, and each asks once.
    PACKET.get_ptr_mut(ipv6.into()).map(|packet| unsafe { &mut *packet })
}

/// Where payload that moves may lie meanwhile.
#[inline(always)]
pub(super) fn payload() -> Option<&'static mut [u8; IPV6_MIN_MTU]> {
    // SAFETY: a per-CPU slot, asked for once a program.
    PAYLOAD.get_ptr_mut(0).map(|payload| unsafe { &mut *payload })
}

/// What these addresses belong to.
#[inline(always)]
pub(super) fn entry(key: &Key) -> Option<&'static mut Entry> {
    // SAFETY: a map value, valid while the program runs; its words are written at once, each by itself.
    FLOWS.get_ptr_mut(key).map(|entry| unsafe { &mut *entry })
}

/// Adds an entry; `false` if there is one, or no room.
#[inline(always)]
pub(super) fn claim(key: &Key, entry: &Entry) -> bool {
    FLOWS.insert(key, entry, NOEXIST).is_ok()
}

/// Takes a connection out of an entry, and the entry away if none is left.
#[inline(always)]
pub(super) fn leave(key: &Key, slot: u32) {
    let Some(entry) = entry(key) else { return };
    if entry.pending == slot {
        entry.pending = 0;
    }
    if entry.established == slot {
        entry.established = 0;
    }
    if entry.pending == 0 && entry.established == 0 {
        let _ = FLOWS.remove(key);
    }
}

/// The connection with this index; `None` for 0.
#[inline(always)]
pub(super) fn connection(index: u32) -> Option<&'static mut Flow> {
    if index == 0 {
        return None;
    }
    // SAFETY: a map value. Segments of one connection may be worked on by several processors: flags are only ever set, and numbers
    // that could then be off by one packet are statistics.
    CONNECTIONS.get_ptr_mut(index).map(|flow| unsafe { &mut *flow })
}

/// A free index of `CONNECTIONS`.
#[inline(always)]
pub(super) fn take_slot() -> Option<u32> {
    let slot = FREE_SLOTS.pop().ok().flatten().filter(|index| *index != 0)?;
    count_slots(1);
    Some(slot)
}

/// Makes an index free.
#[inline(always)]
pub(super) fn return_slot(index: u32) {
    count_slots(u32::MAX);
    let _ = FREE_SLOTS.push(index, 0);
}

#[inline(always)]
fn count_slots(more: u32) {
    if let Some(all) = USAGE.get_ptr_mut(Usage::ALL) {
        // SAFETY: a word of a map value.
        unsafe { add(&raw mut (*all).slots, more) };
    }
}

/// The listener at this address, or at this port of any; with whether the address is unspecified.
#[inline(always)]
pub(super) fn listener(address: &Address, ipv6: bool) -> Option<(Listener, bool)> {
    // Copied at once: the kernel uses an element again that the daemon has replaced.
    // SAFETY: map values.
    if let Some(own) = LISTENERS.get_ptr(address) {
        return Some((unsafe { *own }, false));
    }
    let mut any = MaybeUninit::<Address>::uninit();
    // SAFETY: the value's own place; zeroed, it is one.
    let any = unsafe {
        mem::zero(any.as_mut_ptr());
        any.assume_init_mut()
    };
    if !ipv6 {
        any.set_mapped(0);
    }
    any.port = address.port;
    LISTENERS.get_ptr(&*any).map(|listener| (unsafe { *listener }, true))
}

/// Whether this is the PROXY port of a backend; with port 0, whether the host has one.
#[inline(always)]
pub(super) fn is_proxy_port(address: &Address) -> bool {
    PROXY_PORTS.get_ptr(address).is_some()
}

/// Whether packets of this address may go to PROXY ports by themselves.
#[inline(always)]
pub(super) fn is_peer(address: &Address) -> bool {
    PEERS.get(&lpm_trie::Key::new(128, address.ip)).is_some()
}

/// Whether translation has put this address, as bans have it, in place of the client's. A function of its own, for its stack.
#[inline(never)]
pub(super) fn is_translated(listener: u32, source: &[u32; 4]) -> bool {
    let [a, b, c, d] = *source;
    TRANSLATED_SOURCES.get(&lpm_trie::Key::new(160, [listener, a, b, c, d])).is_some()
}

/// The header of a listener for one family.
#[inline(always)]
pub(super) fn template(listener: u32, ipv6: bool) -> Option<&'static Template> {
    let template = TEMPLATES.get(Template::index(listener, ipv6))?;
    (template.len != 0).then_some(template)
}

/// The backend of a client.
#[inline(always)]
pub(super) fn backend(table: u32, client: [u32; 4], port: u16) -> Option<&'static Backend> {
    if table == 0 {
        return None;
    }
    let table = BACKEND_TABLES.get_ptr(table)?;
    let entry = BackendTable::entry(client, port);
    // Read anew, since the compiler would take the mask out again, which the verifier needs.
    // SAFETY: our own variable.
    let entry = unsafe { (&raw const entry).read_volatile() } as usize & (BackendTable::PLACES - 1);
    // SAFETY: a map value, and a place in it.
    let index = unsafe { *(&raw const (*table).backends).cast::<u16>().add(entry) };
    BACKENDS.get(index.into())
}

/// One of the addresses of this host.
#[inline(always)]
pub(super) fn source(index: u32) -> Option<[u32; 4]> {
    SOURCES.get(index).copied()
}

/// What the daemon has found out about the host.
#[inline(always)]
pub(super) fn settings() -> Option<&'static Settings> {
    SETTINGS.get(0)
}

/// How many connections a listener has.
#[inline(always)]
pub(super) fn usage(listener: u32) -> Option<&'static Usage> {
    USAGE.get(listener)
}

/// Which number of [`Usage`] changes.
#[derive(Clone, Copy)]
pub(super) enum Count {
    Pending,
    Established,
}

/// Changes a number of this listener and of all.
#[inline(always)]
pub(super) fn change(listener: u32, which: Count, up: bool) {
    for index in [listener, Usage::ALL] {
        let Some(usage) = USAGE.get_ptr_mut(index) else { continue };
        // SAFETY: words of a map value.
        unsafe {
            let number = match which {
                Count::Pending => &raw mut (*usage).pending,
                Count::Established => &raw mut (*usage).established,
            };
            add(number, if up { 1 } else { u32::MAX });
        }
    }
}

/// Adds atomically. `core` has no such method for this target, and the instruction no result on every kernel.
///
/// # Safety
/// `to` must be a word of a map value.
#[inline(always)]
unsafe fn add(to: *mut u32, number: u32) {
    // SAFETY: by the caller.
    let _ = unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(to, number) };
}

/// Counts a connection of this listener.
#[inline(always)]
pub(super) fn accepted(listener: u32) {
    for index in [listener, Usage::ALL] {
        if let Some(usage) = USAGE.get_ptr_mut(index) {
            // SAFETY: a word of a map value.
            let _ = unsafe {
                atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*usage).accepted, 1)
            };
        }
    }
}

/// Moves a connection to another phase; `false` if it has left `from` before.
#[inline(always)]
pub(super) fn move_on(flow: &mut Flow, from: Phase, to: Phase) -> bool {
    const RELAXED: AtomicOrdering = AtomicOrdering::Relaxed;
    // SAFETY: a word of a map value.
    unsafe { atomic_cxchg::<u64, RELAXED, RELAXED>(&raw mut flow.phase, from as u64, to as u64) }.1
}

/// The key of packets in the other direction.
#[inline(always)]
pub(super) fn reversed_key<'a>(tuple: &Tuple, key: &'a mut MaybeUninit<Key>) -> &'a mut Key {
    // SAFETY: the value's own place; zeroed, it is one.
    let key = unsafe {
        mem::zero(key.as_mut_ptr());
        key.assume_init_mut()
    };
    tuple.reversed_key(key);
    key
}

/// Addresses by words, in network order.
#[inline(always)]
pub(super) fn words_mut(addresses: &mut HeaderAddresses) -> &mut [u32; HeaderAddresses::IPV6 / 4] {
    // SAFETY: as many bytes, at the start of a value that is aligned to four.
    unsafe { &mut *(&raw mut addresses.bytes).cast() }
}

/// Sends the daemon an event.
#[inline(always)]
pub(super) fn emit_event(kind: u32, slot: u32, flow: &Flow) {
    let Some(mut entry) = EVENTS.reserve(0) else { return count(Counter::EventLost) };
    entry.write(Event { kind, slot, created_ns: flow.created_ns });
    entry.submit(0);
}
