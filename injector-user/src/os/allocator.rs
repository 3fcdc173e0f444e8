//! The allocator of the `injector` binary (mimalloc).

// Links the library.
use mimalloc as _;

unsafe extern "C" {
    /// Frees the caches of the calling thread and of threads that have ended; with `force`, gives the
    /// memory back to the kernel at once (mimalloc.h).
    safe fn mi_collect(force: bool);
}

/// Gives memory back that this thread and threads that have ended no longer use. By itself mimalloc
/// does so late, with later calls of the same thread. Without an effect in a program with another
/// allocator.
pub fn release_unused() {
    mi_collect(true);
}
