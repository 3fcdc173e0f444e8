//! The kubelet waits longer than drain and shutdown take, and a drain ends before a public address
//! moves.

use std::time::Duration;

use serde_json::Value;

use super::{
    super::object::{Object, list, text},
    config::Config,
};

/// The kubelet kills the pod after terminationGracePeriodSeconds, which include preStop.
pub(super) fn check(pod: &Value, daemon: &Value, config: &Config, objects: &[Object]) -> Vec<String> {
    let grace = Duration::from_secs(pod["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap_or(30));
    let command = list(&daemon["lifecycle"]["preStop"]["exec"]["command"]);
    let drain = command.iter().skip_while(|word| *word != "--deadline").nth(1);
    let drain = drain.and_then(|word| humantime::parse_duration(text(word)).ok()).unwrap_or_default();
    if !command.is_empty() && drain.is_zero() {
        return vec!["preStop drains without a deadline".into()];
    }
    let mut faults = Vec::new();
    let unready = earliest_unready(&daemon["readinessProbe"]);
    if objects.iter().any(moves) && drain > unready {
        faults.push(format!(
            "the drain takes {drain:?}, but the pod may be unready after {unready:?}: the public address moves then, \
             and sessions break without notice"
        ));
    }
    let stop = config.stop.deadline;
    if grace <= drain + stop {
        faults.push(format!(
            "killed after {grace:?}, but the drain takes {drain:?} and then the shutdown {stop:?}"
        ));
    }
    faults
}

/// How long a drain lasts at least when the probe has failed often enough: the first one may come at
/// once. Defaults of Kubernetes where the probe has no values.
fn earliest_unready(probe: &Value) -> Duration {
    let number = |name: &str, default| probe[name].as_u64().unwrap_or(default);
    let pauses = number("failureThreshold", 3).saturating_sub(1);
    Duration::from_secs(pauses * number("periodSeconds", 10))
}

/// Whether this is a Service whose address leaves a node with its last ready pod.
fn moves(object: &Object) -> bool {
    let spec = &object.0["spec"];
    object.kind() == "Service" && spec["type"] == "LoadBalancer" && spec["externalTrafficPolicy"] == "Local"
}
