//! `inject`: pushes the PROXY header in front of the first bytes that the backend reads.
//!
//! Fail closed: unless the whole header was pushed, the result is `SK_DROP`, and the daemon's `send`
//! fails with `EACCES`. The backend never reads a byte without the header.

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
    // SAFETY: the storage of a socket that is sending. This program is its only writer while the state
    // is ARMED, and the socket lock serialises the sends of one socket.
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
    // The rest of this message and the next 4 GiB do not run the program. The socket leaves the map
    // before that.
    // SAFETY: the program's own context.
    unsafe { bpf_msg_apply_bytes(message.msg, u32::MAX) };
    Ok(if doorbell == 0 { Counter::HeaderBeforePayload } else { Counter::HeaderAlone })
}

/// Copies the header into the room in front of the message.
///
/// The loop is unrolled and every offset a constant: without CAP_PERFMON the verifier rejects a variable
/// offset into a message ("pointer arithmetic with it prohibited for !root", sanitize_ptr_alu,
/// kernel/bpf/verifier.c). It copies words: byte by byte the verifier would process ten times as many
/// instructions. The kernel does not zero the room (`bpf_msg_push_data`, net/core/filter.c), so the
/// program writes every byte.
#[inline(always)]
fn copy(message: &SkMsgContext, header: NonNull<Header>) -> Result<(), Counter> {
    // Read again: the push has moved both.
    let (room, end) = (message.data(), message.data_end());
    // `len` is read again, as volatile. If the compiler knew its range, it would remove the bounds
    // checks that the verifier needs.
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
        // SAFETY: both ends are within bounds by the checks above, and aligned: `bytes` by its type, and
        // the room because the kernel makes it at the start of a page.
        unsafe { ptr::write((room + at) as *mut u64, ptr::read(bytes.add(at).cast())) };
    });
    Ok(())
}

/// Copies the bytes from `at` on, which are fewer than a word.
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
