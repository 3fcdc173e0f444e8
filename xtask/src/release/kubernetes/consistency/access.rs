//! What the API server lets the injector do: read endpoints and Services, in the namespaces of its
//! configuration alone.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{
    super::object::{Object, list, text},
    config::Config,
};

/// What every container that reads the API server mounts the token at (client libraries, as
/// `rest.InClusterConfig` of Kubernetes' own, expect it there).
const TOKEN_FOLDER: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const READING: [&str; 2] = ["list", "watch"];
/// API group and resource.
const ENDPOINTS: (&str, &str) = ("discovery.k8s.io", "endpointslices");
const SERVICES: (&str, &str) = ("", "services");

/// Checks the Roles, and which containers have the token.
pub(super) fn check(objects: &[Object], daemons: &Object, config: &Config) -> Vec<String> {
    let mut faults = least_privilege(objects);
    let account = (daemons.namespace(), text(&daemons.0["spec"]["template"]["spec"]["serviceAccountName"]));
    let mut needed: BTreeSet<(&str, (&str, &str), &str)> = BTreeSet::new();
    // `injector doctor --kubernetes` reads the Services of backends, too.
    for service in config.backend_services().chain(config.own_services()) {
        for resource in [ENDPOINTS, SERVICES] {
            needed.extend(READING.map(|verb| (namespace(service), resource, verb)));
        }
    }
    let granted = granted(objects, account);
    for (namespace, (group, resource), verb) in &needed {
        if !granted.contains(&(*namespace, *group, *resource, *verb)) {
            faults.push(format!("no Role in namespace {namespace} lets the injector {verb} {resource}"));
        }
    }
    for (namespace, group, resource, verb) in &granted {
        if !needed.contains(&(*namespace, (*group, *resource), *verb)) {
            faults.push(format!(
                "a Role in namespace {namespace} lets the injector {verb} {resource}, which it does not need"
            ));
        }
    }
    faults.extend(token(daemons, !needed.is_empty()));
    faults
}

fn namespace(service: &str) -> &str {
    service.split_once('/').map_or("", |(namespace, _)| namespace)
}

/// No object rules the whole cluster, or lets anything but read endpoints and Services.
fn least_privilege(objects: &[Object]) -> Vec<String> {
    let mut faults = Vec::new();
    for object in objects {
        if object.kind().starts_with("ClusterRole") {
            faults.push(format!("{}: it would hold in the whole cluster", object.id()));
        }
        if object.kind() != "Role" {
            continue;
        }
        for (group, resource, verb) in list(&object.0["rules"]).iter().flat_map(grants) {
            if ![ENDPOINTS, SERVICES].contains(&(group, resource)) || !READING.contains(&verb) {
                faults.push(format!("{}: it lets the injector {verb} {resource}", object.id()));
            }
        }
    }
    faults
}

/// API group, resource and verb of everything that a rule grants.
fn grants(rule: &Value) -> Vec<(&str, &str, &str)> {
    let mut grants = Vec::new();
    for group in list(&rule["apiGroups"]) {
        for resource in list(&rule["resources"]) {
            grants.extend(list(&rule["verbs"]).iter().map(|verb| (text(group), text(resource), text(verb))));
        }
    }
    grants
}

/// Namespace, API group, resource and verb of all that bindings grant to an account.
fn granted<'a>(
    objects: &'a [Object],
    (account_namespace, account): (&str, &str),
) -> BTreeSet<(&'a str, &'a str, &'a str, &'a str)> {
    let mut granted = BTreeSet::new();
    for binding in objects.iter().filter(|object| object.kind() == "RoleBinding") {
        let bound = list(&binding.0["subjects"]).iter().any(|subject| {
            subject["kind"] == "ServiceAccount"
                && subject["name"] == account
                && subject["namespace"] == account_namespace
        });
        let role = &binding.0["roleRef"];
        let roles = objects.iter().filter(|object| {
            bound
                && object.kind() == text(&role["kind"])
                && object.name() == text(&role["name"])
                && object.namespace() == binding.namespace()
        });
        for rule in roles.flat_map(|role| list(&role.0["rules"])) {
            granted.extend(
                grants(rule)
                    .into_iter()
                    .map(|(group, resource, verb)| (binding.namespace(), group, resource, verb)),
            );
        }
    }
    granted
}

/// Only the daemon has the token, and only if it needs it.
fn token(daemons: &Object, needed: bool) -> Vec<String> {
    let pod = &daemons.0["spec"]["template"]["spec"];
    let mut faults = Vec::new();
    if pod["automountServiceAccountToken"] != false {
        faults.push("automountServiceAccountToken gives every container the token".into());
    }
    let has_token = |volume: &&Value| {
        list(&volume["projected"]["sources"]).iter().any(|source| source["serviceAccountToken"].is_object())
    };
    let volumes: Vec<_> =
        list(&pod["volumes"]).iter().filter(has_token).map(|it| text(&it["name"])).collect();
    for container in list(&pod["containers"]) {
        let daemon = container["name"] == "injector";
        let mut mounts = list(&container["volumeMounts"]).iter();
        let token = mounts.find(|mount| volumes.contains(&text(&mount["name"])));
        match token {
            Some(_) if !daemon => faults.push(format!("container {} has the token", container["name"])),
            Some(mount) if mount["mountPath"] != TOKEN_FOLDER => {
                faults.push(format!("the token is at {}, not at {TOKEN_FOLDER}", mount["mountPath"]));
            }
            Some(_) if !needed => faults.push("the injector has a token that it does not need".into()),
            None if daemon && needed => faults.push("the injector has no token for the API server".into()),
            _ => {}
        }
    }
    faults
}
