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
    inline.peers = [{ service = "edge/peers" }]
    [[listener]]
    name = "smtp"
    bind = ["[::]:25"]
    virtual_addresses = [{ service = "edge/public" }]
    backends = [{ service = "mail/proxied", port = "smtp" }]
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: account, namespace: edge}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: own, namespace: edge}
rules:
  - {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
  - {apiGroups: [""], resources: [services], verbs: [list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: own, namespace: edge}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: own}
subjects: [{kind: ServiceAccount, name: account, namespace: edge}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: backends, namespace: mail}
rules:
  - {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
  - {apiGroups: [""], resources: [services], verbs: [list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: backends, namespace: mail}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: backends}
subjects: [{kind: ServiceAccount, name: account, namespace: edge}]
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
apiVersion: v1
kind: Service
metadata: {name: peers, namespace: edge}
spec: {clusterIP: None, selector: {app: edge}, ports: [{port: 9146, targetPort: health}]}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: budget, namespace: edge}
spec: {minAvailable: 1, selector: {matchLabels: {app: edge}}}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: injector, namespace: edge}
spec:
  updateStrategy: {rollingUpdate: {maxUnavailable: 1}}
  template:
    metadata: {labels: {app: edge, tier: one}, annotations: {prometheus.io/port: "9145"}}
    spec:
      hostNetwork: true
      serviceAccountName: account
      automountServiceAccountToken: false
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
          readinessProbe: {httpGet: {port: health}, periodSeconds: 10, failureThreshold: 25}
          lifecycle: {preStop: {exec: {command: [injector, drain, --deadline, 240s]}}}
          volumeMounts:
            - {name: c, mountPath: /etc/injector}
            - {name: r, mountPath: /run/injector}
            - {name: t, mountPath: /var/run/secrets/kubernetes.io/serviceaccount}
        - name: reload
          args: [reload, --watch, /etc/injector/injector.toml]
          env: [{name: INJECTOR_SOCKET, value: /run/injector/admin.sock}]
          volumeMounts: [{name: c, mountPath: /etc/injector}, {name: r, mountPath: /run/injector}]
      volumes:
        - {name: c, configMap: {name: config}}
        - {name: r, emptyDir: {}}
        - {name: t, projected: {sources: [{serviceAccountToken: {path: token}}]}}
