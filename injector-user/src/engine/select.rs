//! Selects the engines of each listener, and says why it is not served by a faster one.
//!
//! Every listener has sockets, which splice or relay serves. Inline is an accelerator in front of
//! them: it takes the connections that it can, and the sockets get the rest.

use std::{sync::Arc, time::Instant};

use anyhow::bail;

use crate::{
    config::{EngineChoice, Inline as InlineSettings, Listener, Watermarks},
    engine::{
        Engine,
        check::Check,
        kernel::{self, InlineEngine, KernelGuard},
        registry::EngineProbes,
    },
    telemetry::log::target,
};

/// The engines of a listener.
#[derive(Clone, Debug)]
pub struct EngineSelection {
    /// The engine of its sockets.
    pub engine: Arc<dyn Engine>,
    /// Whether inline takes what it can.
    pub inline: bool,
}

impl EngineSelection {
    /// The engines, such as `inline+splice`.
    #[must_use]
    pub fn label(&self) -> String {
        label(&*self.engine, self.inline)
    }
}

/// The engines of a listener by name, such as `splice` or `inline+splice`.
#[must_use]
pub fn label(engine: &dyn Engine, inline: bool) -> String {
    if inline { format!("inline+{}", engine.name()) } else { engine.name().to_owned() }
}

/// Whether this choice may select the splice engine.
#[must_use]
fn may_splice(choice: EngineChoice) -> bool {
    choice != EngineChoice::Relay
}

/// Tests the splice engine for so many connections, if a listener may use it.
pub fn test_splice(
    watermarks: &Watermarks,
    connections: usize,
    listeners: &[Listener],
    probes: &mut EngineProbes,
) {
    if !listeners.iter().any(|listener| may_splice(listener.engine)) {
        return;
    }
    probes.probe_splice(u32::try_from(connections).unwrap_or(u32::MAX), watermarks);
    probes.splice.log("splice");
    if let Some(reason) = probes.splice_failure() {
        tracing::warn!(target: target::ENGINE, reason, "the splice engine cannot run here; relay serves the sockets of listeners with engine \"auto\" or \"inline\"");
    }
}

/// Tests and starts the inline engine for the listeners that may use it; `None` if none does, or if
/// it cannot run here and all of them have engine `auto`.
///
/// # Errors
/// Why the engine that was requested by name cannot run.
pub fn start_inline(
    settings: &InlineSettings,
    listeners: &[Listener],
    guard: Option<&KernelGuard>,
    probes: &mut EngineProbes,
) -> anyhow::Result<Option<InlineEngine>> {
    if listeners.iter().any(|listener| listener.engine.may_be_inline()) {
        probes.probe_inline();
        probes.inline.log("inline");
    }
    let mut served = Vec::new();
    for listener in listeners.iter().filter(|listener| listener.engine.may_be_inline()) {
        if serves_inline(listener, probes)?.is_ok() {
            served.push(listener);
        }
    }
    let start = Instant::now();
    let engine = match kernel::start_inline(settings, &served, guard) {
        Ok(engine) => engine,
        Err(error) => {
            let reason = format!("{error:#}");
            tracing::warn!(target: target::ENGINE, reason, "the inline engine cannot start here; splice or relay serves all connections of listeners with engine \"auto\"");
            let failure = Check { name: "start", result: Err(reason), took: start.elapsed() };
            probes.inline.checks.push(failure);
            for listener in served {
                // Fails if the listener requests inline by name.
                drop(serves_inline(listener, probes)?);
            }
            None
        }
    };
    Ok(engine)
}

/// Whether inline takes connections of this listener; the inner error is why not.
///
/// # Errors
/// If the listener requests inline by name, and inline cannot serve it.
fn serves_inline(listener: &Listener, probes: &EngineProbes) -> anyhow::Result<Result<(), String>> {
    if !listener.engine.may_be_inline() {
        return Ok(Err("configured".to_owned()));
    }
    let why = probes.inline.failure().map(|failure| format!("cannot run here: {failure}"));
    match why.or_else(|| kernel::inline_ineligibility(listener)) {
        None => Ok(Ok(())),
        Some(why) if listener.engine == EngineChoice::Inline => bail!(
            "listener {:?}: engine \"inline\" {why}; `injector selftest` shows all checks, engine = \"auto\" \
             would do without inline",
            listener.name
        ),
        Some(why) => Ok(Err(why)),
    }
}

/// Selects the engines of a listener, after the engines were started, and logs them.
///
/// # Errors
/// Why the engine that was requested by name cannot run.
pub fn select(listener: &Listener, probes: &EngineProbes) -> anyhow::Result<EngineSelection> {
    let (selection, reason) = decide(listener, probes)?;
    log(listener, &selection, &reason);
    Ok(selection)
}

/// Logs the engines of a listener with the reason of [`decide`].
pub fn log(listener: &Listener, selection: &EngineSelection, reason: &str) {
    tracing::info!(target: target::ENGINE, listener = listener.name, engine = selection.label(), reason, "engine selected");
}

/// The engines of a listener, after the engines were started, and the reason.
///
/// # Errors
/// Why the engine that was requested by name cannot run.
pub fn decide(listener: &Listener, probes: &EngineProbes) -> anyhow::Result<(EngineSelection, String)> {
    let inline = serves_inline(listener, probes)?;
    let engine = probes.engine(listener.engine).map_err(|failure| {
        anyhow::anyhow!(
            "listener {:?}: engine \"splice\" cannot run here: {failure}; `injector selftest` shows all \
             checks, engine = \"auto\" would select relay",
            listener.name
        )
    })?;
    let selection = EngineSelection { engine, inline: inline.is_ok() };
    let reason = match (listener.engine, inline, probes.splice_failure()) {
        (EngineChoice::Inline | EngineChoice::Splice | EngineChoice::Relay, ..) => "configured".to_owned(),
        (EngineChoice::Auto, Ok(()), None) => "auto: all checks of inline and splice passed".to_owned(),
        (EngineChoice::Auto, Ok(()), Some(failure)) => {
            format!("auto: all checks of inline passed; not splice: {failure}")
        }
        (EngineChoice::Auto, Err(why), None) => {
            format!("auto: all checks of splice passed; not inline: {why}")
        }
        (EngineChoice::Auto, Err(why), Some(failure)) => {
            format!("auto: not splice: {failure}; not inline: {why}")
        }
    };
    Ok((selection, reason))
}
