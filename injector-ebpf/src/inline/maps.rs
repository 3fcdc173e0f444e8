//! The maps of the inline engine, behind functions. They are pinned, and outlive the programs and the daemon.

use core::{mem::MaybeUninit, ptr::NonNull};

use aya_ebpf::{
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
    helpers::generated::{bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_jiffies64, bpf_ktime_get_ns},
    macros::btf_map,
};
use injector_common::{
    SeqNumber,
    inline::{
        Address, ClosedFlow, Counter, Event, Flag, Flow, HeaderAddresses, IPV6_MIN_MTU, Key, Listener,
        PendingSyn, Template,
    },
};

use super::{mem, packet::Packet};

/// Placeholder: the daemon sets the real size.
const SIZED_BY_THE_DAEMON: usize = 1;

/// Listening address → listener. The address may be unspecified.
#[btf_map]
static LISTENERS: HashMap<Address, Listener, SIZED_BY_THE_DAEMON> = HashMap::new();

/// Addresses of backends; with port 0 the hosts alone.
#[btf_map]
static BACKENDS: HashMap<Address, u32, SIZED_BY_THE_DAEMON> = HashMap::new();

/// Headers without their addresses, by [`Template::index`].
#[btf_map]
static TEMPLATES: Array<Template, SIZED_BY_THE_DAEMON> = Array::new();

/// SYNs between ingress and egress, by [`PendingSyn::token`].
#[btf_map]
static SYN_CACHE: Array<PendingSyn, { PendingSyn::COUNT as usize }> = Array::new();

/// How many SYNs this processor has stored.
#[btf_map]
static SEEN: PerCpuArray<u32, 1> = PerCpuArray::new();

/// Connections whose client has not answered the backend: a flood of SYNs pushes out other SYNs only.
#[btf_map]
static PENDING: LruHashMap<Key, Flow, SIZED_BY_THE_DAEMON> = LruHashMap::new();

/// Connections.
#[btf_map]
static FLOWS: HashMap<Key, Flow, SIZED_BY_THE_DAEMON> = HashMap::new();

/// Where a flow is put together: the stack has no room for one.
#[btf_map]
static SCRATCH: PerCpuArray<Flow, 1> = PerCpuArray::new();

/// Where a packet is read into, for the same reason: IPv4, and IPv6. Each has its own, so that what is zero in all mapped
/// addresses has not to be written (`Address::set_mapped`).
#[btf_map]
static PACKET: PerCpuArray<Packet, 2> = PerCpuArray::new();

/// Where the client's first bytes lie while the header is put in front of them.
#[btf_map]
static PAYLOAD: PerCpuArray<[u8; IPV6_MIN_MTU], 1> = PerCpuArray::new();

/// Notifies the daemon of what happened to a connection.
#[btf_map]
static EVENTS: RingBuf<Event, { 1024 * 1024 }> = RingBuf::new();

/// One slot for each [`Counter`].
#[btf_map]
static COUNTERS: PerCpuArray<u64, { Counter::ALL.len() }> = PerCpuArray::new();

/// Counts that a program went this way.
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

/// Notes that a packet of this flow has come now.
#[inline(always)]
pub(super) fn touch(flow: &mut Flow) {
    // SAFETY: takes nothing.
    let tick = unsafe { bpf_jiffies64() } as u32;
    if flow.last_tick != tick {
        flow.last_tick = tick;
        flow.last_ns = now();
    }
}

/// Where this program reads its packet into.
#[inline(always)]
pub(super) fn packet(ipv6: bool) -> Option<&'static mut Packet> {
    // SAFETY: a per-CPU slot. Programs of these hooks run with softirqs disabled, one after the other, and each asks once.
    PACKET.get_ptr_mut(ipv6.into()).map(|packet| unsafe { &mut *packet })
}

/// Where payload that moves may lie meanwhile.
#[inline(always)]
pub(super) fn payload() -> Option<&'static mut [u8; IPV6_MIN_MTU]> {
    // SAFETY: a per-CPU slot, asked for once a program.
    PAYLOAD.get_ptr_mut(0).map(|payload| unsafe { &mut *payload })
}

/// The listener at this address, or at this port of any.
#[inline(always)]
pub(super) fn listener(address: &Address, ipv6: bool) -> Option<u32> {
    let own = LISTENERS.get_ptr(address).or_else(|| {
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
        LISTENERS.get_ptr(&*any)
    })?;
    // SAFETY: a map value, which the daemon writes as a whole.
    Some(unsafe { (*own).id })
}

/// Whether this is the PROXY port of a backend; with port 0, whether the host has one.
#[inline(always)]
pub(super) fn is_backend(address: &Address) -> bool {
    BACKENDS.get_ptr(address).is_some()
}

/// The header of a listener for one family.
#[inline(always)]
pub(super) fn template(listener: u32, ipv6: bool) -> Option<&'static Template> {
    let template = TEMPLATES.get(Template::index(listener, ipv6))?;
    (template.len != 0).then_some(template)
}

