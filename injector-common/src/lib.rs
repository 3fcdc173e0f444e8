//! What the injector's kernel half and user half share: the PROXY protocol, the layout of maps, and the
//! decisions about segments.
//!
//! The crate is `no_std` and allocates nothing, so the same code runs in BPF programs, in the daemon and
//! in tests.
#![no_std]

pub mod guard;
pub mod inline;
#[cfg(feature = "user")]
mod pod;
pub mod proxy;
mod seq_number;
pub mod splice;

pub use seq_number::SeqNumber;
