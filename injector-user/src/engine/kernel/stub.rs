//! No engine: the binary was built without the feature `bpf`.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::bail;
use caps::Capability;
use tokio::sync::{Notify, watch};

use crate::{
    config::{Attachment, Guard as GuardSettings, Inline as InlineSettings, Listener, Network, Watermarks},
    engine::{
        Engine, bans::BanMaps, check::SelfTestReport, guarded_device::GuardAttachment,
        served_listener::ServedListener, usage::InlineUsage,
    },
    kubernetes::Followed,
    telemetry::{log::target, metrics::Metrics},
};

const REASON: &str = "this binary was built without BPF (--no-default-features)";

/// Why no engine of this binary can use BPF, where none can.
pub const NOT_BUILT: Option<&str> = Some(REASON);

/// Runs nothing.
#[must_use]
pub fn test_inline() -> SelfTestReport {
    SelfTestReport::not_run(REASON)
}

/// The inline engine can serve no listener.
#[must_use]
pub fn inline_ineligibility(_listener: &Listener) -> Option<String> {
    Some(REASON.to_owned())
}

/// Loads nothing.
#[must_use]
pub fn test_splice(_connections: u32, _marks: &Watermarks) -> (SelfTestReport, Option<LoadedSplice>) {
    (SelfTestReport::not_run(REASON), None)
}

/// There is none.
#[derive(Clone, Debug)]
pub enum LoadedSplice {}

impl LoadedSplice {
    /// Never called.
    #[must_use]
    pub fn engine(&self) -> Arc<dyn Engine> {
        match *self {}
    }

    /// Never called.
    #[must_use]
    pub fn capabilities(&self) -> Vec<Capability> {
        match *self {}
    }

    /// Never called.
    pub fn spawn_tasks(&self, _metrics: &Metrics) {
        match *self {}
    }
}

/// Starts nothing: a listener that asks for the inline engine is rejected before.
///
/// # Errors
/// Never.
pub fn start_inline(
    _settings: &InlineSettings,
    _listeners: &[&Listener],
    _guard: Option<&KernelGuard>,
) -> anyhow::Result<Option<InlineEngine>> {
    Ok(None)
}

/// Removes nothing.
///
/// # Errors
/// Always: this binary does not know what the engine leaves.
pub fn detach_inline(_settings: &InlineSettings, _force: bool) -> anyhow::Result<Vec<String>> {
    bail!(REASON)
}

/// Runs nothing.
#[must_use]
pub fn test_guard() -> SelfTestReport {
    SelfTestReport::not_run(REASON)
}

/// Loads nothing.
///
/// # Errors
/// Never.
pub fn start_guard(
    settings: Option<&GuardSettings>,
    _attachment: Attachment,
) -> anyhow::Result<Option<KernelGuard>> {
    if settings.is_some() {
        tracing::warn!(target: target::GUARD, reason = REASON, "the guard drops no packets; listeners reset connections of banned sources instead");
    }
    Ok(None)
}

/// Removes nothing.
///
/// # Errors
/// Always: this binary does not know what the guard leaves.
pub fn detach_guard(_pin: &Path, _force: bool) -> anyhow::Result<Vec<String>> {
    bail!(REASON)
}

/// There is none.
#[derive(Debug)]
pub enum KernelGuard {}

impl KernelGuard {
    /// Never called.
    #[must_use]
    pub fn maps(&self) -> Arc<dyn BanMaps> {
        match *self {}
    }

    /// Never called.
    #[must_use]
    pub fn attachment(&self) -> watch::Receiver<GuardAttachment> {
        match *self {}
    }

    /// Never called.
    pub fn attach(&mut self) {
        match *self {}
    }

    /// Never called.
    #[must_use]
    pub fn capabilities(&self) -> Vec<Capability> {
        match *self {}
    }

    /// Never called.
    #[must_use]
    pub fn directories(&self) -> Vec<PathBuf> {
        match *self {}
    }

    /// Never called.
    pub fn spawn_tasks(self, _addresses: watch::Receiver<Vec<SocketAddr>>) {
        match self {}
    }
}

/// There is none.
#[derive(Debug)]
pub enum InlineEngine {}

impl InlineEngine {
    /// Never called.
    #[must_use]
    pub fn capabilities(&self) -> Vec<Capability> {
        match *self {}
    }

    /// Never called.
    #[must_use]
    pub fn directories(&self) -> Vec<PathBuf> {
        match *self {}
    }

    /// Never called.
    #[must_use]
    pub fn usage(&self) -> Arc<dyn InlineUsage> {
        match *self {}
    }

    /// Never called.
    pub fn spawn_tasks(
        self,
        _metrics: &Metrics,
        _listeners: watch::Receiver<Vec<ServedListener>>,
        _health: Arc<Notify>,
        _peers: Followed<Network>,
    ) {
        match self {}
    }
}
