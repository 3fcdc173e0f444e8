//! Which engine can run here, and why not a better one: for `injector selftest`, the log at start and `engine = "auto"`.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use serde_json::json;

use crate::{
    config::EngineChoice,
    engine::{Engine, Relay},
    session::Marks,
};

/// One check of an engine's mechanism.
#[derive(Clone, Debug)]
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// What was seen, or what went wrong.
    pub result: Result<String, String>,
    /// How long it took.
    pub took: Duration,
}

/// What was found out about this machine.
#[derive(Debug)]
pub struct Findings {
    /// The checks of the splice engine, in order; the first that fails rules it out.
    pub splice: Vec<Check>,
    /// The loaded programs and the instructions that the verifier walked.
    pub programs: Vec<(String, Option<u32>)>,
    #[cfg(feature = "bpf")]
    loaded: Option<Arc<crate::splice::Splice>>,
}

impl Findings {
    /// Loads the programs with room for `connections`, holding back by these marks, and drives them.
    #[cfg(feature = "bpf")]
    #[must_use]
    pub fn gather(connections: u32, marks: &Marks) -> Self {
        use crate::splice::{Splice, selftest};

        let start = std::time::Instant::now();
        let loaded = match Splice::load(connections, marks.alarm_step(), marks.credit()) {
            Ok(splice) => Arc::new(splice),
            Err(error) => {
                let check = Check { name: "load", result: Err(error.to_string()), took: start.elapsed() };
                return Self { splice: vec![check], programs: Vec::new(), loaded: None };
            }
        };
        let seen = "programs verified and attached".to_owned();
        let mut splice = vec![Check { name: "load", result: Ok(seen), took: start.elapsed() }];
        match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => splice.extend(runtime.block_on(selftest::run(&loaded))),
            Err(error) => {
                splice.push(Check { name: "runtime", result: Err(error.to_string()), took: Duration::ZERO });
            }
        }
        let programs =
            loaded.programs().into_iter().map(|report| (report.name, report.verified_instructions));
        Self { splice, programs: programs.collect(), loaded: Some(loaded) }
    }

    /// Without BPF in the binary there is nothing to try.
    #[cfg(not(feature = "bpf"))]
    #[must_use]
    pub fn gather(_connections: u32, _marks: &Marks) -> Self {
        Self::untried("this binary was built without BPF (--no-default-features)")
    }

    /// Nothing was loaded, for this reason.
    #[must_use]
    pub fn untried(why: &str) -> Self {
        Self {
            splice: vec![Check { name: "load", result: Err(why.to_owned()), took: Duration::ZERO }],
            programs: Vec::new(),
            #[cfg(feature = "bpf")]
            loaded: None,
        }
    }

    /// Why the splice engine cannot run; `None` if it can.
    #[must_use]
    pub fn splice_fault(&self) -> Option<String> {
        self.splice.iter().find_map(|check| {
            let fault = check.result.as_ref().err()?;
            Some(format!("{}: {fault}", check.name))
        })
    }

    /// The loaded splice engine, if all its checks passed.
    #[cfg(feature = "bpf")]
    #[must_use]
    pub fn splice_engine(&self) -> Option<&Arc<crate::splice::Splice>> {
        self.loaded.as_ref().filter(|_| self.splice_fault().is_none())
    }

    /// The engine for a listener that asks for `choice`.
    ///
    /// # Errors
    /// Why the engine that was asked for by name cannot run.
    pub fn engine(&self, choice: EngineChoice) -> Result<Arc<dyn Engine>, String> {
        match (choice, self.splice_fault()) {
            (EngineChoice::Relay, _) | (EngineChoice::Auto, Some(_)) => Ok(Arc::new(Relay)),
            (EngineChoice::Splice, Some(fault)) => Err(fault),
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

    /// The name of the engine that `auto` takes.
    #[must_use]
    pub fn chosen(&self) -> &'static str {
        if self.splice_fault().is_none() { "splice" } else { "relay" }
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "splice");
        for check in &self.splice {
            let (mark, what) = match &check.result {
                Ok(seen) => ("ok    ", seen),
                Err(fault) => ("FAILED", fault),
            };
            let took = check.took.as_secs_f64() * 1000.0;
            let _ = writeln!(text, "  {mark}  {:<22} {took:>7.1} ms  {what}", check.name);
        }
        for (name, instructions) in &self.programs {
            let walked = instructions.map_or("?".to_owned(), |count| count.to_string());
            let _ = writeln!(text, "  program {name}: {walked} instructions walked by the verifier");
        }
        let _ = writeln!(text, "relay\n  ok      needs nothing of the kernel\n");
        let _ = match self.splice_fault() {
            None => writeln!(text, "engine = \"auto\" takes splice: all its checks passed"),
            Some(fault) => {
                writeln!(text, "engine = \"auto\" takes relay, since splice cannot run here: {fault}")
            }
        };
        text
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        let checks: Vec<_> = self
            .splice
            .iter()
            .map(|check| {
                json!({
                    "name": check.name,
                    "passed": check.result.is_ok(),
                    "detail": check.result.as_ref().unwrap_or_else(|fault| fault),
                    "seconds": check.took.as_secs_f64(),
                })
            })
            .collect();
        let programs: Vec<_> = self
            .programs
            .iter()
            .map(|(name, instructions)| json!({ "name": name, "verified_instructions": instructions }))
            .collect();
        json!({
            "auto": self.chosen(),
            "reason": self.splice_fault(),
            "splice": { "checks": checks, "programs": programs },
        })
    }
}
