//! The injector in the cluster: the overlays of `deploy/kubernetes`, with what a trial varies.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{
    image,
    machines::Cluster,
    plan::{CLIENT, Node, VIP},
    wait::wait,
};
use crate::{
    cargo,
    release::kubernetes::object::{Object, list, text},
};

/// How long a rollout may take.
pub(super) const LIMIT: Duration = Duration::from_secs(120);

/// Which of the injector's configurations is deployed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Edge {
    /// The engine of all listeners.
    pub(super) engine: &'static str,
    /// The public Service's externalTrafficPolicy.
    pub(super) policy: &'static str,
}

impl Edge {
    pub(super) const SPLICE: Self = Self { engine: "splice", policy: "Local" };
    pub(super) const INLINE: Self = Self { engine: "inline", policy: "Local" };
    pub(super) const ALL: [Self; 4] = [
        Self::SPLICE,
        Self::INLINE,
        Self { engine: "splice", policy: "Cluster" },
        Self { engine: "inline", policy: "Cluster" },
    ];

    /// An operator's own overlay on top of those of `deploy/kubernetes`, whose folder is `deploy`.
    fn kustomization(self, deploy: &str) -> String {
        let overlay = if self.policy == "Cluster" { "edge-metallb-cluster" } else { "edge-metallb" };
        // edge-metallb-cluster has it already.
        let inline = self.engine == "inline" && self.policy != "Cluster";
        let components =
            if inline { format!("components: [{deploy}/components/inline]\n") } else { String::new() };
        format!(
            "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n\
             resources: [{deploy}/overlays/{overlay}]\n{components}"
        )
    }
}

/// The objects as this cluster takes them, with its image and the engine; and what was left out
/// because the cluster has no such kind.
fn adapt(
    objects: Vec<Object>,
    edge: Edge,
    knows: impl Fn(&Object) -> bool,
) -> Result<(Vec<Value>, Vec<String>)> {
    let (known, unknown): (Vec<_>, Vec<_>) = objects.into_iter().partition(knows);
    let mut adapted = Vec::new();
    for Object(mut object) in known {
        match text(&object["kind"]) {
            "DaemonSet" => {
                let containers = &mut object["spec"]["template"]["spec"]["containers"];
                let containers = containers.as_array_mut().context("a DaemonSet without containers")?;
                containers.iter_mut().for_each(|container| container["image"] = json!(image::name()));
            }
            "ConfigMap" => {
                if let Some(config) = object["data"]["injector.toml"].as_str() {
                    object["data"]["injector.toml"] = with_engine(config, edge.engine)?.into();
                }
            }
            "Service" if object["spec"]["type"] == "LoadBalancer" => {
                let policy = text(&object["spec"]["externalTrafficPolicy"]);
                ensure!(policy == edge.policy, "the overlay's externalTrafficPolicy is {policy:?}");
            }
            _ => {}
        }
        adapted.push(object);
    }
    Ok((adapted, unknown.iter().map(Object::id).collect()))
}

/// The configuration with this engine in every listener.
fn with_engine(config: &str, engine: &str) -> Result<String> {
    let mut config: toml::Table = config.parse().context("injector.toml of the overlay")?;
    let listeners = config.get_mut("listener").and_then(toml::Value::as_array_mut);
    for listener in listeners.context("no listener")? {
        let listener = listener.as_table_mut().context("a listener that is not a table")?;
        listener.insert("engine".into(), engine.into());
    }
    Ok(toml::to_string(&config)?)
}

/// Brings this configuration to both edge nodes, and waits until both pods are ready with it.
///
/// # Errors
/// When the API server refuses an object, or a pod is not ready in time.
pub(super) fn deploy(cluster: &Cluster, edge: Edge) -> Result<()> {
    let rendered = Object::parse(&render(cluster, edge)?)?;
    let kinds = cluster.kubectl(&["api-resources", "--no-headers"])?;
    let (objects, left_out) = adapt(rendered, edge, |object| is_known(&kinds, object))?;
    ensure!(!objects.is_empty(), "everything was left out: {left_out:?}");
    let documents: Vec<_> = objects.iter().map(Value::to_string).collect();
    let before = cluster.kubectl(&["-n", "injector", "get", "pods", "-o", "name"])?;
    cluster.apply(&documents.join("\n---\n"))?;
    announce_status(cluster)?;
    // The kubelet may take a minute to show pods a new configuration; new ones have it.
    let before: Vec<_> = before.split_whitespace().collect();
    if !before.is_empty() {
        // Sessions of an earlier trial may be open for as long as a drain takes; nothing waits for them.
        let delete = ["-n", "injector", "delete", "--grace-period=1", "--timeout=120s"];
        cluster.kubectl(&[&delete[..], &before[..]].concat())?;
    }
    wait_ready(cluster)?;
    if edge.engine == "inline" { Ok(()) } else { detach(cluster) }
}

