//! `inject`: the PROXY header in front of the first bytes that the backend will read.
//!
//! Fail closed: every way out that did not place the whole header is `SK_DROP`, which the daemon's `send` sees as
//! `EACCES`. The backend must never read a byte without its header.

use core::ptr::{self, NonNull};

use aya_ebpf::{
    bindings::sk_action, helpers::generated::bpf_msg_apply_bytes, macros::sk_msg, programs::SkMsgContext,
};
use aya_log_ebpf::warn;
use injector_common::splice::{Counter, HEADER_CAPACITY, Header};
use seq_macro::seq;

use super::maps;

#[sk_msg]
fn inject(message: SkMsgContext) -> u32 {
    match push_header(&message) {
        Ok(counter) => {
            maps::count(counter);
            sk_action::SK_PASS
        }
        Err(counter) => {
            maps::count(counter);
            log_drop(&message, counter);
            sk_action::SK_DROP
        }
    }
}

/// Logs why a message was dropped.
///
/// One function per reason keeps each name's length constant. A name of variable length makes the
/// verifier reject the program for a loader without CAP_PERFMON ("pointer arithmetic with it prohibited
/// for !root").
#[inline(always)]
fn log_drop(message: &SkMsgContext, counter: Counter) {
    let size = message.size();
    match counter {
        Counter::NoHeader => log::<{ Counter::NoHeader as u32 }>(size),
        Counter::BadHeader => log::<{ Counter::BadHeader as u32 }>(size),
        Counter::PushFailed => log::<{ Counter::PushFailed as u32 }>(size),
        Counter::ShortPush => log::<{ Counter::ShortPush as u32 }>(size),
        _ => log::<{ Counter::PopFailed as u32 }>(size),
    }
}

#[inline(never)]
fn log<const COUNTER: u32>(size: u32) {
    let reason = const { Counter::ALL[COUNTER as usize].as_str() };
    warn!(&(), "header not sent ({}): message of {} bytes dropped", reason, size);
}

#[inline(always)]
fn push_header(message: &SkMsgContext) -> Result<Counter, Counter> {
    let header = maps::header(message).ok_or(Counter::NoHeader)?;
    // SAFETY: the storage of a socket that is sending; this program is its only writer while the state is ARMED,
    // and sends of one socket are serialised by the socket lock.
    let (state, len, doorbell) = unsafe {
        let header = header.as_ref();
        (header.state, header.len, header.doorbell)
    };
    if state == Header::SENT {
        return Ok(Counter::AfterHeader);
    }
    if !(Header::SHORTEST as u32..=HEADER_CAPACITY as u32).contains(&len) {
        return Err(Counter::BadHeader);
    }

    message.push_data(0, len, 0).map_err(|_| Counter::PushFailed)?;
    copy(message, header)?;
    if doorbell != 0 {
        message.pop_data(len, doorbell, 0).map_err(|_| Counter::PopFailed)?;
    }

    // SAFETY: as above.
    unsafe { (*header.as_ptr()).state = Header::SENT };
    // The rest of this message, and the next 4 GiB, need no program: the socket leaves the map before that.
    // SAFETY: the program's own context.
    unsafe { bpf_msg_apply_bytes(message.msg, u32::MAX) };
    Ok(if doorbell == 0 { Counter::HeaderBeforePayload } else { Counter::HeaderAlone })
}

/// Fills the room in front of the message.
///
/// Every offset is a constant, and the loop written out: without CAP_PERFMON the verifier allows no variable offset into
/// a message ("pointer arithmetic with it prohibited for !root", sanitize_ptr_alu, kernel/bpf/verifier.c). In words, for
/// byte by byte it walks ten times as many instructions. The page behind the room is not zeroed (`bpf_msg_push_data`,
/// net/core/filter.c), so every byte is written.
#[inline(always)]
fn copy(message: &SkMsgContext, header: NonNull<Header>) -> Result<(), Counter> {
    // Read anew: the push has moved both.
    let (room, end) = (message.data(), message.data_end());
    // `len` is read once more, and volatile: knowing its range, the compiler drops the bounds that the verifier needs.
    // SAFETY: both lie within the map value.
    let (bytes, len) = unsafe {
        let header = header.as_ptr();
        let len = ptr::read_volatile(&raw const (*header).len);
        ((&raw const (*header).bytes).cast::<u8>(), len as usize)
    };

    seq!(WORD in 0..67 {
        const _: () = assert!(HEADER_CAPACITY == 67 * size_of::<u64>());
        let at = WORD * size_of::<u64>();
        if len < at + size_of::<u64>() {
            return copy_last(bytes, room, end, at, len);
        }
        if room + at + size_of::<u64>() > end {
            return Err(Counter::ShortPush);
        }
        // SAFETY: both ends are within bounds by the checks above, and aligned: `bytes` is by its type, and the kernel
        // makes room at the start of a page.
        unsafe { ptr::write((room + at) as *mut u64, ptr::read(bytes.add(at).cast())) };
    });
    Ok(())
}

/// The bytes from `at` on, which are less than a word.
#[inline(always)]
fn copy_last(bytes: *const u8, room: usize, end: usize, at: usize, len: usize) -> Result<(), Counter> {
    seq!(BYTE in 0..7 {
        let byte = at + BYTE;
        if byte >= len {
            return Ok(());
        }
        if room + byte + 1 > end {
            return Err(Counter::ShortPush);
        }
        // SAFETY: both ends are within bounds by the checks above; `byte` is below the capacity, a multiple of words.
        unsafe { ptr::write((room + byte) as *mut u8, ptr::read(bytes.add(byte))) };
    });
    Ok(())
}
