//! The guard's part of the daemon.

use std::time::Duration;

use anyhow::Context as _;
use tokio::time::MissedTickBehavior;

use crate::{
    config::{self, Network},
    control::Control,
    engine::kernel::KernelGuard,
    guard::{Guard, Service},
    kubernetes::Followed,
};

/// How often the addresses of the backends are looked at.
const BACKENDS_INTERVAL: Duration = Duration::from_secs(2);

/// Takes over the bans of an earlier daemon, and begins to follow the lists. `peers` are the networks of
/// `inline.peers`.
pub(super) fn start(
    settings: &config::Guard,
    kernel: Option<&KernelGuard>,
    peers: &[Network],
) -> anyhow::Result<Service> {
    let max_bans = usize::try_from(settings.max_bans).unwrap_or(usize::MAX);
    let guard = Guard::new(kernel.map(KernelGuard::maps), max_bans);
    let attachment = kernel.map(KernelGuard::attachment);
    Service::start(guard, settings, peers, attachment).context("starting the thread of the guard")
}

/// Ends the sessions of sources that are banned from now on, and protects the addresses of backends and
/// peers.
pub(super) async fn follow(control: Control, bans: Service, mut peers: Followed<Network>) {
    bans.set_peers(peers.current());
    let mut changes = bans.guard().changes();
    let mut backends = tokio::time::interval(BACKENDS_INTERVAL);
    backends.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                control.end_banned_sessions().await;
            }
            () = peers.changed() => bans.set_peers(peers.current()),
            _ = backends.tick() => bans.set_backends(control.backend_addresses().await),
        }
    }
}
