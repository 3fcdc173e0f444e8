//! Selects the engine of each listener, and says why it is not a faster one.

use std::sync::Arc;

use anyhow::bail;

use crate::{
    config::{EngineChoice, Inline as InlineSettings, Limits, Listener},
    engine::{Engine, kernel, registry::EngineProbes},
    telemetry::log::target,
};

/// The outcome of the selection for one listener, before its sockets are opened.
#[derive(Clone, Debug)]
pub struct EngineSelection {
    /// As configured.
    pub requested: EngineChoice,
    /// Why `auto` does not take inline.
    pub inline_ineligibility: Option<String>,
}

/// Whether this choice may select the splice engine.
#[must_use]
pub fn may_splice(choice: EngineChoice) -> bool {
    matches!(choice, EngineChoice::Auto | EngineChoice::Splice)
}

/// Selects the listeners of the inline engine: those that request it, and those with `auto` that it can serve. Sets their
/// `engine` to inline.
///
/// The inline engine forwards packets and has no sockets: connections from the host itself do not reach the public address,
/// and limits, timeouts and forged headers are not checked. So `auto` selects it only where the file has `[inline]`.
///
/// # Errors
/// Why the engine that was requested by name cannot run.
pub fn select_inline(
    listeners: &mut [Listener],
    settings: &InlineSettings,
    limits: Limits,
    probes: &mut EngineProbes,
) -> anyhow::Result<Vec<EngineSelection>> {
    let requests = |choice| listeners.iter().find(|listener| listener.engine == choice);
    let by_name = requests(EngineChoice::Inline);
    if by_name.is_some() || (settings.present && requests(EngineChoice::Auto).is_some()) {
        probes.probe_inline();
        probes.inline.log("inline");
    }
    if let (Some(listener), Some(failure)) = (by_name, probes.inline.failure()) {
        bail!(
            "listener {:?}: engine \"inline\" cannot run here: {failure}; `injector selftest` shows all checks, \
             engine = \"auto\" would select another",
            listener.name
        );
    }
    let selections = inline_selections(listeners, settings, probes);
    for (listener, EngineSelection { requested, inline_ineligibility }) in
        listeners.iter_mut().zip(&selections)
    {
        if *requested == EngineChoice::Auto && inline_ineligibility.is_none() {
            listener.engine = EngineChoice::Inline;
        }
        if listener.engine == EngineChoice::Inline {
            warn_of_limits(listener, limits);
        }
    }
    Ok(selections)
}

fn inline_selections(
    listeners: &[Listener],
    settings: &InlineSettings,
    probes: &EngineProbes,
) -> Vec<EngineSelection> {
    let automatic: Vec<_> =
        listeners.iter().filter(|listener| listener.engine == EngineChoice::Auto).collect();
    let ineligible = if !settings.present {
        vec![Some("no [inline] table in the configuration".to_owned()); automatic.len()]
    } else if let Some(failure) = probes.inline.failure() {
        vec![Some(failure); automatic.len()]
    } else {
        kernel::inline_ineligibility(settings, &automatic)
    };
    let mut ineligible = ineligible.into_iter();
    let selection = |listener: &Listener| EngineSelection {
        requested: listener.engine,
        inline_ineligibility: if listener.engine == EngineChoice::Auto {
            ineligible.next().flatten()
        } else {
            None
        },
    };
    listeners.iter().map(selection).collect()
}

/// Logs which limits the inline engine does not enforce: the kernel forwards every connection.
fn warn_of_limits(listener: &Listener, limits: Limits) {
    let mut fields = Vec::new();
    if limits != Limits::default() {
        fields.push("limits.max_connections");
    }
    if listener.max_connections.is_some() {
        fields.push("listener.max_connections");
    }
    if !fields.is_empty() {
        tracing::warn!(target: target::ENGINE,
            listener = listener.name,
            "engine \"inline\" does not enforce {}; its only limit is inline.flows",
            fields.join(" and ")
        );
    }
}

/// Selects the engine of every listener; `None` for those of the inline engine, which have no sockets.
///
/// # Errors
/// Why the engine that was requested by name cannot run.
pub fn select_engines(
    listeners: &[Listener],
    selections: &[EngineSelection],
    probes: &EngineProbes,
) -> anyhow::Result<Vec<Option<Arc<dyn Engine>>>> {
    let failure = probes.splice_failure();
    if let Some(failure) = &failure
        && listeners.iter().any(|listener| may_splice(listener.engine))
    {
        tracing::warn!(target: target::ENGINE, reason = failure, "the splice engine cannot run here; listeners with engine \"auto\" use relay");
    }
    let mut engines = Vec::new();
    for (listener, selection) in listeners.iter().zip(selections) {
        let engine = if listener.engine == EngineChoice::Inline {
            None
        } else {
            let engine = probes.engine(listener.engine).map_err(|failure| {
                anyhow::anyhow!(
                    "listener {:?}: engine \"splice\" cannot run here: {failure}; \
                     `injector selftest` shows all checks, engine = \"auto\" would select relay",
                    listener.name
                )
            })?;
            Some(engine)
        };
        let name = engine.as_ref().map_or("inline", |engine| engine.name());
        let reason = reason(selection, failure.as_deref());
        tracing::info!(target: target::ENGINE, listener = listener.name, engine = name, reason, "engine selected");
        engines.push(engine);
    }
    Ok(engines)
}

fn reason(selection: &EngineSelection, splice_failure: Option<&str>) -> String {
    match (selection.requested, &selection.inline_ineligibility, splice_failure) {
        (EngineChoice::Inline | EngineChoice::Splice | EngineChoice::Relay, ..) => "configured".to_owned(),
        (EngineChoice::Auto, None, _) => {
            "auto: all checks of inline passed, and the backends are reached by forwarding".to_owned()
        }
        (EngineChoice::Auto, Some(why), None) => {
            format!("auto: all checks of splice passed; not inline: {why}")
        }
        (EngineChoice::Auto, Some(why), Some(failure)) => {
            format!("auto: splice cannot run here: {failure}; not inline: {why}")
        }
    }
}
