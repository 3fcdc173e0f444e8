//! Backends are PROXY ports of the mail server, closed to all but the edge nodes.

use std::{collections::BTreeSet, net::SocketAddr};

use super::{
    super::object::{Object, list},
    config::Config,
};

/// Every backend must be a PROXY port of the mail server, closed to all but the edge nodes.
pub(super) fn check(config: &Config, mail: &[Object]) -> Vec<String> {
    let mut faults = Vec::new();
    let (open, closed) = policy(mail);
    for listener in &config.listener {
        for backend in &listener.backends {
            let target = match backend.address().parse::<SocketAddr>() {
                Ok(pod) => Some((u64::from(pod.port()), true)),
                Err(_) => served(mail, backend.address()),
            };
            let Some((target, headless)) = target else {
                faults.push(format!("listener {}: no Service leads to {}", listener.name, backend.address()));
                continue;
            };
            if listener.engine == "inline" && !headless {
                faults.push(format!(
                    "listener {}: engine inline needs pods' own addresses: {} has a cluster IP",
                    listener.name,
                    backend.address()
                ));
            }
            if open.contains(&target) {
                faults.push(format!("listener {}: other pods can reach port {target}", listener.name));
            }
            if !closed.contains(&target) {
                faults.push(format!(
                    "listener {}: no policy allows the edge nodes to reach port {target}",
                    listener.name
                ));
            }
        }
    }
    faults
}

/// The pod's port behind `NAME.NAMESPACE.svc.cluster.local:PORT`, and whether the name has the pods' own
/// addresses.
fn served(mail: &[Object], address: &str) -> Option<(u64, bool)> {
    let (name, port) = address.rsplit_once(':')?;
    let (name, namespace) = name.strip_suffix(".svc.cluster.local")?.split_once('.')?;
    let service =
        mail.iter().find(|it| it.kind() == "Service" && it.name() == name && it.namespace() == namespace)?;
    let port: u64 = port.parse().ok()?;
    let port = list(&service.0["spec"]["ports"]).iter().find(|it| it["port"] == port)?;
    Some((port["targetPort"].as_u64()?, service.0["spec"]["clusterIP"] == "None"))
}

/// Ports of the mail pod that pods may reach, and ports that only listed addresses may reach.
fn policy(mail: &[Object]) -> (BTreeSet<u64>, BTreeSet<u64>) {
    let (mut open, mut closed) = (BTreeSet::new(), BTreeSet::new());
    for policy in mail.iter().filter(|object| object.kind() == "NetworkPolicy") {
        for rule in list(&policy.0["spec"]["ingress"]) {
            let from = list(&rule["from"]);
            let named = !from.is_empty() && from.iter().all(|peer| peer["ipBlock"].is_object());
            let ports = list(&rule["ports"]).iter().filter_map(|port| port["port"].as_u64());
            if named { closed.extend(ports) } else { open.extend(ports) }
        }
    }
    (open, closed)
}
