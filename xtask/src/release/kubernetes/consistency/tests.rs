//! Objects that agree, and each way in which they may not.

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
            - {name: INJECTOR_METRICS_LISTEN, value: "$(NODE_ADDRESS):9145"}
            - {name: INJECTOR_HEALTH_LISTEN, value: "$(NODE_ADDRESS):9146"}
          ports: [{name: smtp, containerPort: 25}, {name: metrics, containerPort: 9145}, {name: health, containerPort: 9146}]
          startupProbe: {httpGet: {port: health}}
          livenessProbe: {httpGet: {port: health}}
          readinessProbe: {httpGet: {port: health}}
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

fn faults_of(edge: &str, mail: &str) -> Vec<String> {
    faults(&Object::parse(edge).unwrap(), &Object::parse(mail).unwrap()).unwrap()
}

#[test]
fn consistent_objects_have_no_faults() {
    assert_eq!(faults_of(EDGE, MAIL), [""; 0]);
    let weighted = r#"[{ address = "proxied.mail.svc.cluster.local:2525", weight = 2 }]"#;
    assert_eq!(
        faults_of(&EDGE.replace(r#"["proxied.mail.svc.cluster.local:2525"]"#, weighted), MAIL),
        [""; 0]
    );
}

#[test]
fn every_inconsistency_is_reported() {
    for (from, to, expected) in [
        ("[::]:25", "[::]:26", "declares the ports {25}, the configuration opens {26}"),
        (":9145\"}\n", ":9147\"}\n", "INJECTOR_METRICS_LISTEN has $(NODE_ADDRESS):9147"),
        ("S):9146\"}\n", "S):9147\"}\n", "INJECTOR_HEALTH_LISTEN has $(NODE_ADDRESS):9147"),
        (
            "$(NODE_ADDRESS):9145",
            "[$(NODE_ADDRESS)]:9145",
            "INJECTOR_METRICS_LISTEN has [$(NODE_ADDRESS)]:9145",
        ),
        ("prometheus.io/port: \"9145\"", "prometheus.io/port: \"80\"", "prometheus.io/port is \"80\""),
        ("readinessProbe: {httpGet: {port: health}}", "", "readinessProbe does not use"),
        (
            "Seconds: 300",
            "Seconds: 270",
            "killed after 270s, but the drain takes 240s and then the shutdown 30s",
        ),
        (", --deadline, 240s", "", "without a deadline"),
        ("maxSurge: 0", "maxSurge: 1", "maxSurge must be 0"),
        ("serviceAccountName: account", "serviceAccountName: other", "no ServiceAccount \"other\""),
        ("configMap: {name: config}", "configMap: {name: other}", "no ConfigMap \"other\""),
        ("[{name: c, mountPath: /etc/injector}", "[{name: x, mountPath: /etc/injector}", "no volume \"x\""),
        ("--watch, /etc", "--watch, /tmp", "does not watch /etc/injector/injector.toml"),
        ("value: /run/injector/admin.sock", "value: /run/injector/a.sock", "uses /run/injector/a.sock"),
        ("/etc/injector}, {name: r", "/etc/injector, subPath: f}, {name: r", "is in no volume"),
        ("selector: {app: edge}", "selector: {app: mail}", "selects no pod"),
        ("targetPort: smtp", "targetPort: imap", "no container has port 25 called \"imap\""),
        ("Policy: Local", "Policy: Cluster", "client's address is lost"),
        ("proxied.mail.svc", "standard.mail.svc", "no Service leads to standard.mail"),
        ("local:2525", "local:25", "no Service leads to proxied.mail.svc.cluster.local:25"),
    ] {
        let faults = faults_of(&EDGE.replace(from, to), MAIL);
        assert!(faults.iter().any(|fault| fault.contains(expected)), "{expected}: {faults:?}");
    }
}

#[test]
fn a_proxy_port_that_pods_reach_is_reported() {
    for (mail, expected) in [
        (MAIL.replace("ipBlock: {cidr: 10.0.0.1/32}", "podSelector: {}"), "other pods can reach port 2525"),
        (MAIL.replace("from: [{ipBlock: {cidr: 10.0.0.1/32}}], ", ""), "other pods can reach port 2525"),
        (MAIL.replace("port: 993", "port: 2525"), "other pods can reach port 2525"),
        (
            MAIL.replace("{port: 2525}]}\n", "{port: 4465}]}\n"),
            "no policy allows the edge nodes to reach port 2525",
        ),
    ] {
        let faults = faults_of(EDGE, &mail);
        assert!(faults.iter().any(|fault| fault.contains(expected)), "{expected}: {faults:?}");
    }
}

#[test]
fn inline_needs_the_pods_own_addresses() {
    let edge = EDGE.replace("local:2525\"]", "local:2525\"]\n    engine = \"inline\"");
    assert_eq!(
        faults_of(&edge, MAIL),
        [
            "listener smtp: engine inline needs pods' own addresses: proxied.mail.svc.cluster.local:2525 has a \
             cluster IP"
        ]
    );
    assert_eq!(faults_of(&edge, &MAIL.replace("spec: {ports", "spec: {clusterIP: None, ports")), [""; 0]);
    assert_eq!(faults_of(&edge.replace("proxied.mail.svc.cluster.local", "10.9.9.9"), MAIL), [""; 0]);
}

#[test]
fn a_missing_object_is_an_error() {
    let (edge, mail) = (Object::parse(EDGE).unwrap(), Object::parse(MAIL).unwrap());
    assert!(faults(&mail, &mail).is_err());
    let rest: Vec<_> = edge.into_iter().filter(|object| object.kind() != "ConfigMap").collect();
    assert!(faults(&rest, &mail).is_err());
}
