//! The ports of metrics and probes are the same everywhere.

use serde_json::Value;

use super::super::object::{list, text, variable};

/// The ports without mail: name in the pod, and the variable with their address.
pub(super) const OPERATOR_PORTS: [(&str, &str); 2] =
    [("metrics", "INJECTOR_METRICS_LISTEN"), ("health", "INJECTOR_HEALTH_LISTEN")];

/// Compares the ports in the pod, its environment, its annotations and its probes.
pub(super) fn check(pod: &Value, daemon: &Value) -> Vec<String> {
    let port_named = |name: &str| {
        let port = list(&daemon["ports"]).iter().find(|port| port["name"] == name);
        port.map_or_else(String::new, |port| port["containerPort"].to_string())
    };
    let mut faults = Vec::new();
    for (name, variable_name) in OPERATOR_PORTS {
        let port = port_named(name);
        // The node's address has either family, so no other text may stand around it.
        let listens = variable(daemon, variable_name);
        if listens != format!("$(NODE_ADDRESS):{port}") {
            faults.push(format!("port `{name}` is {port}, {variable_name} has {listens}"));
        }
    }
    let scraped = &pod["metadata"]["annotations"]["prometheus.io/port"];
    let metrics = port_named("metrics");
    if !scraped.is_null() && text(scraped) != metrics {
        faults.push(format!("port `metrics` is {metrics}, prometheus.io/port is {scraped}"));
    }
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        if daemon[probe]["httpGet"]["port"] != "health" {
            faults.push(format!("{probe} does not use port `health`"));
        }
    }
    faults
}
