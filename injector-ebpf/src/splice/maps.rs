//! The maps of the splice engine, behind functions. The daemon sets their sizes when it loads them.

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

/// A placeholder: the daemon sets the size from its connection limit.
const SIZED_BY_THE_DAEMON: usize = 1;

/// Backend sockets whose header is not sent yet. The only map that runs `inject`.
#[btf_map]
static INJECT: SockHash<u64, SIZED_BY_THE_DAEMON> = SockHash::new();

/// The header of a backend socket. The kernel frees it with the socket.
#[btf_map]
static HEADERS: SkStorage<Header> = SkStorage::new();

/// Source's cookie → the socket that receives its payload. No program runs on this map.
#[btf_map]
static TARGETS: SockHash<u64, SIZED_BY_THE_DAEMON> = SockHash::new();

/// Source sockets. The only map that runs `verdict`.
#[btf_map]
static VERDICT: SockHash<u64, SIZED_BY_THE_DAEMON> = SockHash::new();

/// Source's cookie → the state of the direction.
#[btf_map]
static FLOWS: HashMap<u64, Flow, SIZED_BY_THE_DAEMON> = HashMap::new();

/// The initial sequence numbers of the peers of connecting sockets, by [`PeerIsn::index`]. The daemon
/// maps its memory.
#[btf_map]
static PEER_ISNS: Array<u64, { PeerIsn::COUNT as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Source's cookie → how much the program may redirect.
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

/// Increments a counter.
#[inline(always)]
pub(super) fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a per-CPU slot. A program that interrupts this one on the same CPU may lose a count,
        // which a statistic tolerates.
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

/// The header in the storage of the socket that sends `message`.
#[inline(always)]
pub(super) fn header(message: &SkMsgContext) -> Option<NonNull<Header>> {
    // SAFETY: `msg` is the program's context, which the kernel keeps valid, and `sk` is its own full
    // socket. aya-ebpf offers storage only for a SockAddrContext, so this calls the raw helper.
    let value = unsafe {
        let socket = (*message.msg).__bindgen_anon_3.sk;
        if socket.is_null() {
            return None;
        }
        bpf_sk_storage_get(ptr::from_ref(&HEADERS).cast_mut().cast(), socket.cast(), ptr::null_mut(), 0)
    };
    NonNull::new(value.cast())
}

/// The state of the direction from the socket with this cookie.
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

/// Counts `len` bytes as passed to user space, as all that follow will be. The daemon is notified of
/// the first.
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

/// Resumes redirecting to the target. The daemon is notified of it.
#[inline(always)]
pub(super) fn resume(flow: NonNull<Flow>) {
    // SAFETY: as in `add_redirected`.
    let flow = unsafe { &mut *flow.as_ptr() };
    // The fence keeps LLVM from merging the stores into a call of memset. Its loop has a variable
    // offset, which the verifier rejects for a loader without CAP_PERFMON.
    flow.passing = 0;
    compiler_fence(Ordering::SeqCst);
    flow.notify_at = 0;
}

/// `CLOCK_MONOTONIC`, in nanoseconds.
#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper has no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// Counts `len` bytes as redirected to the target.
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

/// Counts `len` bytes as lost. The daemon is notified and resets both sides.
#[inline(always)]
pub(super) fn add_lost(flow: NonNull<Flow>, len: u64) {
    // SAFETY: as in `add_redirected`.
    let flow = unsafe { &mut *flow.as_ptr() };
    flow.lost += len;
    flow.notify_at = 0;
}

/// Whether the stream has lost bytes.
#[inline(always)]
pub(super) fn broken(flow: NonNull<Flow>) -> bool {
    // SAFETY: as in `add_redirected`.
    unsafe { (*flow.as_ptr()).lost > 0 }
}

/// How many bytes at the start of a segment were received before; `None` if it does not continue the
/// stream. The next segment is expected after it.
#[inline(always)]
pub(super) fn repeated(flow: NonNull<Flow>, sequence: SeqNumber, len: u32) -> Option<u32> {
    // SAFETY: as in `add_redirected`.
    let flow = unsafe { &mut *flow.as_ptr() };
    let repeated = injector_common::splice::repeated(flow.next, sequence, len)?;
    flow.next = sequence + len;
    Some(repeated)
}

/// Redirects the payload to the target of the source with this cookie; `false` if there is no target.
#[inline(always)]
pub(super) fn redirect(payload: &SkBuffContext, source: u64) -> bool {
    TARGETS.redirect_skb(payload, source, 0) as u32 == sk_action::SK_PASS
}
