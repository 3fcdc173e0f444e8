//! The user-space half of the guard's programs, which drop packets of banned sources. The programs are in
//! `injector-ebpf/src/guard/`.
//!
//! Programs and maps stay when the daemon exits: bans hold, and end at their time, without it. The next
//! daemon takes them over; `injector guard detach` removes them. Start reading in [`runner`].

mod attach;
pub mod detach;
pub(in crate::engine) mod maps;
mod pins;
mod programs;
pub mod runner;
pub mod selftest;
mod xdp;
