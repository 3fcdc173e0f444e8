//! Reads TOML values and collects what is wrong with them.

pub(super) mod address;
pub(super) mod diagnostic;
pub(super) mod duration;
pub(super) mod section;
