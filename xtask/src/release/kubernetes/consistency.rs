//! Whether the objects, and the configuration in them, agree with each other: what a schema cannot know and an API server would
//! only show by pods that do not start or mail that does not come.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use serde::Deserialize;
use serde_json::Value;

use super::object::{Object, list, text};

/// The file in the ConfigMap.
pub(super) const CONFIG: &str = "injector.toml";

/// As much of the configuration as other objects have to agree with.
#[derive(Debug, Deserialize)]
struct Config {
    admin: Admin,
    stop: Stop,
    listener: Vec<Listener>,
}

#[derive(Debug, Deserialize)]
struct Admin {
    socket: String,
}

#[derive(Debug, Deserialize)]
struct Stop {
    #[serde(deserialize_with = "duration")]
    deadline: Duration,
}

#[derive(Debug, Deserialize)]
struct Listener {
    name: String,
    bind: Vec<SocketAddr>,
    #[serde(default)]
    engine: String,
    backends: Vec<Backend>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Backend {
    Plain(String),
    Table { address: String },
}

impl Backend {
    fn address(&self) -> &str {
        match self {
            Self::Plain(address) | Self::Table { address } => address,
        }
    }
}

fn duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    humantime::parse_duration(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

/// Every disagreement among the objects of one overlay, and with the mail server's.
///
/// # Errors
/// When the objects that are to agree are not there at all.
pub(super) fn faults(objects: &[Object], mail: &[Object]) -> Result<Vec<String>> {
    let daemons = find(objects, "DaemonSet").context("no DaemonSet")?;
    let pod = &daemons.0["spec"]["template"];
    let daemon = container(pod, "injector").context("no container `injector`")?;
    let map = objects
        .iter()
        .find(|object| object.kind() == "ConfigMap" && object.0["data"][CONFIG].is_string())
        .context("no ConfigMap with a configuration")?;
    let config: Config = toml::from_str(text(&map.0["data"][CONFIG])).context("the configuration")?;
    let mut faults = Vec::new();
    for object in objects {
        faults.extend(references(object, objects));
    }
    faults.extend(ports(daemon, &config));
    faults.extend(metrics(pod, daemon));
    faults.extend(deadlines(pod, daemon, &config));
    faults.extend(rollout(&daemons.0));
    faults.extend(reload(pod, &config));
    faults.extend(services(objects, daemons));
    faults.extend(backends(&config, objects, mail));
    Ok(faults)
}

fn find<'a>(objects: &'a [Object], kind: &str) -> Option<&'a Object> {
    objects.iter().find(|object| object.kind() == kind)
}

fn container<'a>(pod: &'a Value, name: &str) -> Option<&'a Value> {
    list(&pod["spec"]["containers"]).iter().find(|container| container["name"] == name)
}

fn variable<'a>(container: &'a Value, name: &str) -> &'a str {
    list(&container["env"])
        .iter()
        .find(|variable| variable["name"] == name)
        .map_or("", |variable| text(&variable["value"]))
}

/// What a pod names has to be among the objects: volumes, ConfigMaps, the service account, the priority class.
fn references(object: &Object, objects: &[Object]) -> Vec<String> {
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

/// The ports that the scheduler keeps free are those that the daemon opens; with engine inline it opens none.
fn ports(daemon: &Value, config: &Config) -> Option<String> {
    let declared: BTreeSet<u64> = list(&daemon["ports"])
        .iter()
        .filter(|port| port["name"] != "metrics")
        .filter_map(|port| port["containerPort"].as_u64())
        .collect();
    let opened = config.listener.iter().filter(|listener| listener.engine != "inline");
    let opened: BTreeSet<u64> =
        opened.flat_map(|listener| &listener.bind).map(|address| u64::from(address.port())).collect();
    (declared != opened)
        .then(|| format!("the pod declares the ports {declared:?}, the configuration opens {opened:?}"))
}

/// One port for metrics, wherever it is named.
fn metrics(pod: &Value, daemon: &Value) -> Vec<String> {
    let port = list(&daemon["ports"]).iter().find(|port| port["name"] == "metrics");
    let port = port.map_or_else(String::new, |port| port["containerPort"].to_string());
    let listens = variable(daemon, "INJECTOR_METRICS_LISTEN").rsplit(':').next().unwrap_or_default();
    let scraped = &pod["metadata"]["annotations"]["prometheus.io/port"];
    let mut faults = Vec::new();
    if listens != port {
        faults.push(format!("port `metrics` is {port}, INJECTOR_METRICS_LISTEN says {listens}"));
    }
    if !scraped.is_null() && text(scraped) != port {
        faults.push(format!("port `metrics` is {port}, prometheus.io/port {scraped}"));
    }
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        if daemon[probe]["httpGet"]["port"] != "metrics" {
            faults.push(format!("{probe} does not ask port `metrics`"));
        }
    }
    faults
}