/// Stores a SYN and returns the token that its packet must carry.
#[inline(always)]
pub(super) fn cache_syn(sequence: SeqNumber, listener: u32, addresses: &HeaderAddresses) -> Option<u16> {
    let seen = SEEN.get_ptr_mut(0)?;
    // SAFETY: a per-CPU slot; softirqs of one processor do not interrupt each other.
    let number = unsafe {
        *seen = (*seen).wrapping_add(1);
        *seen
    };
    // SAFETY: takes nothing.
    let token = PendingSyn::token(unsafe { bpf_get_smp_processor_id() }, number);
    let slot = SYN_CACHE.get_ptr_mut(token.into())?;
    // SAFETY: a map value. Processors that share it, for there are very many, may tear it: then its SYN is dropped, or disputed.
    unsafe { &mut *slot }.store(sequence, listener, addresses, now());
    Some(token)
}

/// Takes the slot of the SYN that leaves now, with this token.
#[inline(always)]
pub(super) fn take_syn(token: u16, sequence: SeqNumber) -> Option<&'static PendingSyn> {
    // SAFETY: a map value; see `cache_syn`.
    let slot = unsafe { &mut *SYN_CACHE.get_ptr_mut(token.into())? };
    slot.take(sequence, now()).then_some(slot)
}

/// The flow of an established connection.
#[inline(always)]
pub(super) fn established(key: &Key) -> Option<NonNull<Flow>> {
    FLOWS.get_ptr_mut(key).and_then(NonNull::new)
}

/// The flow of a connection that is being opened.
#[inline(always)]
pub(super) fn pending(key: &Key) -> Option<NonNull<Flow>> {
    PENDING.get_ptr_mut(key).and_then(NonNull::new)
}

/// Begins the connection of the client in this slot, whose header will be of this template; returns its [`Flow::offset`].
#[inline(always)]
pub(super) fn open(key: &Key, slot: &PendingSyn, first: SeqNumber, template: &Template) -> Option<u32> {
    let flow = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: a per-CPU slot, not used by another program before this one ends. Zeroed, it is a flow.
    let flow = unsafe {
        mem::zero(flow);
        mem::copy(&raw mut (*flow).addresses, &raw const slot.addresses);
        &mut *flow
    };
    // SAFETY: takes nothing.
    let offset = unsafe { bpf_get_prandom_u32() };
    // Another processor may have used the slot again meanwhile: then the addresses may be another's.
    // SAFETY: fields of a map value.
    let (at_ns, sequence) =
        unsafe { ((&raw const slot.at_ns).read_volatile(), (&raw const slot.sequence).read_volatile()) };
    if at_ns != 0 || sequence + 1 != first {
        return None;
    }
    flow.open(slot, template, offset, now());
    PENDING.insert(key, flow, 0).ok().map(|()| offset)
}

/// Forgets a connection of the same addresses that was before this one.
#[inline(always)]
pub(super) fn supersede(key: &Key) {
    let _ = FLOWS.remove(key);
}

/// Forgets whatever had these addresses and ports: this host itself uses them now.
#[inline(always)]
pub(super) fn yield_to_host(key: &Key) {
    let _ = FLOWS.remove(key);
    let _ = PENDING.remove(key);
}

/// The client has answered: the flow stays until its end.
///
/// An LRU map gives an entry to another key at any moment, while a program on another processor still reads it. So it is copied, and
/// the copy counts only if the key has the same entry afterwards, by its random number: addresses of entries cannot be compared
/// without CAP_PERFMON ("pointer comparison prohibited").
#[inline(always)]
pub(super) fn establish(key: &Key, flow: NonNull<Flow>) -> Option<NonNull<Flow>> {
    let copy = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: a per-CPU slot, not used by another program before this one ends; and a map value.
    let copied = unsafe {
        mem::copy(copy, flow.as_ptr());
        &*copy
    };
    mem::compiler_barrier();
    // SAFETY: a map value, valid while the program runs.
    let still = unsafe { pending(key)?.as_ref() };
    if still.offset != copied.offset || still.created_ns != copied.created_ns {
        return None;
    }
    FLOWS.insert(key, copied, 0).ok()?;
    let _ = PENDING.remove(key);
    established(key)
}

/// Takes out a connection that has ended, unless another has its ports by now.
#[inline(always)]
pub(super) fn forget(ended: &ClosedFlow) -> bool {
    let Some(flow) = established(&ended.key) else { return false };
    // SAFETY: a map value, valid while the program runs.
    ended.may_remove(unsafe { flow.as_ref() }) && FLOWS.remove(&ended.key).is_ok()
}

/// Notifies the daemon of the connection's end, once. The notification may come with a packet after the
/// last FIN: when both sides finish at the same moment, programs on two processors may each see one FIN
/// only, and the packet that acknowledges the FINs sees both.
#[inline(always)]
pub(super) fn emit_end(key: &Key, flow: &mut Flow) {
    if flow.closed() && !flow.is(Flag::EndReported) {
        flow.set(Flag::EndReported);
        count(Counter::Ended);
        emit_event(Event::ENDED, key, flow);
    }
}

/// Sends the daemon an event.
#[inline(always)]
pub(super) fn emit_event(kind: u32, key: &Key, flow: &Flow) {
    let Some(mut entry) = EVENTS.reserve(0) else { return count(Counter::EventLost) };
    // Field by field: the stack has no room for an event.
    let event: *mut Event = entry.as_mut_ptr();
    // SAFETY: the entry is ours, and as large as an event; every field is written.
    unsafe {
        (*event).kind = kind;
        (*event).reserved = 0;
        (*event).key = *key;
        (*event).flow = *flow;
    }
    entry.submit(0);
}
