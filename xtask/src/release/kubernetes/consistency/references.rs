//! A pod refers only to existing objects.

use serde_json::Value;

use super::super::object::{Object, list, text};

/// Checks a pod's volumes, ConfigMaps, service account and priority class.
pub(super) fn check(object: &Object, objects: &[Object]) -> Vec<String> {
    let pod = match object.kind() {
        "DaemonSet" => &object.0["spec"]["template"],
        "CronJob" => &object.0["spec"]["jobTemplate"]["spec"]["template"],
        _ => return Vec::new(),
    };
    let mut faults = Vec::new();
    let mut wanted = |kind: &str, name: &Value| {
        let there = objects.iter().any(|it| it.kind() == kind && it.name() == text(name));
        if name.is_string() && !there {
            faults.push(format!("{}: there is no {kind} {name}", object.id()));
        }
    };
    wanted("ServiceAccount", &pod["spec"]["serviceAccountName"]);
    wanted("PriorityClass", &pod["spec"]["priorityClassName"]);
    let volumes = list(&pod["spec"]["volumes"]);
    volumes.iter().for_each(|volume| wanted("ConfigMap", &volume["configMap"]["name"]));
    for container in list(&pod["spec"]["containers"]) {
        for mount in list(&container["volumeMounts"]) {
            if !volumes.iter().any(|volume| volume["name"] == mount["name"]) {
                faults.push(format!("{}: there is no volume {}", object.id(), mount["name"]));
            }
        }
    }
    faults
}
