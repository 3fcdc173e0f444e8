//! What the kernel half and the user half of the injector agree on.
//!
//! Everything here is `no_std` and allocates nothing, so that the same code runs inside a BPF program, in the
//! daemon and in the tests.
#![no_std]

pub mod inline;
#[cfg(feature = "user")]
mod pod;
pub mod proxy;
mod seq_number;
pub mod splice;

pub use seq_number::SeqNumber;
