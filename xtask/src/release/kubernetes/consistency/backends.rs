//! Backends are PROXY ports of the mail server: of a headless Service, and closed to all but the edge
//! nodes.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use super::{
    super::object::{Object, list},
    config::{Backend, Config, ServicePort},
    find_service,
};

/// Every backend must be a PROXY port of the mail server, closed to all but the edge nodes. Every such
/// port must be a backend.
pub(super) fn check(config: &Config, mail: &[Object]) -> Vec<String> {
    let mut faults = Vec::new();
    let policy = Policy::read(mail);
    let mut used = BTreeSet::new();
    for listener in &config.listener {
        for backend in &listener.backends {
            match port(backend, mail) {
                Ok(port) => used.extend([port]),
                Err(why) => faults.push(format!("listener {}: {why}", listener.name)),
            }
        }
    }
    for port in &used {
        if policy.open.contains(port) {
            faults.push(format!("other pods can reach port {port}, which is a PROXY port"));
        }
        if !policy.closed.contains(port) {
            faults.push(format!("no policy allows the edge nodes to reach port {port}"));
        }
    }
    for port in policy.closed.difference(&used) {
        faults.push(format!("the policy lets the edge nodes reach port {port}, which is no backend"));
    }
    faults
}

/// The ports of the mail pods that expect the PROXY header.
pub(super) fn proxy_ports(config: &Config, mail: &[Object]) -> BTreeSet<u64> {
    let backends = config.listener.iter().flat_map(|listener| &listener.backends);
    backends.filter_map(|backend| port(backend, mail).ok()).collect()
}

/// The port of the mail pod behind a backend.
fn port(backend: &Backend, mail: &[Object]) -> Result<u64, String> {
    let (service, port) = match backend {
        Backend::Address(address) | Backend::Table { address } => {
            let pod: SocketAddr = address.parse().map_err(|_| {
                format!("backend {address}: name the Service, so that the injector follows its pods")
            })?;
            return Ok(u64::from(pod.port()));
        }
        Backend::Service { service, port } => (service, port),
    };
    let object = find_service(mail, service).ok_or_else(|| format!("there is no Service {service}"))?;
    let spec = &object.0["spec"];
    let named = list(&spec["ports"]).iter().find(|it| match port {
        ServicePort::Name(name) => it["name"] == *name,
        ServicePort::Number(number) => it["targetPort"] == *number,
    });
    let named = named.ok_or_else(|| format!("Service {service} has no port {port:?}"))?;
    named["targetPort"].as_u64().ok_or_else(|| format!("Service {service}: the target port has no number"))
}

/// Who may reach which ports of the mail pod.
struct Policy {
    /// Ports that pods may reach.
    open: BTreeSet<u64>,
    /// Ports that only listed addresses may reach.
    closed: BTreeSet<u64>,
}

impl Policy {
    fn read(mail: &[Object]) -> Self {
        let (mut open, mut closed) = (BTreeSet::new(), BTreeSet::new());
        for policy in mail.iter().filter(|object| object.kind() == "NetworkPolicy") {
            for rule in list(&policy.0["spec"]["ingress"]) {
                let ports = list(&rule["ports"]).iter().filter_map(|port| port["port"].as_u64());
                if sources(rule).is_empty() { open.extend(ports) } else { closed.extend(ports) }
            }
        }
        Self { open, closed }
    }
}

/// The single addresses that a rule allows; none if it allows anything else too.
fn sources(rule: &serde_json::Value) -> Vec<IpAddr> {
    let single = |peer: &serde_json::Value| {
        let (address, length) = peer["ipBlock"]["cidr"].as_str()?.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let whole = if address.is_ipv4() { "32" } else { "128" };
        (length == whole).then_some(address)
    };
    list(&rule["from"]).iter().map(single).collect::<Option<Vec<_>>>().unwrap_or_default()
}

/// The addresses of the edge nodes, as the policy lists them.
#[cfg(test)]
pub(in crate::release::kubernetes) fn edge_addresses(mail: &[Object]) -> Vec<IpAddr> {
    let policies = mail.iter().filter(|object| object.kind() == "NetworkPolicy");
    policies.flat_map(|policy| list(&policy.0["spec"]["ingress"])).flat_map(sources).collect()
}
