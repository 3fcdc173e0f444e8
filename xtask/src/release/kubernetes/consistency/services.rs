//! Services lead to the injector's pods and keep the client's address, and none but a headless one leads
//! to a PROXY port.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{
    super::object::{Object, list, text},
    config::Config,
    find_service,
};

/// With this annotation a Service requests addresses of MetalLB.
const REQUESTED: &str = "metallb.io/loadBalancerIPs";

/// Checks the Services of the injector: selector, ports, traffic policy, and the configuration that
/// follows them.
pub(super) fn check(objects: &[Object], daemons: &Object, config: &Config) -> Vec<String> {
    let mut faults = Vec::new();
    for service in services(objects) {
        if service.namespace() == daemons.namespace() || is_public(service) {
            faults.extend(leads_to_pods(service, daemons));
        }
        if is_public(service) {
            faults.extend(keeps_clients(service, config));
        }
    }
    for name in config.own_services() {
        if find_service(objects, name).is_none() {
            faults.push(format!("the configuration follows Service {name}, which does not exist"));
        }
    }
    faults
}

/// kube-proxy leads clients to the ports of every Service that is not headless. Where no injector runs,
/// it would lead them past it.
pub(super) fn check_proxy_ports<'a>(
    all: impl Iterator<Item = &'a Object>,
    proxy_ports: &BTreeSet<u64>,
) -> Vec<String> {
    let mut faults = Vec::new();
    for service in all.filter(|object| object.kind() == "Service") {
        if service.0["spec"]["clusterIP"] == "None" {
            continue;
        }
        for port in list(&service.0["spec"]["ports"]) {
            let target = if port["targetPort"].is_null() { &port["port"] } else { &port["targetPort"] };
            if target.as_u64().is_some_and(|target| proxy_ports.contains(&target)) {
                faults.push(format!(
                    "{}: kube-proxy leads clients to PROXY port {target}; make the Service headless (clusterIP: None)",
                    service.id()
                ));
            }
        }
    }
    faults
}

fn services(objects: &[Object]) -> impl Iterator<Item = &Object> {
    objects.iter().filter(|object| object.kind() == "Service")
}

/// Whether it has an address outside of the cluster.
fn is_public(service: &Object) -> bool {
    let spec = &service.0["spec"];
    matches!(text(&spec["type"]), "LoadBalancer" | "NodePort") || !list(&spec["externalIPs"]).is_empty()
}

fn leads_to_pods(service: &Object, daemons: &Object) -> Vec<String> {
    let pod = &daemons.0["spec"]["template"];
    let mut faults = Vec::new();
    let spec = &service.0["spec"];
    if service.namespace() != daemons.namespace() || !selects(&spec["selector"], &pod["metadata"]["labels"]) {
        faults.push(format!("{} selects no pod of the DaemonSet", service.id()));
    }
    for port in list(&spec["ports"]) {
        let mut declared =
            list(&pod["spec"]["containers"]).iter().flat_map(|container| list(&container["ports"]));
        let target = &port["targetPort"];
        if !declared.any(|it| it["name"] == *target && it["containerPort"] == port["port"]) {
            faults.push(format!("{}: no container has port {} called {target}", service.id(), port["port"]));
        }
    }
    faults
}

/// A public Service keeps the client's address, or the listeners refuse the addresses that replace it.
/// Its addresses are those that engine inline takes.
fn keeps_clients(service: &Object, config: &Config) -> Vec<String> {
    let mut faults = Vec::new();
    let name = format!("{}/{}", service.namespace(), service.name());
    let local = service.0["spec"]["externalTrafficPolicy"] == "Local";
    for listener in &config.listener {
        if !local && listener.translated_sources.is_empty() {
            faults.push(format!(
                "listener {}: the client's address is lost without externalTrafficPolicy: Local, and there are no \
                 translated_sources that would be refused",
                listener.name
            ));
        }
        let listed = |wanted: &str| listener.virtual_addresses.iter().any(|it| it.is(wanted));
        let requested = text(&service.0["metadata"]["annotations"][REQUESTED]);
        if !listed(&name) && (requested.is_empty() || !requested.split(',').all(listed)) {
            faults
                .push(format!("listener {}: virtual_addresses lack those of Service {name}", listener.name));
        }
    }
    faults
}

pub(super) fn selects(selector: &Value, labels: &Value) -> bool {
    let selector = selector.as_object();
    selector.is_some_and(|selector| {
        !selector.is_empty() && selector.iter().all(|(name, value)| labels[name] == *value)
    })
}
