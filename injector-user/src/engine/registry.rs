//! Which engine can run here, and why not a better one: for `injector selftest`, the log at start and `engine = "auto"`.

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

/// What was found out about this machine.
#[derive(Debug)]
pub struct EngineProbes {
    /// About the inline engine.
    pub inline: SelfTestReport,
    /// About the splice engine.
    pub splice: SelfTestReport,
    loaded: Option<LoadedSplice>,
}

impl EngineProbes {
    /// Nothing was tried, for this reason.
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

    /// The engine that ends connections for a listener that asks for `choice`.
    ///
    /// # Errors
    /// Why the engine that was asked for by name cannot run.
    pub fn engine(&self, choice: EngineChoice) -> Result<Arc<dyn Engine>, String> {
        match (choice, self.splice_failure()) {
            (EngineChoice::Relay, _) | (EngineChoice::Auto, Some(_)) => Ok(Arc::new(Relay)),
            (EngineChoice::Splice, Some(failure)) => Err(failure),
            (EngineChoice::Inline, _) => Err("serves packets, not sockets".to_owned()),
            (EngineChoice::Auto | EngineChoice::Splice, None) => {
                self.splice_engine().map(LoadedSplice::engine).ok_or_else(|| "not loaded".to_owned())
            }
        }
    }

    /// The name of the engine that `auto` takes where no `[inline]` is configured.
    #[must_use]
    pub fn chosen(&self) -> &'static str {
        if self.splice_failure().is_none() { "splice" } else { "relay" }
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let (inline, splice) = (self.inline.text("inline"), self.splice.text("splice"));
        let sockets = match self.splice_failure() {
            None => "engine = \"auto\" takes splice: all its checks passed".to_owned(),
            Some(failure) => {
                format!("engine = \"auto\" takes relay, since splice cannot run here: {failure}")
            }
        };
        let packets = match self.inline.failure() {
            None => {
                "with an [inline] table in the configuration it takes inline for listeners whose backends are\n\
                 reached by forwarding"
                    .to_owned()
            }
            Some(failure) => format!("inline cannot run here: {failure}"),
        };
        format!("{inline}{splice}relay\n  ok      needs nothing of the kernel\n\n{sockets}\n{packets}\n")
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        json!({
            "auto": self.chosen(),
            "reason": self.splice_failure(),
            "inline": self.inline.json(),
            "splice": self.splice.json(),
        })
    }
}