/// Removes what inline has left in the kernel of the edge nodes, as `deploy/kubernetes/detach` says: it
/// would go on with the mail server's addresses of then.
fn detach(cluster: &Cluster) -> Result<()> {
    let job = cluster.kustomize(&cargo::workspace().join("deploy/kubernetes/detach"))?;
    for node in Node::EDGES {
        let mut objects = Object::parse(&job.replace("NODE", node.name()))?;
        for Object(job) in &mut objects {
            for kind in ["initContainers", "containers"] {
                let containers = job["spec"]["template"]["spec"][kind].as_array_mut();
                containers.into_iter().flatten().for_each(|it| it["image"] = json!(image::name()));
            }
        }
        let documents: Vec<_> = objects.iter().map(|object| object.0.to_string()).collect();
        cluster.apply(&documents.join("\n---\n"))?;
        let job = format!("job/injector-detach-{node}");
        let kube_system = |words: &[&str]| cluster.kubectl(&[&["-n", "kube-system"], words].concat());
        kube_system(&["wait", "--for=condition=complete", &job, "--timeout=60s"])
            .with_context(|| kube_system(&["logs", &job, "--all-containers"]).unwrap_or_default())?;
        kube_system(&["delete", &job])?;
    }
    Ok(())
}

/// Renders the overlay from a folder of the cluster's. kustomize takes no absolute paths.
fn render(cluster: &Cluster, edge: Edge) -> Result<String> {
    let folder = cluster.state.file("overlay");
    fs::create_dir_all(&folder)?;
    let up: String = folder.components().skip(1).map(|_| "../").collect();
    let deploy = cargo::workspace().join("deploy/kubernetes");
    let deploy = format!("{up}{}", deploy.strip_prefix("/").unwrap_or(&deploy).display());
    fs::write(folder.join("kustomization.yaml"), edge.kustomization(&deploy))?;
    cluster.kustomize(&folder)
}

/// Whether a line of `kubectl api-resources` has the object's version and kind.
fn is_known(kinds: &str, object: &Object) -> bool {
    let version = text(&object.0["apiVersion"]);
    kinds.lines().any(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        words.contains(&version) && words.last() == Some(&object.kind())
    })
}

/// What MetalLB does once a node announces the address.
fn announce_status(cluster: &Cluster) -> Result<()> {
    let status = json!({ "status": { "loadBalancer": { "ingress": [{ "ip": VIP }] } } }).to_string();
    let patch = ["-n", "injector", "patch", "service", "injector", "--subresource=status", "--type=merge"];
    cluster.kubectl(&[&patch[..], &["-p", &status]].concat()).map(drop)
}

/// Waits until a pod is ready on each edge node.
///
/// # Errors
/// After the limit; with what is there instead.
pub(super) fn wait_ready(cluster: &Cluster) -> Result<()> {
    let ready = wait("an injector on each edge node", LIMIT, || {
        let ready = ready_nodes(cluster)?;
        Ok(Node::EDGES.iter().all(|node| ready.contains(node)).then_some(()))
    });
    ready.with_context(|| {
        let pods = cluster.kubectl(&["-n", "injector", "get", "pods", "-o", "wide"]).unwrap_or_default();
        let logs = ["-n", "injector", "logs", "daemonset/injector", "-c", "injector", "--tail=20"];
        format!("{pods}\n{}", cluster.kubectl(&logs).unwrap_or_default())
    })
}

