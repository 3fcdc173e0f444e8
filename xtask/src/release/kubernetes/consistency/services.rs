//! Services lead to the pods, and keep the client's address.

use serde_json::Value;

use super::super::object::{Object, list};

/// Checks the Services in the DaemonSet's namespace: selector, ports, and traffic policy.
pub(super) fn check(objects: &[Object], daemons: &Object) -> Vec<String> {
    let pod = &daemons.0["spec"]["template"];
    let mut faults = Vec::new();
    let in_namespace =
        |service: &&Object| service.kind() == "Service" && service.namespace() == daemons.namespace();
    for service in objects.iter().filter(in_namespace) {
        let spec = &service.0["spec"];
        if !selects(&spec["selector"], &pod["metadata"]["labels"]) {
            faults.push(format!("{} selects no pod of the DaemonSet", service.id()));
        }
        for port in list(&spec["ports"]) {
            let declared =
                list(&pod["spec"]["containers"]).iter().flat_map(|container| list(&container["ports"]));
            let target = &port["targetPort"];
            if !declared.into_iter().any(|it| it["name"] == *target && it["containerPort"] == port["port"]) {
                faults.push(format!(
                    "{}: no container has port {} called {target}",
                    service.id(),
                    port["port"]
                ));
            }
        }
        if spec["type"] == "LoadBalancer" && spec["externalTrafficPolicy"] != "Local" {
            faults.push(format!(
                "{}: the client's address is lost without externalTrafficPolicy: Local",
                service.id()
            ));
        }
    }
    faults
}

fn selects(selector: &Value, labels: &Value) -> bool {
    let selector = selector.as_object();
    selector.is_some_and(|selector| {
        !selector.is_empty() && selector.iter().all(|(name, value)| labels[name] == *value)
    })
}
