//! The maps of the splice engine, behind functions. Sizes are set by the daemon when it loads them.

use core::{
    ptr::{self, NonNull},
    sync::atomic::{Ordering, compiler_fence},
};

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, sk_action},
    btf_maps::{Array, HashMap, PerCpuArray, RingBuf, SkStorage, SockHash},
    helpers::generated::{bpf_ktime_get_ns, bpf_sk_storage_get},
    macros::btf_map,
    programs::{SkBuffContext, SkMsgContext},
};
use injector_common::{
    SeqNumber,
    splice::{BacklogEvent, Counter, Credit, Flow, Header, PeerIsn, Verdict, next_notify},
};

/// Placeholder: the daemon sets the real size from its connection limit.
const SIZED_BY_THE_DAEMON: usize = 1;

/// Backend sockets whose header has yet to go; the only map that runs `inject`.
#[btf_map]
static INJECT: SockHash<u64, SIZED_BY_THE_DAEMON> = SockHash::new();

/// The header of a backend socket; lives and dies with the socket.
#[btf_map]
static HEADERS: SkStorage<Header> = SkStorage::new();

/// Source's cookie → the socket its payload goes to. No program runs on it.
#[btf_map]
static TARGETS: SockHash<u64, SIZED_BY_THE_DAEMON> = SockHash::new();

/// Sockets that are a source; the only map that runs `verdict`.
#[btf_map]
static VERDICT: SockHash<u64, SIZED_BY_THE_DAEMON> = SockHash::new();

/// Source's cookie → what was carried.
#[btf_map]
static FLOWS: HashMap<u64, Flow, SIZED_BY_THE_DAEMON> = HashMap::new();

/// The initial sequence numbers of the peers of connecting sockets, by [`PeerIsn::index`]. The daemon
/// maps its memory.
#[btf_map]
static PEER_ISNS: Array<u64, { PeerIsn::COUNT as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Source's cookie → how far the program may go.
#[btf_map]
static CREDIT: HashMap<u64, Credit, SIZED_BY_THE_DAEMON> = HashMap::new();

/// Directions whose backlog the daemon should check. An event takes 16 bytes, and the daemon reads
/// it at once.
#[btf_map]
static BACKLOG_EVENTS: RingBuf<BacklogEvent, { 64 * 1024 }> = RingBuf::new();

/// Bytes between two events of a long stream. The daemon sets it when it loads the programs.
#[unsafe(no_mangle)]
static NOTIFY_STEP: Global<u64> = Global::new(512 * 1024);

/// One slot for each [`Counter`].
#[btf_map]
static COUNTERS: PerCpuArray<u64, { Counter::ALL.len() }> = PerCpuArray::new();

/// Counts that a program went this way.
#[inline(always)]
pub(super) fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a per-CPU slot; BPF programs are not preempted by another program of the same CPU that writes it
        // in a way that would matter for a statistic.
        unsafe { *slot += 1 };
    }
}

/// Stores the sequence number of the SYN that this socket received.
#[inline(always)]
pub(super) fn record_peer_isn(cookie: u64, sequence: u32) {
    if let Some(entry) = PEER_ISNS.get_ptr_mut(PeerIsn::index(cookie)) {
        // SAFETY: a map value stays valid while the program runs, and is aligned, so this is one store.
        unsafe { *entry = PeerIsn::new(cookie, sequence).0 };
    }
}

/// The header that waits at the socket which `message` is sent on.
#[inline(always)]
pub(super) fn header(message: &SkMsgContext) -> Option<NonNull<Header>> {
    // SAFETY: `msg` is the program's context, which the kernel keeps valid; `sk` is its own full socket, and the
    // helper checks it for null. aya-ebpf reaches storage only by a SockAddrContext, hence the raw helper.
    let value = unsafe {
        let socket = (*message.msg).__bindgen_anon_3.sk;
        if socket.is_null() {
            return None;
        }
        bpf_sk_storage_get(ptr::from_ref(&HEADERS).cast_mut().cast(), socket.cast(), ptr::null_mut(), 0)
    };
    NonNull::new(value.cast())
}

/// What was carried from the socket with this cookie.
#[inline(always)]
pub(super) fn flow(source: u64) -> Option<NonNull<Flow>> {
    FLOWS.get_ptr_mut(&source).and_then(NonNull::new)
}

