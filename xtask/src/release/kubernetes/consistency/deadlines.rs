//! The kubelet waits longer than drain and shutdown take.

use std::time::Duration;

use serde_json::Value;

use super::{
    super::object::{list, text},
    config::Config,
};

/// The kubelet kills the pod after terminationGracePeriodSeconds, which include preStop.
pub(super) fn check(pod: &Value, daemon: &Value, config: &Config) -> Option<String> {
    let grace = Duration::from_secs(pod["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap_or(30));
    let command = list(&daemon["lifecycle"]["preStop"]["exec"]["command"]);
    let drain = command.iter().skip_while(|word| *word != "--deadline").nth(1);
    let drain = drain.and_then(|word| humantime::parse_duration(text(word)).ok()).unwrap_or_default();
    if !command.is_empty() && drain.is_zero() {
        return Some("preStop drains without a deadline".into());
    }
    let stop = config.stop.deadline;
    (grace <= drain + stop).then(|| {
        format!("killed after {grace:?}, but the drain takes {drain:?} and then the shutdown {stop:?}")
    })
}
