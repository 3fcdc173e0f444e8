//! The texts of the programs' configuration files.

use std::fmt::Write as _;

use super::plan::{Cni, Node, PODS, PREFIX, ProxyMode};
use crate::setup::{IMAGE_TAG, PAUSE_IMAGE};

/// The API server as nodes and operators reach it.
pub(super) fn api() -> String {
    format!("https://{}:6443", Node::Control.address())
}

/// The name of the cluster's domain.
pub(super) const DOMAIN: &str = "cluster.local";

/// containerd 1.6. Without CAP_SYS_RESOURCE, runc cannot lower a score, and says only that it got no
/// pid from a pipe.
pub(super) fn containerd() -> String {
    format!(
        r#"version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}:{IMAGE_TAG}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"#
    )
}

/// How the node's pods are connected (CNI's plugins `bridge` and `ptp`).
pub(super) fn cni(node: Node, cni: Cni) -> String {
    let (kind, settings) = match cni {
        Cni::Bridge => ("bridge", r#""bridge": "cni0", "isGateway": true, "hairpinMode": true, "#),
        Cni::Routed => ("ptp", ""),
    };
    format!(
        r#"{{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {{"type": "{kind}", {settings}"ipMasq": false,
   "ipam": {{"type": "host-local", "ranges": [[{{"subnet": "{}"}}]], "routes": [{{"dst": "0.0.0.0/0"}}]}}}},
  {{"type": "portmap", "capabilities": {{"portMappings": true}}}}]}}
"#,
        node.pods()
    )
}

/// The kubelet below a control group of its own.
pub(super) fn kubelet(node: Node) -> String {
    format!(
        r#"apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {{anonymous: {{enabled: false}}, webhook: {{enabled: true}}, x509: {{clientCAFile: {PKI}/ca.crt}}}}
authorization: {{mode: Webhook}}
cgroupDriver: cgroupfs
cgroupRoot: /{PREFIX}/{node}
enforceNodeAllocatable: [pods]
failSwapOn: false
clusterDomain: {DOMAIN}
evictionHard: {{nodefs.available: "1%", imagefs.available: "1%", memory.available: 50Mi}}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
syncFrequency: 10s
configMapAndSecretChangeDetectionStrategy: Watch
"#
    )
}

/// kube-proxy leaves the size of conntrack's table as it is: that is the whole machine's.
pub(super) fn kube_proxy(node: Node, mode: ProxyMode) -> String {
    format!(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: {}
hostnameOverride: {node}
clusterCIDR: {PODS}
clientConnection: {{kubeconfig: {PKI}/proxy.conf}}
conntrack: {{maxPerCore: 0, min: 0}}
",
        mode.name()
    )
}

/// The folder of certificates and kubeconfigs in a node.
pub(super) const PKI: &str = "/etc/kubernetes/pki";

/// A kubeconfig beside the certificate and key of the same name. Its paths are relative to itself
/// (client-go, `ResolveLocalPaths`).
pub(super) fn kubeconfig(name: &str) -> String {
    format!(
        r#"apiVersion: v1
kind: Config
clusters: [{{name: cluster, cluster: {{server: "{}", certificate-authority: ca.crt}}}}]
users: [{{name: {name}, user: {{client-certificate: {name}.crt, client-key: {name}.key}}}}]
contexts: [{{name: cluster, context: {{cluster: cluster, user: {name}}}}}]
current-context: cluster
"#,
        api()
    )
}

/// `/etc/hosts` of a node.
pub(super) fn hosts() -> String {
    let mut text = String::from("127.0.0.1 localhost\n");
    for node in Node::ALL {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} {node}", node.address());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_text_is_in_its_format() {
        for node in Node::KUBELETS {
            for kind in [Cni::Bridge, Cni::Routed] {
                let text = cni(node, kind);
                let value: serde_json::Value = serde_json::from_str(&text).unwrap();
                let range = &value["plugins"][0]["ipam"]["ranges"][0][0]["subnet"];
                assert_eq!(range, &node.pods(), "{text}");
            }
            for text in [kubelet(node), kube_proxy(node, ProxyMode::Iptables), kubeconfig(node.name())] {
                let value: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
                assert!(value["kind"].is_string(), "{text}");
            }
        }
        let value: toml::Value = toml::from_str(&containerd()).unwrap();
        assert_eq!(value["version"].as_integer(), Some(2));
    }

    #[test]
    fn a_kubeconfig_names_the_files_beside_it() {
        let value: serde_json::Value = serde_saphyr::from_str(&kubeconfig("edge1")).unwrap();
        assert_eq!(value["users"][0]["user"]["client-key"], "edge1.key");
        assert_eq!(value["clusters"][0]["cluster"]["server"], "https://10.0.0.10:6443");
    }

    #[test]
    fn pods_are_in_a_control_group_of_the_node() {
        let value: serde_json::Value = serde_saphyr::from_str(&kubelet(Node::Worker)).unwrap();
        assert_eq!(value["cgroupRoot"], "/inj-cluster/worker");
    }
}
