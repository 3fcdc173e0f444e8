//! Reads TOML values and collects errors.

pub(super) mod address;
pub(super) mod diagnostic;
pub(super) mod duration;
pub(super) mod section;
