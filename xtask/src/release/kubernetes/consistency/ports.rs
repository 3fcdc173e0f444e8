//! The pod declares the ports that the daemon opens.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{super::object::list, config::Config, operator_ports::OPERATOR_PORTS};

/// The scheduler reserves the declared ports, so they must be those that the daemon opens.
pub(super) fn check(daemon: &Value, config: &Config) -> Option<String> {
    let declared: BTreeSet<u64> = list(&daemon["ports"])
        .iter()
        .filter(|port| OPERATOR_PORTS.iter().all(|(name, _)| port["name"] != *name))
        .filter_map(|port| port["containerPort"].as_u64())
        .collect();
    let opened = config.listener.iter().flat_map(|listener| &listener.bind);
    let opened: BTreeSet<u64> = opened.map(|address| u64::from(address.port())).collect();
    (declared != opened)
        .then(|| format!("the pod declares the ports {declared:?}, the configuration opens {opened:?}"))
}
