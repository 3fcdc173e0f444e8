//! The operating system: system calls, capabilities, systemd. The daemon's `unsafe` code is here.

pub mod capabilities;
pub mod clock;
pub mod epoll;
#[cfg(feature = "bpf")]
pub mod mmap;
pub mod poll;
pub mod rlimit;
pub mod sockopt;
pub mod systemd;
