//! The mail server in the cluster: its pod, where it runs, and its log.

use std::{fs, net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use injector_testbed::{
    certificate::{Certificate, MAIL_NAME},
    dovecot::PASSWORD,
    message::DOMAIN,
    postfix::OWN_SERVICES,
};
use serde_json::{Value, json};

use super::{machines::Cluster, plan::Node, wait::wait};
use crate::{
    cargo::workspace,
    release::kubernetes::object::{list, text},
    setup::{IMAGE_TAG, MAIL_IMAGE},
};

/// How long a pod may take to be ready.
const LIMIT: Duration = Duration::from_secs(90);

/// Pods with a webmail, in the namespace `default`: on the second edge node, and on the worker.
pub(super) const WEBMAILS: [&str; 2] = ["webmail", "webmail-worker"];

/// The name of the file with the certificate's authority.
const AUTHORITY: &str = "authority.pem";

/// Starts the mail server on the node `worker`, its Services, and the webmails.
///
/// # Errors
/// When a pod is not ready in time.
pub(super) fn start(cluster: &Cluster) -> Result<()> {
    cluster.kubectl(&["create", "namespace", "mail"])?;
    for namespace in ["mail", "default"] {
        let account = ["-n", namespace, "get", "serviceaccount", "default"];
        wait("service accounts", LIMIT, || Ok(cluster.kubectl(&account).ok()))?;
    }
    let folder = tempfile::tempdir()?;
    let certificate = Certificate::new(folder.path())?;
    fs::write(cluster.state.file(AUTHORITY), &certificate.authority_pem)?;
    let named = |name: &str| json!({ "name": name, "namespace": "mail" });
    let objects = [
        json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": named("mailserver-start"),
            "data": { "mail.sh": include_str!("mail.sh"), "own-services.cf": OWN_SERVICES } }),
        json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": named("mailserver"),
            "data": { "DOMAIN": DOMAIN, "NAME": MAIL_NAME, "PASSWORD": PASSWORD } }),
        json!({ "apiVersion": "v1", "kind": "Secret", "metadata": named("mailserver-tls"), "stringData": {
            "tls.crt": fs::read_to_string(&certificate.chain)?,
            "tls.key": fs::read_to_string(&certificate.key)? } }),
    ];
    cluster.apply(&objects.map(|object| object.to_string()).join("\n---\n"))?;
    cluster.apply(&include_str!("mail.yaml").replace("MAIL_IMAGE", &format!("{MAIL_IMAGE}:{IMAGE_TAG}")))?;
    cluster.apply(&cluster.kustomize(&workspace().join("deploy/kubernetes/mail"))?)?;
    wait_ready(cluster)?;
    let webmails = WEBMAILS.map(|pod| format!("pod/{pod}"));
    let wait = ["wait", "--for=condition=Ready", "--timeout=60s", &webmails[0], &webmails[1]];
    cluster.kubectl(&wait).map(drop)
}

/// Waits until the mail server's only pod is the newest one, and ready.
///
/// # Errors
/// After a while.
pub(super) fn wait_ready(cluster: &Cluster) -> Result<()> {
    let status = ["-n", "mail", "rollout", "status", "deployment/mailserver", "--timeout=90s"];
    cluster.kubectl(&status).map(drop)
}

/// The authority of the mail server's certificate, PEM.
pub(super) fn authority(cluster: &Cluster) -> Result<String> {
    fs::read_to_string(cluster.state.file(AUTHORITY)).context("the mail server's certificate")
}

/// Lets the mail server run on this node alone; it moves if it is elsewhere.
///
/// # Errors
/// When its pod is not ready there in time.
pub(super) fn place(cluster: &Cluster, node: Node) -> Result<()> {
    allow(cluster, &[node])?;
    wait_ready(cluster)
}

/// Lets the mail server run on these nodes alone, without waiting.
///
/// # Errors
/// When the API server refuses it.
pub(super) fn allow(cluster: &Cluster, nodes: &[Node]) -> Result<()> {
    let names: Vec<_> = nodes.iter().map(|node| node.name()).collect();
    let on = json!([{ "matchExpressions": [
        { "key": "kubernetes.io/hostname", "operator": "In", "values": names }] }]);
    let affinity = json!({ "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": { "nodeSelectorTerms": on } } });
    let patch = json!({ "spec": { "template": { "spec": { "affinity": affinity } } } }).to_string();
    cluster.kubectl(&["-n", "mail", "patch", "deployment", "mailserver", "-p", &patch]).map(drop)
}

/// Where the mail server runs, and its pod's name and address.
///
/// # Errors
/// When it does not run.
pub(super) fn pod(cluster: &Cluster) -> Result<(Node, String, Ipv4Addr)> {
    let pods = cluster.get(&["-n", "mail", "pods", "-l", "app.kubernetes.io/name=mailserver"])?;
    let is_running =
        |pod: &&Value| pod["status"]["phase"] == "Running" && pod["metadata"]["deletionTimestamp"].is_null();
    let pod = list(&pods["items"]).iter().find(is_running).context("the mail server does not run")?;
    let node = Node::named(text(&pod["spec"]["nodeName"])).context("a pod without a node")?;
    let address = text(&pod["status"]["podIP"]).parse().context("a pod without an address")?;
    Ok((node, text(&pod["metadata"]["name"]).to_owned(), address))
}

/// Ensures that the alternative ports have never logged a client with one of these addresses: a
/// header with it would have been believed.
///
/// # Errors
/// When there is one; with its line.
pub(super) fn ensure_never_client(cluster: &Cluster, addresses: &[Ipv4Addr]) -> Result<()> {
    for address in addresses {
        for parts in [
            ["postfix/proxied", ": client=", &format!("[{address}]")],
            ["imap-login", "Login: ", &format!("rip={address},")],
        ] {
            let lines = log(cluster, &parts);
            ensure!(lines.is_empty(), "the mail server logged {address} as a client: {}", lines.join("\n"));
        }
    }
    Ok(())
}

/// The log lines of all its pods that have each of these texts.
pub(super) fn log(cluster: &Cluster, parts: &[&str]) -> Vec<String> {
    cluster.state.pod_log("mail_mailserver-", "mail", parts)
}

/// The first such line, which may be written within five seconds.
///
/// # Errors
/// When there is none.
pub(super) fn wait_log(cluster: &Cluster, parts: &[&str]) -> Result<String> {
    wait(&format!("a line with {parts:?} in the mail server's log"), Duration::from_secs(5), || {
        Ok(log(cluster, parts).into_iter().next())
    })
}