/// The kubelet kills after terminationGracePeriodSeconds, preStop included.
fn deadlines(pod: &Value, daemon: &Value, config: &Config) -> Option<String> {
    let grace = Duration::from_secs(pod["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap_or(30));
    let command = list(&daemon["lifecycle"]["preStop"]["exec"]["command"]);
    let drain = command.iter().skip_while(|word| *word != "--deadline").nth(1);
    let drain = drain.and_then(|word| humantime::parse_duration(text(word)).ok()).unwrap_or_default();
    if !command.is_empty() && drain.is_zero() {
        return Some("preStop drains without a deadline".into());
    }
    let stop = config.stop.deadline;
    (grace <= drain + stop)
        .then(|| format!("killed after {grace:?}, but drains for {drain:?} and then stops for {stop:?}"))
}

/// Two pods that name a host port cannot be on one node.
fn rollout(daemons: &Value) -> Option<String> {
    let update = &daemons["spec"]["updateStrategy"]["rollingUpdate"];
    (daemons["spec"]["template"]["spec"]["hostNetwork"] == true && update["maxSurge"] != 0).then(|| {
        "maxSurge must be 0 in the host's network: the new pod would wait for the old one's ports".into()
    })
}

/// The second container asks the first by its socket to read the same file.
fn reload(pod: &Value, config: &Config) -> Vec<String> {
    let (Some(daemon), Some(reload)) = (container(pod, "injector"), container(pod, "reload")) else {
        return vec!["no container `reload`".into()];
    };
    let mut faults = Vec::new();
    let file = variable(daemon, "INJECTOR_CONFIG");
    if !list(&reload["args"]).iter().any(|word| word == file) {
        faults.push(format!("the container `reload` does not watch {file}"));
    }
    let socket = variable(reload, "INJECTOR_SOCKET");
    if socket != config.admin.socket {
        faults.push(format!(
            "the container `reload` asks {socket}, the injector listens on {}",
            config.admin.socket
        ));
    }
    for (name, container) in [("injector", daemon), ("reload", reload)] {
        for path in [file, socket] {
            let mounts = list(&container["volumeMounts"]);
            let shared = mounts.iter().any(|mount| {
                let under = path.strip_prefix(text(&mount["mountPath"]));
                under.is_some_and(|rest| rest.starts_with('/')) && mount["subPath"].is_null()
            });
            if !shared {
                faults.push(format!("{path} is in no volume of the container `{name}`"));
            }
        }
    }
    faults
}

/// A Service beside the DaemonSet leads to its pods, by ports they have, and keeps the client's address.
fn services(objects: &[Object], daemons: &Object) -> Vec<String> {
    let pod = &daemons.0["spec"]["template"];
    let mut faults = Vec::new();
    let beside =
        |service: &&Object| service.kind() == "Service" && service.namespace() == daemons.namespace();
    for service in objects.iter().filter(beside) {
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

/// Every backend is a port of the mail server that demands the header, and that is closed to everybody but the edge nodes.
fn backends(config: &Config, objects: &[Object], mail: &[Object]) -> Vec<String> {
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
                faults.push(format!("listener {}: other pods reach port {target}, too", listener.name));
            }
            if !closed.contains(&target) {
                faults.push(format!(
                    "listener {}: no policy lets the edge nodes to port {target}",
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

/// The pod's port that kube-proxy translates the listener's to, if it is the one that the listener expects.
fn translated(objects: &[Object], listener: &Listener, expected: u64) -> Option<u64> {
    let port = u64::from(listener.bind.first()?.port());
    let services =
        objects.iter().filter(|it| it.kind() == "Service" && it.0["spec"]["type"] == "LoadBalancer");
    let mut ports = services.flat_map(|service| list(&service.0["spec"]["ports"]));
    ports.find(|it| it["port"] == port && it["targetPort"] == expected).map(|_| expected)
}

/// Ports of the mail pod that pods may reach, and that addresses named one by one may.
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

#[cfg(test)]
mod tests {
    use super::*;

    const EDGE: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: config, namespace: edge}
data:
  injector.toml: |
    admin.socket = "/run/injector/admin.sock"
    stop.deadline = "30s"
    [[listener]]
    name = "smtp"
    bind = ["[::]:25"]
    backends = ["proxied.mail.svc.cluster.local:2525"]
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: account, namespace: edge}
---
apiVersion: v1
kind: Service
metadata: {name: public, namespace: edge}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  selector: {app: edge}
  ports: [{port: 25, targetPort: smtp}]
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: injector, namespace: edge}
spec:
  updateStrategy: {rollingUpdate: {maxSurge: 0}}
  template:
    metadata: {labels: {app: edge, tier: one}, annotations: {prometheus.io/port: "9145"}}
    spec:
      hostNetwork: true
      serviceAccountName: account
      terminationGracePeriodSeconds: 300
      containers:
        - name: injector
          env:
            - {name: INJECTOR_CONFIG, value: /etc/injector/injector.toml}
            - {name: INJECTOR_METRICS_LISTEN, value: "$(NODE):9145"}
          ports: [{name: smtp, containerPort: 25}, {name: metrics, containerPort: 9145}]
          startupProbe: {httpGet: {port: metrics}}
          livenessProbe: {httpGet: {port: metrics}}
          readinessProbe: {httpGet: {port: metrics}}
          lifecycle: {preStop: {exec: {command: [injector, drain, --deadline, 240s]}}}
          volumeMounts: [{name: c, mountPath: /etc/injector}, {name: r, mountPath: /run/injector}]
        - name: reload
          args: [reload, --watch, /etc/injector/injector.toml]
          env: [{name: INJECTOR_SOCKET, value: /run/injector/admin.sock}]
          volumeMounts: [{name: c, mountPath: /etc/injector}, {name: r, mountPath: /run/injector}]
      volumes: [{name: c, configMap: {name: config}}, {name: r, emptyDir: {}}]
"#;
    const MAIL: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: proxied, namespace: mail}
spec: {ports: [{port: 2525, targetPort: 2525}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: mail, namespace: mail}
spec:
  ingress:
    - {from: [{namespaceSelector: {}}], ports: [{port: 993}]}
    - {from: [{ipBlock: {cidr: 10.0.0.1/32}}], ports: [{port: 2525}]}
"#;

    fn told(edge: &str, mail: &str) -> Vec<String> {
        faults(&Object::parse(edge).unwrap(), &Object::parse(mail).unwrap()).unwrap()
    }

    #[test]
    fn objects_that_agree_are_left_in_peace() {
        assert_eq!(told(EDGE, MAIL), [""; 0]);
        let weighted = r#"[{ address = "proxied.mail.svc.cluster.local:2525", weight = 2 }]"#;
        assert_eq!(
            told(&EDGE.replace(r#"["proxied.mail.svc.cluster.local:2525"]"#, weighted), MAIL),
            [""; 0]
        );
    }

    #[test]
    fn every_disagreement_is_told() {
        for (from, to, expected) in [
            ("[::]:25", "[::]:26", "declares the ports {25}, the configuration opens {26}"),
            (":9145\"}\n", ":9146\"}\n", "INJECTOR_METRICS_LISTEN says 9146"),
            ("prometheus.io/port: \"9145\"", "prometheus.io/port: \"80\"", "prometheus.io/port \"80\""),
            ("readinessProbe: {httpGet: {port: metrics}}", "", "readinessProbe does not ask"),
            ("Seconds: 300", "Seconds: 270", "killed after 270s, but drains for 240s and then stops for 30s"),
            (", --deadline, 240s", "", "without a deadline"),
            ("maxSurge: 0", "maxSurge: 1", "maxSurge must be 0"),
            ("serviceAccountName: account", "serviceAccountName: other", "no ServiceAccount \"other\""),
            ("configMap: {name: config}", "configMap: {name: other}", "no ConfigMap \"other\""),
            (
                "[{name: c, mountPath: /etc/injector}",
                "[{name: x, mountPath: /etc/injector}",
                "no volume \"x\"",
            ),
            ("--watch, /etc", "--watch, /tmp", "does not watch /etc/injector/injector.toml"),
            ("value: /run/injector/admin.sock", "value: /run/injector/a.sock", "asks /run/injector/a.sock"),
            ("/etc/injector}, {name: r", "/etc/injector, subPath: f}, {name: r", "is in no volume"),
            ("selector: {app: edge}", "selector: {app: mail}", "selects no pod"),
            ("targetPort: smtp", "targetPort: imap", "no container has port 25 called \"imap\""),
            ("Policy: Local", "Policy: Cluster", "client's address is lost"),
            ("proxied.mail.svc", "stock.mail.svc", "no Service leads to stock.mail"),
            ("local:2525", "local:25", "no Service leads to proxied.mail.svc.cluster.local:25"),
        ] {
            let faults = told(&EDGE.replace(from, to), MAIL);
            assert!(faults.iter().any(|fault| fault.contains(expected)), "{expected}: {faults:?}");
        }
    }

    #[test]
    fn a_proxy_port_that_pods_reach_is_told() {
        for (mail, expected) in [
            (MAIL.replace("ipBlock: {cidr: 10.0.0.1/32}", "podSelector: {}"), "other pods reach port 2525"),
            (MAIL.replace("from: [{ipBlock: {cidr: 10.0.0.1/32}}], ", ""), "other pods reach port 2525"),
            (MAIL.replace("port: 993", "port: 2525"), "other pods reach port 2525"),
            (
                MAIL.replace("{port: 2525}]}\n", "{port: 4465}]}\n"),
                "no policy lets the edge nodes to port 2525",
            ),
        ] {
            let faults = told(EDGE, &mail);
            assert!(faults.iter().any(|fault| fault.contains(expected)), "{expected}: {faults:?}");
        }
    }

    #[test]
    fn inline_listens_nowhere_and_needs_the_service_that_translates() {
        let edge = EDGE
            .replace(
                "backends = [\"proxied.mail.svc.cluster.local:2525\"]",
                "backends = [\"10.9.9.9:2525\"]\n    engine = \"inline\"",
            )
            .replace("[{name: smtp, containerPort: 25}, ", "[")
            .replace("name: public, namespace: edge", "name: public, namespace: mail")
            .replace("targetPort: smtp", "targetPort: 2525");
        assert_eq!(told(&edge, MAIL), [""; 0]);
        let wrong = told(&edge.replace("targetPort: 2525", "targetPort: 25"), MAIL);
        assert_eq!(wrong, ["listener smtp: no Service leads to 10.9.9.9:2525"]);
    }

    #[test]
    fn without_the_objects_there_is_nothing_to_judge() {
        let (edge, mail) = (Object::parse(EDGE).unwrap(), Object::parse(MAIL).unwrap());
        assert!(faults(&mail, &mail).is_err());
        let rest: Vec<_> = edge.into_iter().filter(|object| object.kind() != "ConfigMap").collect();
        assert!(faults(&rest, &mail).is_err());
    }
}
