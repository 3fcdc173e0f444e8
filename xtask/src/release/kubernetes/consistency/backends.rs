//! Backends are PROXY ports of the mail server, closed to all but the edge nodes.

use std::{collections::BTreeSet, net::SocketAddr};

use super::{
    super::object::{Object, list},
    config::{Config, Listener},
};

/// Every backend must be a PROXY port of the mail server, closed to all but the edge nodes.
pub(super) fn check(config: &Config, objects: &[Object], mail: &[Object]) -> Vec<String> {
    let mut faults = Vec::new();
    let (open, closed) = policy(mail);
    for listener in &config.listener {
        for backend in &listener.backends {
            let target = match backend.address().parse::<SocketAddr>() {
                Ok(pod) => translated(objects, listener, u64::from(pod.port())),
                Err(_) => served(mail, backend.address()),
            };
            let Some(target) = target else {
                faults.push(format!("listener {}: no Service leads to {}", listener.name, backend.address()));
                continue;
            };
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

/// The pod's port behind `NAME.NAMESPACE.svc.cluster.local:PORT`.
fn served(mail: &[Object], address: &str) -> Option<u64> {
    let (name, port) = address.rsplit_once(':')?;
    let (name, namespace) = name.strip_suffix(".svc.cluster.local")?.split_once('.')?;
    let service =
        mail.iter().find(|it| it.kind() == "Service" && it.name() == name && it.namespace() == namespace)?;
    let port: u64 = port.parse().ok()?;
    let port = list(&service.0["spec"]["ports"]).iter().find(|it| it["port"] == port)?;
    port["targetPort"].as_u64()
}

/// The pod's port that kube-proxy translates the listener's port to, if it is the expected one.
fn translated(objects: &[Object], listener: &Listener, expected: u64) -> Option<u64> {
    let port = u64::from(listener.bind.first()?.port());
    let services =
        objects.iter().filter(|it| it.kind() == "Service" && it.0["spec"]["type"] == "LoadBalancer");
    let mut ports = services.flat_map(|service| list(&service.0["spec"]["ports"]));
    ports.find(|it| it["port"] == port && it["targetPort"] == expected).map(|_| expected)
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
