//! The engines that need BPF behind one interface: `real`, or `stub` in a binary without the feature `bpf`.
//!
//! Both have the same items with the same signatures, so that no other module asks how the binary was built.
//! CI lints both.

#[cfg_attr(feature = "bpf", path = "kernel/real.rs")]
#[cfg_attr(not(feature = "bpf"), path = "kernel/stub.rs")]
mod imp;

pub use imp::{
    InlineEngine, KernelGuard, LoadedSplice, NOT_BUILT, detach_guard, detach_inline, inline_ineligibility,
    start_guard, start_inline, test_guard, test_inline, test_splice,
};
