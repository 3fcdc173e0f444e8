//! Drops the capabilities that only startup needs.

use caps::Capability;

use crate::{
    engine::{
        kernel::{InlineEngine, LoadedSplice},
        registry::EngineProbes,
    },
    os::capabilities,
    telemetry::log::target,
};

/// Drops every capability except those that the kernel engines need at run time, and the one to
/// bind ports below 1024, which a reload may add.
pub(super) fn drop_capabilities(probes: &EngineProbes, inline: Option<&InlineEngine>) {
    let mut keep = vec![Capability::CAP_NET_BIND_SERVICE];
    keep.extend(inline.map(InlineEngine::capabilities).unwrap_or_default());
    keep.extend(probes.splice_engine().map(LoadedSplice::capabilities).unwrap_or_default());
    match capabilities::drop_all_except(&keep) {
        Ok(kept) => tracing::info!(target: target::DAEMON, ?kept, "capabilities dropped"),
        Err(error) => {
            tracing::warn!(target: target::DAEMON, %error, "dropping capabilities failed; the daemon may keep more than it needs");
        }
    }
}
