//! Bans in the kernel, as the guard sees them.

use std::{fmt::Debug, net::SocketAddr};

use injector_common::guard::{Ban, Counter};

use crate::config::Network;

/// A change of the banned sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BanChange {
    /// It is banned from now on, until the end given.
    Set(Network, Ban),
    /// It is no longer banned.
    Remove(Network),
}

/// The guard's maps, which its programs and that of engine inline share. They are pinned, and outlive the daemon.
pub trait BanMaps: Debug + Send + Sync {
    /// Writes changes, in batches where the kernel can. May take long: not for a worker thread.
    ///
    /// # Errors
    /// When a map is full or the kernel refuses; what was written before stays.
    fn write(&self, changes: &[BanChange]) -> anyhow::Result<()>;

    /// Calls `each` with all that the maps contain: bans of an earlier daemon. Those that are over are
    /// in it as well, because the kernel's lookup finds them in place of a larger network's.
    ///
    /// # Errors
    /// As bpf(2).
    fn read(&self, each: &mut dyn FnMut(Network, Ban)) -> anyhow::Result<()>;

    /// Replaces the networks that are never dropped.
    ///
    /// # Errors
    /// As bpf(2).
    fn set_allowed(&self, networks: &[Network]) -> anyhow::Result<()>;

    /// Replaces the addresses that are guarded: those of all listeners. An unspecified address stands for all of its family.
    ///
    /// # Errors
    /// As bpf(2).
    fn set_guarded(&self, addresses: &[SocketAddr]) -> anyhow::Result<()>;

    /// Packets dropped so far.
    fn dropped(&self, by: Counter) -> u64;
}
