//! The operating system: system calls, capabilities, systemd.

pub mod capabilities;
pub mod sys;
pub mod systemd;