/// Where payload of this source goes now, by the daemon's credit. Without a credit: to user space.
#[inline(always)]
pub(super) fn verdict(flow: NonNull<Flow>, source: u64) -> Verdict {
    // SAFETY: as in `add_redirected`. The daemon replaces a credit as a whole.
    unsafe { CREDIT.get_ptr(&source).map_or(Verdict::Pass, |credit| (*credit).verdict(flow.as_ref())) }
}

/// Counts `len` bytes as left to user space, and so all that follow; the daemon is to hear of the first.
#[inline(always)]
pub(super) fn add_passed(flow: NonNull<Flow>, len: u64) {
    // SAFETY: as in `add_redirected`.
    let flow = unsafe { &mut *flow.as_ptr() };
    flow.passed += len;
    flow.last_ns = now();
    if flow.passing == 0 {
        flow.passing = 1;
        flow.notify_at = 0;
    }
}

/// The target gets payload again; the daemon is to hear of it.
#[inline(always)]
pub(super) fn resume(flow: NonNull<Flow>) {
    // SAFETY: as in `add_redirected`.
    let flow = unsafe { &mut *flow.as_ptr() };
    // Apart, or LLVM makes them a call of memset, which loops with a variable offset: the verifier refuses that to a loader
    // without CAP_PERFMON.
    flow.passing = 0;
    compiler_fence(Ordering::SeqCst);
    flow.notify_at = 0;
}

/// `CLOCK_MONOTONIC`, in nanoseconds.
#[inline(always)]
fn now() -> u64 {
    // SAFETY: takes nothing.
    unsafe { bpf_ktime_get_ns() }
}

/// Counts `len` bytes as handed to the target.
#[inline(always)]
pub(super) fn add_redirected(flow: NonNull<Flow>, len: u64) {
    // SAFETY: a map value stays valid while the program runs. `verdict` runs under the lock of the source socket
    // (tcp_data_ready, net/ipv4/tcp_input.c), so each flow has one writer at a time and needs no atomics; the
    // daemon's look-up copies whole words.
    unsafe {
        (*flow.as_ptr()).redirected += len;
        (*flow.as_ptr()).last_ns = now();
    }
}

/// Notifies the daemon if the flow has carried so much that the target's backlog must be checked.
#[inline(always)]
pub(super) fn notify(flow: NonNull<Flow>, source: u64) {
    // SAFETY: as in `add_redirected`.
    let flow = unsafe { &mut *flow.as_ptr() };
    if flow.redirected < flow.notify_at {
        return;
    }
    if BACKLOG_EVENTS.output(BacklogEvent { source }, 0).is_err() {
        return count(Counter::NotifyFailed);
    }
    flow.notify_at =
        if flow.passing == 0 { next_notify(flow.redirected, NOTIFY_STEP.load()) } else { u64::MAX };
    count(Counter::Notified);
}

/// Counts `len` bytes as lost: the daemon is to hear of it, and resets both sides.
#[inline(always)]
pub(super) fn add_lost(flow: NonNull<Flow>, len: u64) {
    // SAFETY: as in `add_redirected`.
    let flow = unsafe { &mut *flow.as_ptr() };
    flow.lost += len;
    flow.notify_at = 0;
}

/// Whether the stream has lost something.
#[inline(always)]
pub(super) fn broken(flow: NonNull<Flow>) -> bool {
    // SAFETY: as in `add_redirected`.
    unsafe { (*flow.as_ptr()).lost > 0 }
}

/// How many bytes at the start of a segment were received before; `None` if it does not continue the stream. The next is
/// expected behind it.
#[inline(always)]
pub(super) fn repeated(flow: NonNull<Flow>, sequence: SeqNumber, len: u32) -> Option<u32> {
    // SAFETY: as in `add_redirected`.
    let flow = unsafe { &mut *flow.as_ptr() };
    let repeated = injector_common::splice::repeated(flow.next, sequence, len)?;
    flow.next = sequence + len;
    Some(repeated)
}

/// Hands the payload to the target of the source with this cookie; `false` if there is none.
#[inline(always)]
pub(super) fn redirect(payload: &SkBuffContext, source: u64) -> bool {
    TARGETS.redirect_skb(payload, source, 0) as u32 == sk_action::SK_PASS
}
