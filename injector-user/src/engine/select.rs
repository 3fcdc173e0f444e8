//! Which engine serves which listener, and why not a better one.

use std::sync::Arc;

use anyhow::bail;

use crate::{
    config::{Config, EngineChoice, Limits, Listener},
    engine::{Engine, kernel, registry::Findings},
    telemetry::log::target,
};

/// What was found out about a listener before sockets are opened.
#[derive(Clone, Debug)]
pub struct Choice {
    /// As configured.
    pub asked: EngineChoice,
    /// Why `auto` does not take inline.
    pub not_inline: Option<String>,
}

/// Whether a listener with this choice may use the splice engine.
#[must_use]
pub fn splices(choice: EngineChoice) -> bool {
    matches!(choice, EngineChoice::Auto | EngineChoice::Splice)
}

/// Decides which listeners are served by packets: those that ask for it, and of those with `auto` the ones that can be. These
/// are configured so from here on.
///
/// Packets are another thing than sockets: what starts on the host itself does not reach the public address, and limits,
/// timeouts and forged headers are nobody's business. So `auto` takes inline only where the file has `[inline]`.
///
/// # Errors
/// Why the engine that was asked for by name cannot run.
pub fn inline(config: &mut Config, findings: &mut Findings) -> anyhow::Result<Vec<Choice>> {
    let asks = |choice| config.listeners.iter().find(|listener| listener.engine == choice);
    let by_name = asks(EngineChoice::Inline);
    if by_name.is_some() || (config.inline.given && asks(EngineChoice::Auto).is_some()) {
        findings.try_inline();
        findings.inline.log("inline");
    }
    if let (Some(listener), Some(fault)) = (by_name, findings.inline.fault()) {
        bail!(
            "listener {:?}: engine \"inline\" cannot run here: {fault}; `injector selftest` shows all checks, \
             engine = \"auto\" would select another",
            listener.name
        );
    }
    let choices = refusals(config, findings);
    for (listener, Choice { asked, not_inline }) in config.listeners.iter_mut().zip(&choices) {
        if *asked == EngineChoice::Auto && not_inline.is_none() {
            listener.engine = EngineChoice::Inline;
        }
        if listener.engine == EngineChoice::Inline {
            warn_of_limits(listener, config.limits);
        }
    }
    Ok(choices)
}

fn refusals(config: &Config, findings: &Findings) -> Vec<Choice> {
    let automatic: Vec<_> =
        config.listeners.iter().filter(|listener| listener.engine == EngineChoice::Auto).collect();
    let refused = if !config.inline.given {
        vec![Some("no [inline] table in the configuration".to_owned()); automatic.len()]
    } else if let Some(fault) = findings.inline.fault() {
        vec![Some(fault); automatic.len()]
    } else {
        kernel::inline_ineligibility(config, &automatic)
    };
    let mut refused = refused.into_iter();
    let choice = |listener: &Listener| Choice {
        asked: listener.engine,
        not_inline: if listener.engine == EngineChoice::Auto { refused.next().flatten() } else { None },
    };
    config.listeners.iter().map(choice).collect()
}

/// The kernel forwards whatever comes.
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

/// The engines for all listeners; `None` for those whose packets never reach a socket.
///
/// # Errors
/// Why the engine that was asked for by name cannot run.
pub fn engines(
    config: &Config,
    choices: &[Choice],
    findings: &Findings,
) -> anyhow::Result<Vec<Option<Arc<dyn Engine>>>> {
    let fault = findings.splice_fault();
    if let Some(fault) = &fault
        && config.listeners.iter().any(|listener| splices(listener.engine))
    {
        tracing::warn!(target: target::ENGINE, reason = fault, "the splice engine cannot run here; listeners with engine \"auto\" use relay");
    }
    let mut engines = Vec::new();
    for (listener, choice) in config.listeners.iter().zip(choices) {
        let engine = if listener.engine == EngineChoice::Inline {
            None
        } else {
            let engine = findings.engine(listener.engine).map_err(|fault| {
                anyhow::anyhow!(
                    "listener {:?}: engine \"splice\" cannot run here: {fault}; \
                     `injector selftest` shows all checks, engine = \"auto\" would select relay",
                    listener.name
                )
            })?;
            Some(engine)
        };
        let name = engine.as_ref().map_or("inline", |engine| engine.name());
        let reason = reason(choice, fault.as_deref());
        tracing::info!(target: target::ENGINE, listener = listener.name, engine = name, reason, "engine selected");
        engines.push(engine);
    }
    Ok(engines)
}

fn reason(choice: &Choice, splice_fault: Option<&str>) -> String {
    match (choice.asked, &choice.not_inline, splice_fault) {
        (EngineChoice::Inline | EngineChoice::Splice | EngineChoice::Relay, ..) => "configured".to_owned(),
        (EngineChoice::Auto, None, _) => {
            "auto: all checks of inline passed, and the backends are reached by forwarding".to_owned()
        }
        (EngineChoice::Auto, Some(why), None) => {
            format!("auto: all checks of splice passed; not inline: {why}")
        }
        (EngineChoice::Auto, Some(why), Some(fault)) => {
            format!("auto: splice cannot run here: {fault}; not inline: {why}")
        }
    }
}
