//! The guard: banned sources and limits on each source, in front of every engine.

pub mod origin;

pub use origin::Origin;
