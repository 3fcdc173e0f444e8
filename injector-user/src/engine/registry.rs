//! Which engines can run on this machine, by their self-tests: for `injector selftest`, the log and `engine = "auto"`.

use std::sync::Arc;

use serde_json::json;

use crate::{
    config::{EngineChoice, Watermarks},
    engine::{
        Engine,
        check::SelfTestReport,
        kernel::{self, LoadedSplice},
        relay::Relay,
    },
};

/// The self-tests of all engines.
#[derive(Debug)]
pub struct EngineProbes {
    /// The inline engine's.
    pub inline: SelfTestReport,
    /// The splice engine's.
    pub splice: SelfTestReport,
    loaded: Option<LoadedSplice>,
}

impl EngineProbes {
    /// No self-test was run, for this reason.
    #[must_use]
    pub fn not_run(why: &str) -> Self {
        let why = kernel::NOT_BUILT.unwrap_or(why);
        Self { inline: SelfTestReport::not_run(why), splice: SelfTestReport::not_run(why), loaded: None }
    }

    /// Runs the self-test of the inline engine.
    pub fn probe_inline(&mut self) {
        self.inline = kernel::test_inline();
    }

    /// Loads the splice engine with room for `connections` and runs its self-test.
    pub fn probe_splice(&mut self, connections: u32, watermarks: &Watermarks) {
        (self.splice, self.loaded) = kernel::test_splice(connections, watermarks);
    }

    /// Why the splice engine cannot run; `None` if it can.
    #[must_use]
    pub fn splice_failure(&self) -> Option<String> {
        self.splice.failure()
    }

    /// The loaded splice engine, if all its checks passed.
    #[must_use]
    pub fn splice_engine(&self) -> Option<&LoadedSplice> {
        self.loaded.as_ref().filter(|_| self.splice_failure().is_none())
    }

    /// The engine for the sockets of a listener that requests `choice`.
    ///
    /// # Errors
    /// Why the engine that was requested by name cannot run.
    pub fn engine(&self, choice: EngineChoice) -> Result<Arc<dyn Engine>, String> {
        match (choice, self.splice_failure()) {
            (EngineChoice::Relay, _) | (EngineChoice::Auto | EngineChoice::Inline, Some(_)) => {
                Ok(Arc::new(Relay))
            }
            (EngineChoice::Splice, Some(failure)) => Err(failure),
            (EngineChoice::Auto | EngineChoice::Inline | EngineChoice::Splice, None) => {
                self.splice_engine().map(LoadedSplice::engine).ok_or_else(|| "not loaded".to_owned())
            }
        }
    }

    /// The name of the engine that `auto` selects for sockets.
    #[must_use]
    pub fn auto_engine(&self) -> &'static str {
        if self.splice_failure().is_none() { "splice" } else { "relay" }
    }

    /// As text.
    #[must_use]
    pub fn text(&self) -> String {
        let (inline, splice) = (self.inline.text("inline"), self.splice.text("splice"));
        let sockets = match self.splice_failure() {
            None => "engine = \"auto\" selects splice for sockets: all its checks passed".to_owned(),
            Some(failure) => {
                format!(
                    "engine = \"auto\" selects relay for sockets, because splice cannot run here: {failure}"
                )
            }
        };
        let packets = match self.inline.failure() {
            None => {
                "and inline in front of them, for the connections that it can take: all its checks passed"
                    .to_owned()
            }
            Some(failure) => format!("and not inline, which cannot run here: {failure}"),
        };
        format!("{inline}{splice}relay\n  ok      needs no BPF\n\n{sockets}\n{packets}\n")
    }

    /// As JSON.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        json!({
            "auto": self.auto_engine(),
            "auto_inline": self.inline.failure().is_none(),
            "reason": self.splice_failure(),
            "inline": self.inline.json(),
            "splice": self.splice.json(),
        })
    }
}