/// The nodes where a pod of the injector is ready and is not being deleted.
///
/// # Errors
/// When the API server does not answer.
pub(super) fn ready_nodes(cluster: &Cluster) -> Result<Vec<Node>> {
    let pods = cluster.get(&["-n", "injector", "pods"])?;
    Ok(list(&pods["items"]).iter().filter(|pod| is_ready(pod)).filter_map(node_of).collect())
}

fn is_ready(pod: &Value) -> bool {
    let conditions = list(&pod["status"]["conditions"]);
    let ready = conditions.iter().any(|it| it["type"] == "Ready" && it["status"] == "True");
    ready && pod["metadata"]["deletionTimestamp"].is_null()
}

fn node_of(pod: &Value) -> Option<Node> {
    Node::named(text(&pod["spec"]["nodeName"]))
}

/// The name of the injector's pod on a node.
///
/// # Errors
/// When there is none.
pub(super) fn pod(cluster: &Cluster, node: Node) -> Result<String> {
    let pods = cluster.get(&["-n", "injector", "pods"])?;
    let pod = list(&pods["items"]).iter().find(|pod| node_of(pod) == Some(node) && is_ready(pod));
    Ok(text(&pod.with_context(|| format!("no injector is ready on {node}"))?["metadata"]["name"]).to_owned())
}

/// How many of the client's connections the injectors have logged with this engine. A socket of `[::]`
/// has its address in IPv6's form.
pub(super) fn connections_by(cluster: &Cluster, engine: &str) -> usize {
    let parts = ["connection closed", &format!("\"engine\":\"{engine}\""), &CLIENT.to_string()];
    cluster.state.pod_log("injector_injector-", "injector", &parts).len()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "[[listener]]\nname = \"smtp\"\nbind = [\"[::]:25\"]\n\n[[listener]]\nname = \"imaps\"\n\
                          engine = \"auto\"\n";

    #[test]
    fn every_listener_gets_the_engine() {
        let text = with_engine(CONFIG, "inline").unwrap();
        assert_eq!(text.matches("engine = \"inline\"").count(), 2, "{text}");
        assert!(with_engine("[admin]\nsocket = \"/x\"\n", "splice").is_err());
    }

    #[test]
    fn objects_get_image_engine_and_policy_and_unknown_kinds_are_left_out() {
        let object = |value: Value| Object(value);
        let meta = json!({ "name": "a" });
        let objects = vec![
            object(json!({ "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": meta, "spec": {
                "template": { "spec": { "containers": [{ "image": "x" }, { "image": "x" }] } } } })),
            object(json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": meta,
                "data": { "injector.toml": CONFIG } })),
            object(json!({ "apiVersion": "v1", "kind": "Service", "metadata": meta,
                "spec": { "type": "LoadBalancer", "externalTrafficPolicy": "Cluster" } })),
            object(json!({ "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": meta })),
        ];
        let kinds = "daemonsets ds apps/v1 true DaemonSet\nconfigmaps cm v1 true ConfigMap\n\
                     services svc v1 true Service\npoddisruptionbudgets pdb policy/v1beta1 true PodDisruptionBudget\n";
        let edge = Edge { engine: "splice", policy: "Cluster" };
        let (adapted, left_out) = adapt(objects, edge, |object| is_known(kinds, object)).unwrap();
        assert_eq!(left_out, ["PodDisruptionBudget a"]);
        let containers = list(&adapted[0]["spec"]["template"]["spec"]["containers"]);
        assert!(containers.iter().all(|container| container["image"] == "localhost/injector:latest"));
        assert!(text(&adapted[1]["data"]["injector.toml"]).contains("engine = \"splice\""));
        let local = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "a" },
            "spec": { "type": "LoadBalancer", "externalTrafficPolicy": "Local" } });
        assert!(adapt(vec![Object(local)], edge, |_| true).unwrap_err().to_string().contains("Local"));
    }

    #[test]
    fn each_configuration_has_its_overlay() {
        let text = |engine, policy| Edge { engine, policy }.kustomization("../d");
        assert!(text("splice", "Local").ends_with("resources: [../d/overlays/edge-metallb]\n"));
        assert!(text("inline", "Local").ends_with("components: [../d/components/inline]\n"));
        for engine in ["splice", "inline"] {
            assert!(text(engine, "Cluster").ends_with("resources: [../d/overlays/edge-metallb-cluster]\n"));
        }
    }
}