"#;
const MAIL: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: standard, namespace: mail}
spec: {ports: [{port: 25, targetPort: 25}]}
---
apiVersion: v1
kind: Service
metadata: {name: proxied, namespace: mail}
spec: {clusterIP: None, ports: [{name: smtp, port: 2525, targetPort: 2525}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: mail, namespace: mail}
spec:
  ingress:
    - {from: [{namespaceSelector: {}}], ports: [{port: 993}]}
    - {from: [{ipBlock: {cidr: 10.0.0.1/32}}, {ipBlock: {cidr: "fd00::1/128"}}], ports: [{port: 2525}]}
"#;

fn faults_of(edge: &str, mail: &str) -> Vec<String> {
    faults(&Object::parse(edge).unwrap(), &Object::parse(mail).unwrap()).unwrap()
}

/// The objects with one text replaced, which they must have.
fn changed(objects: &str, from: &str, to: &str) -> String {
    assert!(objects.contains(from), "{from}");
    objects.replace(from, to)
}

fn assert_reported(expected: &str, faults: &[String]) {
    assert!(faults.iter().any(|fault| fault.contains(expected)), "{expected}: {faults:?}");
}

#[test]
fn consistent_objects_have_no_faults() {
    assert_eq!(faults_of(EDGE, MAIL), [""; 0]);
    // A mail server outside of the cluster needs neither Services nor Roles.
    let number = EDGE.replace(r#"port = "smtp""#, "port = 2525");
    assert_eq!(faults_of(&number, MAIL), [""; 0]);
    assert_eq!(edge_addresses(&Object::parse(MAIL).unwrap()).len(), 2);
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
        ("readinessProbe: {httpGet: {port: health}", "readinessProbe: {a: {}", "readinessProbe does not use"),
        ("Threshold: 25", "Threshold: 24", "the drain takes 240s, but the pod may be unready after 230s"),
        (
            "Seconds: 300",
            "Seconds: 270",
            "killed after 270s, but the drain takes 240s and then the shutdown 30s",
        ),
        (", --deadline, 240s", "", "without a deadline"),
        ("maxUnavailable: 1}", "maxSurge: 1}", "maxSurge must be 0"),
        ("minAvailable: 1", "maxUnavailable: 1", "needs minAvailable, as a number"),
        ("minAvailable: 1", "minAvailable: 50%", "needs minAvailable, as a number"),
        ("matchLabels: {app: edge}", "matchLabels: {app: other}", "budget selects no pod"),
        ("serviceAccountName: account", "serviceAccountName: other", "no ServiceAccount \"other\""),
        ("configMap: {name: config}", "configMap: {name: other}", "no ConfigMap \"other\""),
        ("[{name: c, mountPath: /etc/injector}", "[{name: x, mountPath: /etc/injector}", "no volume \"x\""),
        ("--watch, /etc", "--watch, /tmp", "does not watch /etc/injector/injector.toml"),
        ("value: /run/injector/admin.sock", "value: /run/injector/a.sock", "uses /run/injector/a.sock"),
        ("/etc/injector}, {name: r", "/etc/injector, subPath: f}, {name: r", "is in no volume"),
        ("Local\n  selector: {app: edge}", "Local\n  selector: {app: mail}", "public selects no pod"),
        ("public, namespace: edge}\nspec:", "public, namespace: mail}\nspec:", "mail/public selects no pod"),
        ("targetPort: smtp", "targetPort: imap", "no container has port 25 called \"imap\""),
        ("Policy: Local", "Policy: Cluster", "client's address is lost"),
        ("virtual_addresses =", "other =", "virtual_addresses lack those of Service edge/public"),
        ("edge/peers", "edge/none", "follows Service edge/none, which does not exist"),
        ("mail/proxied", "mail/none", "there is no Service mail/none"),
        ("port = \"smtp\"", "port = \"imap\"", "Service mail/proxied has no port Name(\"imap\")"),
        ("[{ service = \"mail/proxied\", port = \"smtp\" }]", "[\"mail.svc:2525\"]", "name the Service"),
    ] {
        assert_reported(expected, &faults_of(&changed(EDGE, from, to), MAIL));
    }
}

#[test]
fn a_proxy_port_that_others_reach_is_reported() {
    for (from, to, expected) in [
        ("ipBlock: {cidr: 10.0.0.1/32}", "podSelector: {}", "other pods can reach port 2525"),
        ("cidr: 10.0.0.1/32", "cidr: 10.0.0.0/8", "other pods can reach port 2525"),
        (
            "from: [{ipBlock: {cidr: 10.0.0.1/32}}, {ipBlock: {cidr: \"fd00::1/128\"}}], ",
            "",
            "other pods can reach",
        ),
        ("port: 993", "port: 2525", "other pods can reach port 2525"),
        ("[{port: 2525}]}", "[{port: 4465}]}", "no policy allows the edge nodes to reach port 2525"),
        (
            "[{port: 2525}]}",
            "[{port: 2525}, {port: 25}]}",
            "the edge nodes reach port 25, which is no backend",
        ),
        ("clusterIP: None, ports", "type: NodePort, ports", "kube-proxy leads clients to PROXY port 2525"),
        ("clusterIP: None, ports", "ports", "kube-proxy leads clients to PROXY port 2525"),
        ("targetPort: 25}", "targetPort: 2525}", "Service mail/standard: kube-proxy leads"),
        ("port: 25, targetPort: 25}", "port: 2525}", "Service mail/standard: kube-proxy leads"),
    ] {
        assert_reported(expected, &faults_of(EDGE, &changed(MAIL, from, to)));
    }
}

/// Addresses that the Service requests serve as well as the Service itself.
#[test]
fn virtual_addresses_may_be_written() {
    let written = r#"virtual_addresses = ["192.0.2.10", "2001:db8::10"]"#;
    let edge = EDGE.replace(r#"virtual_addresses = [{ service = "edge/public" }]"#, written);
    let fault = "listener smtp: virtual_addresses lack those of Service edge/public";
    assert_eq!(faults_of(&edge, MAIL), [fault]);
    let requests = |addresses: &str| {
        let annotations = format!("{{metallb.io/loadBalancerIPs: \"{addresses}\"}}");
        edge.replace(
            "{name: public, namespace",
            &format!("{{name: public, annotations: {annotations}, namespace"),
        )
    };
    assert_eq!(faults_of(&requests("192.0.2.10,2001:db8::10"), MAIL), [""; 0]);
    assert_eq!(faults_of(&requests("192.0.2.10,192.0.2.11"), MAIL), [fault]);
}

#[test]
fn translated_clients_are_refused_or_kept() {
    let cluster = EDGE.replace("Policy: Local", "Policy: Cluster");
    let refused =
        cluster.replace("    virtual_addr", "    translated_sources = [\"10.0.0.0/24\"]\n    virtual_addr");
    assert_eq!(faults_of(&refused, MAIL), [""; 0]);
}

#[test]
fn the_injector_may_read_what_it_follows_and_nothing_else() {
    let verbs = "resources: [endpointslices], verbs: [list, watch]";
    for (from, to, expected) in [
        (verbs, "resources: [endpointslices], verbs: [list]", "lets the injector watch endpointslices"),
        (verbs, "resources: [endpointslices], verbs: [list, watch, patch]", "it lets the injector patch"),
        (verbs, "resources: [secrets], verbs: [get]", "it lets the injector get secrets"),
        (verbs, "resources: ['*'], verbs: ['*']", "it lets the injector * *"),
        (
            r#"{ service = "mail/proxied", port = "smtp" }"#,
            "\"10.9.9.9:2525\"",
            "namespace mail lets the injector list endpointslices, which it does not need",
        ),
        ("services], verbs: [list, watch]}", "services], verbs: [list]}", "lets the injector watch services"),
        ("kind: Role\n", "kind: ClusterRole\n", "it would hold in the whole cluster"),
        ("kind: RoleBinding", "kind: ClusterRoleBinding", "it would hold in the whole cluster"),
        ("kind: Role, name: backends", "kind: Role, name: own", "namespace mail lets the injector watch"),
        ("account, namespace: edge}]", "account, namespace: mail}]", "no Role in namespace mail lets"),
        ("Token: false", "Token: true", "gives every container the token"),
        ("            - {name: t,", "            - {name: r,", "the injector has no token"),
        ("/var/run/secrets/", "/run/secrets/", "not at /var/run/secrets/"),
        (
            "{name: r, mountPath: /run/injector}]",
            "{name: t, mountPath: /t}]",
            "container \"reload\" has the token",
        ),
    ] {
        assert_reported(expected, &faults_of(&changed(EDGE, from, to), MAIL));
    }
}

#[test]
fn a_missing_object_is_an_error() {
    let (edge, mail) = (Object::parse(EDGE).unwrap(), Object::parse(MAIL).unwrap());
    assert!(faults(&mail, &mail).is_err());
    let rest: Vec<_> = edge.into_iter().filter(|object| object.kind() != "ConfigMap").collect();
    assert!(faults(&rest, &mail).is_err());
}
