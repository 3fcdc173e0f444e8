//! Zeroing and copying what lies in a map or on the stack, in a way that the verifier allows to a loader without CAP_PERFMON.
//!
//! bpf-linker has LLVM make a call of every memset, however small, and the function loops with a variable offset: "pointer
//! arithmetic with it prohibited for !root". LLVM finds a memset in any row of plain stores of zero, too.

/// Zeroes a value, by words where it is aligned to them. All bytes zero must be a valid `T`.
///
/// # Safety
/// `place` must be valid for writing.
#[inline(always)]
pub(super) unsafe fn zero<T>(place: *mut T) {
    if align_of::<T>() >= 8 {
        // LLVM unrolls the loop only if it is short.
        let words = place.cast::<u64>();
        for at in 0..size_of::<T>() / 8 {
            // SAFETY: within the value, whose size is a multiple of its alignment.
            unsafe { words.add(at).write_volatile(0) };
        }
    } else if align_of::<T>() >= 4 {
        let words = place.cast::<u32>();
        for at in 0..size_of::<T>() / 4 {
            // SAFETY: within the value, whose size is a multiple of its alignment.
            unsafe { words.add(at).write_volatile(0) };
        }
    } else {
        let bytes = place.cast::<u8>();
        for at in 0..size_of::<T>() {
            // SAFETY: within the value.
            unsafe { bytes.add(at).write_volatile(0) };
        }
    }
}

/// Copies a value word by word: of two places that may overlap LLVM makes a memmove, which is refused alike.
///
/// # Safety
/// `from` must be valid for reading and `to` for writing; a `T` is made of whole, aligned words.
#[inline(always)]
pub(super) unsafe fn copy<T: Copy>(to: *mut T, from: *const T) {
    const { assert!(align_of::<T>() >= 4) }
    let (to, from) = (to.cast::<u32>(), from.cast::<u32>());
    for at in 0..size_of::<T>() / 4 {
        // SAFETY: within the values.
        unsafe { to.add(at).write_volatile(from.add(at).read()) };
    }
}
