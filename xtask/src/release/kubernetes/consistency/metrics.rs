//! The port of the metrics is the same everywhere.

use serde_json::Value;

use super::super::object::{list, text, variable};

/// Compares the port in the pod, its environment, its annotations and its probes.
pub(super) fn check(pod: &Value, daemon: &Value) -> Vec<String> {
    let port = list(&daemon["ports"]).iter().find(|port| port["name"] == "metrics");
    let port = port.map_or_else(String::new, |port| port["containerPort"].to_string());
    let listens = variable(daemon, "INJECTOR_METRICS_LISTEN").rsplit(':').next().unwrap_or_default();
    let scraped = &pod["metadata"]["annotations"]["prometheus.io/port"];
    let mut faults = Vec::new();
    if listens != port {
        faults.push(format!("port `metrics` is {port}, INJECTOR_METRICS_LISTEN has {listens}"));
    }
    if !scraped.is_null() && text(scraped) != port {
        faults.push(format!("port `metrics` is {port}, prometheus.io/port is {scraped}"));
    }
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        if daemon[probe]["httpGet"]["port"] != "metrics" {
            faults.push(format!("{probe} does not use port `metrics`"));
        }
    }
    faults
}
