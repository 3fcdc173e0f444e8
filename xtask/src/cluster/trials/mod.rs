//! The trials: each has a name, a configuration of the injector, and what must be seen.

mod address;
mod disturbance;
mod security;
mod speaker;
mod usage;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::{
    deploy::{self, Edge},
    machines::Cluster,
    mail,
    plan::Node,
};
use crate::interruption::is_interrupted;

/// Within this time after a change mail must flow again.
const RECOVERY: Duration = Duration::from_secs(30);

/// What a trial may use.
struct Testbed<'a> {
    cluster: &'a Cluster,
    /// The configuration that is deployed.
    edge: Edge,
}

/// What a trial does. It returns what was seen; an error is a failure.
type Run = Box<dyn Fn(&Testbed<'_>) -> Result<String>>;

struct Trial {
    name: String,
    edge: Edge,
    run: Run,
}

fn trial(
    name: impl Into<String>,
    edge: Edge,
    run: impl Fn(&Testbed<'_>) -> Result<String> + 'static,
) -> Trial {
    Trial { name: name.into(), edge, run: Box::new(run) }
}

/// All trials, in the order in which they run: those of one configuration after another.
fn all() -> Vec<Trial> {
    let mut all: Vec<_> = [security::trials(), address::trials(), disturbance::trials(), usage::trials()]
        .into_iter()
        .flatten()
        .collect();
    all.sort_by_key(|trial| (trial.edge.policy == "Cluster", trial.edge.engine == "inline"));
    all
}

pub(super) fn list() {
    all().iter().for_each(|trial| println!("{}", trial.name));
}

/// Runs the trials whose name contains one of the filters, or all; whether all passed.
///
/// # Errors
/// When no trial has such a name, or the operator interrupted them.
pub(super) fn run(cluster: &Cluster, filters: &[String]) -> Result<bool> {
    let wanted = |trial: &Trial| filters.is_empty() || filters.iter().any(|it| trial.name.contains(it));
    let trials: Vec<_> = all().into_iter().filter(wanted).collect();
    ensure!(!trials.is_empty(), "no trial has a name like this; --list prints them");
    let mut failed = Vec::new();
    let mut deployed = None;
    println!();
    for trial in &trials {
        let begun = Instant::now();
        let outcome = run_one(cluster, trial, &mut deployed);
        ensure!(!is_interrupted(), "interrupted");
        let seconds = begun.elapsed().as_secs_f32();
        match outcome {
            Ok(seen) => println!("PASS  {seconds:5.1} s  {}: {seen}", trial.name),
            Err(error) => {
                println!("FAIL  {seconds:5.1} s  {}: {error:#}", trial.name);
                failed.push(trial.name.as_str());
                // What a failed trial leaves is not known.
                deployed = None;
            }
        }
    }
    println!("\n{} passed, {} failed", trials.len() - failed.len(), failed.len());
    failed.iter().for_each(|name| println!("FAILED  {name}"));
    Ok(failed.is_empty())
}

fn run_one(cluster: &Cluster, trial: &Trial, deployed: &mut Option<Edge>) -> Result<String> {
    if *deployed != Some(trial.edge) {
        deploy::deploy(cluster, trial.edge).context("cannot deploy the injector")?;
        *deployed = Some(trial.edge);
    }
    let seen = (trial.run)(&Testbed { cluster, edge: trial.edge })?;
    // Whatever a trial does, a node never counts as the client.
    let nodes: Vec<_> = Node::ALL.iter().flat_map(|node| [node.address(), node.pod(1)]).collect();
    mail::ensure_never_client(cluster, &nodes)?;
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_differ_and_configurations_change_seldom() {
        let all = all();
        let names: BTreeSet<_> = all.iter().map(|trial| trial.name.as_str()).collect();
        assert_eq!(names.len(), all.len());
        let changes = all.windows(2).filter(|pair| pair[0].edge != pair[1].edge).count();
        assert_eq!(changes, 3);
    }
}
