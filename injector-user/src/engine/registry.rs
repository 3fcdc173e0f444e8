//! Which engine can run here, and why not a better one: for `injector selftest`, the log at start and `engine = "auto"`.

use std::sync::Arc;
#[cfg(feature = "bpf")]
use std::time::Duration;

use serde_json::json;

use crate::{
    config::{EngineChoice, Watermarks},
    engine::{Engine, check::Tested, relay::Relay},
};

/// What was found out about this machine.
#[derive(Debug)]
pub struct Findings {
    /// About the inline engine.
    pub inline: Tested,
    /// About the splice engine.
    pub splice: Tested,
    #[cfg(feature = "bpf")]
    loaded: Option<Arc<crate::engine::splice::Splice>>,
}

const WITHOUT_BPF: &str = "this binary was built without BPF (--no-default-features)";

impl Findings {
    /// Nothing was tried, for this reason.
    #[must_use]
    pub fn untried(why: &str) -> Self {
        let why = if cfg!(feature = "bpf") { why } else { WITHOUT_BPF };
        Self {
            inline: Tested::untried(why),
            splice: Tested::untried(why),
            #[cfg(feature = "bpf")]
            loaded: None,
        }
    }

    /// Drives the programs of the inline engine, with maps of their own.
    #[cfg(feature = "bpf")]
    pub fn try_inline(&mut self) {
        let (checks, programs) = crate::engine::inline::selftest::run();
        self.inline = Tested::new(checks, programs);
    }

    /// Without BPF in the binary there is nothing to try.
    #[cfg(not(feature = "bpf"))]
    pub fn try_inline(&mut self) {}

    /// Loads the programs of the splice engine with room for `connections`, holding back by these marks, and drives them.
    #[cfg(feature = "bpf")]
    pub fn try_splice(&mut self, connections: u32, watermarks: &Watermarks) {
        use crate::engine::{
            check::Check,
            splice::{Splice, selftest},
        };

        let start = std::time::Instant::now();
        let loaded = match Splice::load(connections, watermarks.notify_step(), watermarks.credit()) {
            Ok(splice) => Arc::new(splice),
            Err(error) => {
                let check = Check { name: "load", result: Err(error.to_string()), took: start.elapsed() };
                self.splice = Tested::new(vec![check], Vec::new());
                return;
            }
        };
        let seen = "programs verified and attached".to_owned();
        let mut checks = vec![Check { name: "load", result: Ok(seen), took: start.elapsed() }];
        match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => checks.extend(runtime.block_on(selftest::run(&loaded))),
            Err(error) => {
                checks.push(Check { name: "runtime", result: Err(error.to_string()), took: Duration::ZERO });
            }
        }
        self.splice = Tested::new(checks, loaded.programs());
        self.loaded = Some(loaded);
    }

    /// Without BPF in the binary there is nothing to try.
    #[cfg(not(feature = "bpf"))]
    pub fn try_splice(&mut self, _connections: u32, _watermarks: &Watermarks) {}

    /// Why the splice engine cannot run; `None` if it can.
    #[must_use]
    pub fn splice_fault(&self) -> Option<String> {
        self.splice.fault()
    }

    /// The loaded splice engine, if all its checks passed.
    #[cfg(feature = "bpf")]
    #[must_use]
    pub fn splice_engine(&self) -> Option<&Arc<crate::engine::splice::Splice>> {
        self.loaded.as_ref().filter(|_| self.splice_fault().is_none())
    }

    /// The engine that ends connections for a listener that asks for `choice`.
    ///
    /// # Errors
    /// Why the engine that was asked for by name cannot run.
    pub fn engine(&self, choice: EngineChoice) -> Result<Arc<dyn Engine>, String> {
        match (choice, self.splice_fault()) {
            (EngineChoice::Relay, _) | (EngineChoice::Auto, Some(_)) => Ok(Arc::new(Relay)),
            (EngineChoice::Splice, Some(fault)) => Err(fault),
            (EngineChoice::Inline, _) => Err("serves packets, not sockets".to_owned()),
            (EngineChoice::Auto | EngineChoice::Splice, None) => self.best(),
        }
    }

    #[cfg(feature = "bpf")]
    fn best(&self) -> Result<Arc<dyn Engine>, String> {
        let splice = self.splice_engine().ok_or_else(|| "not loaded".to_owned())?;
        Ok(Arc::new(Arc::clone(splice)))
    }

    #[cfg(not(feature = "bpf"))]
    fn best(&self) -> Result<Arc<dyn Engine>, String> {
        Err("not built in".to_owned())
    }

    /// The name of the engine that `auto` takes where no `[inline]` is configured.
    #[must_use]
    pub fn chosen(&self) -> &'static str {
        if self.splice_fault().is_none() { "splice" } else { "relay" }
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let (inline, splice) = (self.inline.text("inline"), self.splice.text("splice"));
        let sockets = match self.splice_fault() {
            None => "engine = \"auto\" takes splice: all its checks passed".to_owned(),
            Some(fault) => {
                format!("engine = \"auto\" takes relay, since splice cannot run here: {fault}")
            }
        };
        let packets = match self.inline.fault() {
            None => {
                "with an [inline] table in the configuration it takes inline for listeners whose backends are\n\
                 reached by forwarding"
                    .to_owned()
            }
            Some(fault) => format!("inline cannot run here: {fault}"),
        };
        format!("{inline}{splice}relay\n  ok      needs nothing of the kernel\n\n{sockets}\n{packets}\n")
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        json!({
            "auto": self.chosen(),
            "reason": self.splice_fault(),
            "inline": self.inline.json(),
            "splice": self.splice.json(),
        })
    }
}
