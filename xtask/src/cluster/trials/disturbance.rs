//! What clients notice when parts of the cluster move, fail or are replaced.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{RECOVERY, Testbed, Trial, speaker::Speaker, trial};
use crate::cluster::{
    client::{self, Load, LoadReport, Session},
    deploy::{self, Edge},
    machines::Cluster,
    mail, network,
    plan::{Node, VIP},
    wait::{pause, wait},
};

/// Short sessions in a second, unless a trial says otherwise.
const RATE: u32 = 20;

/// Sessions that stay open during a disturbance.
const OPEN: usize = 10;

/// How long they last where a pod waits for its sessions.
const SESSION: Duration = Duration::from_secs(15);

pub(super) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for edge in [Edge::SPLICE, Edge::INLINE] {
        let engine = edge.engine;
        let mut add = |name: &str, run: fn(&Testbed<'_>) -> Result<String>| {
            trials.push(trial(format!("disturbance/{engine}/{name}"), edge, run));
        };
        add("mail server moves", mail_server_moves);
        add("mail server leaves its Service", mail_server_leaves);
        add("public address moves", address_moves);
        add("injector killed", killed);
        add("injector pod deleted", deleted);
        add("injector rolled out", rolled_out);
        add("API server away", api_server_away);
        add("injector killed, API server away", killed_without_api);
        add("endpoints change", endpoints_change);
        add("node drained", node_drained);
    }
    trials
}

/// Both ends as at the start of most trials.
fn settle(testbed: &Testbed<'_>, mail_server: Node) -> Result<()> {
    network::announce(Node::Edge1)?;
    mail::place(testbed.cluster, mail_server)?;
    client::wait_served(VIP, RECOVERY).map(drop)
}

/// The mail server's pod ends on one node, and another one starts elsewhere.
fn mail_server_moves(testbed: &Testbed<'_>) -> Result<String> {
    settle(testbed, Node::Worker)?;
    let load = Load::start(VIP, RATE, OPEN, Duration::MAX)?;
    pause(Duration::from_secs(2))?;
    mail::place(testbed.cluster, Node::Edge2)?;
    let after = client::wait_served(VIP, RECOVERY)?;
    pause(Duration::from_secs(2))?;
    let report = load.finish();
    client::check_address(testbed.cluster, VIP, testbed.edge.engine)?;
    Ok(format!("mail {:.1} s after the new pod was ready; {report}", after.as_secs_f32()))
}

/// The pod loses its label, so its endpoint goes, and another pod takes over. Sessions of the old
/// one go on.
fn mail_server_leaves(testbed: &Testbed<'_>) -> Result<String> {
    let cluster = testbed.cluster;
    settle(testbed, Node::Worker)?;
    let (_, old, _) = mail::pod(cluster)?;
    let load = Load::start(VIP, RATE, OPEN, Duration::MAX)?;
    pause(Duration::from_secs(1))?;
    let outcome = (|| {
        cluster.kubectl(&["-n", "mail", "label", "pod", &old, "app.kubernetes.io/name-"])?;
        mail::wait_ready(cluster)?;
        client::wait_served(VIP, RECOVERY)?;
        pause(Duration::from_secs(3))
    })();
    let report = load.finish();
    cluster.kubectl(&["-n", "mail", "delete", "pod", &old])?;
    outcome?;
    ensure!(report.lost.is_empty(), "sessions ended with the endpoint: {report}");
    Ok(report.to_string())
}

/// As MetalLB does when it no longer finds a node.
fn address_moves(testbed: &Testbed<'_>) -> Result<String> {
    settle(testbed, Node::Worker)?;
    let load = Load::start(VIP, RATE, OPEN, Duration::MAX)?;
    pause(Duration::from_secs(2))?;
    network::announce(Node::Edge2)?;
    let after = client::wait_served(VIP, RECOVERY)?;
    pause(Duration::from_secs(7))?;
    let report = load.finish();
    client::check_address(testbed.cluster, VIP, testbed.edge.engine)?;
    network::announce(Node::Edge1)?;
    ensure!(report.failures.len() < 5, "new sessions failed: {report}");
    Ok(format!("mail after {:.1} s; {report}", after.as_secs_f32()))
}

/// The daemon ends without notice.
fn killed(testbed: &Testbed<'_>) -> Result<String> {
    settle(testbed, Node::Worker)?;
    let load = Load::start(VIP, RATE, OPEN, Duration::MAX)?;
    pause(Duration::from_secs(2))?;
    kill_daemon(testbed.cluster)?;
    pause(Duration::from_secs(1))?;
    deploy::wait_ready(testbed.cluster)?;
    let after = client::wait_served(VIP, RECOVERY)?;
    pause(Duration::from_secs(2))?;
    let report = load.finish();
    ensure_inline_kept(testbed, &report)?;
    client::check_address(testbed.cluster, VIP, testbed.edge.engine)?;
    Ok(format!("mail {:.1} s after the pod was ready again; {report}", after.as_secs_f32()))
}

/// Inline's connections are the kernel's: no end of the daemon ends them.
fn ensure_inline_kept(testbed: &Testbed<'_>, report: &LoadReport) -> Result<()> {
    let is_inline = testbed.edge.engine == "inline";
    ensure!(!is_inline || report.lost.is_empty(), "connections of inline ended: {report}");
    Ok(())
}

/// As an eviction: the pod ends in order, and the address moves to the other edge at once: this version's
/// Service leads to no pod that is ending. Without inline, the old pod drains for 18 s.
fn deleted(testbed: &Testbed<'_>) -> Result<String> {
    settle(testbed, Node::Worker)?;
    let speaker = Speaker::start(testbed.cluster);
    let load = Load::start(VIP, RATE, OPEN, SESSION)?;
    pause(Duration::from_secs(2))?;
    let outcome = (|| {
        let pod = deploy::pod(testbed.cluster, Node::Edge1)?;
        testbed.cluster.kubectl(&["-n", "injector", "delete", "pod", &pod, "--timeout=300s"])?;
        deploy::wait_ready(testbed.cluster)?;
        pause(Duration::from_secs(2))
    })();
    let report = load.finish();
    let moves = speaker.finish();
    outcome?;
    client::check_address(testbed.cluster, VIP, testbed.edge.engine)?;
    Ok(format!("{report}; {moves}"))
}

fn rolled_out(testbed: &Testbed<'_>) -> Result<String> {
    settle(testbed, Node::Worker)?;
    let speaker = Speaker::start(testbed.cluster);
    let load = Load::start(VIP, RATE, OPEN, SESSION)?;
    let outcome = (|| {
        let daemonset = ["-n", "injector", "rollout"];
        testbed.cluster.kubectl(&[&daemonset[..], &["restart", "daemonset/injector"]].concat())?;
        let status = ["status", "daemonset/injector", "--timeout=600s"];
        testbed.cluster.kubectl(&[&daemonset[..], &status].concat())?;
        deploy::wait_ready(testbed.cluster)
    })();
    let report = load.finish();
    let moves = speaker.finish();
    outcome?;
    client::check_address(testbed.cluster, VIP, testbed.edge.engine)?;
    Ok(format!("{report}; {moves}"))
}

/// Nothing that clients notice; a move is followed once the API server is back.
fn api_server_away(testbed: &Testbed<'_>) -> Result<String> {
    let cluster = testbed.cluster;
    settle(testbed, Node::Worker)?;
    let load = Load::start(VIP, RATE, OPEN, Duration::MAX)?;
    cluster.stop_api_server()?;
    let outcome = pause(Duration::from_secs(60));
    let report = load.finish();
    cluster.start_api_server()?;
    outcome?;
    ensure!(report.failures.is_empty() && report.lost.is_empty(), "clients noticed it: {report}");
    mail::place(cluster, Node::Edge2).context("after the API server's return")?;
    let after = client::wait_served(VIP, RECOVERY)?;
    client::check_address(cluster, VIP, testbed.edge.engine)?;
    Ok(format!("for 60 s: {report}; a later move was followed after {:.1} s", after.as_secs_f32()))
}

/// The next daemon knows no pod of the mail server, and tells clients to come again later. Connections of
/// inline go on.
fn killed_without_api(testbed: &Testbed<'_>) -> Result<String> {
    const TRIES: usize = 20;
    let cluster = testbed.cluster;
    settle(testbed, Node::Worker)?;
    let load = Load::start(VIP, 1, OPEN, Duration::MAX)?;
    cluster.stop_api_server()?;
    let outcome = (|| -> Result<()> {
        kill_daemon(cluster)?;
        // At first no daemon listens, and inline leads to the pods of before.
        wait("a daemon that knows no backend", deploy::LIMIT, || Ok(is_put_off().then_some(())))?;
        for _ in 0..TRIES {
            ensure!(is_put_off(), "a daemon that knows no backend has served");
        }
        Ok(())
    })();
    let outcome = outcome.and(cluster.start_api_server());
    let after = outcome.and_then(|()| client::wait_served(VIP, RECOVERY));
    let report = load.finish();
    let after = after?;
    ensure_inline_kept(testbed, &report)?;
    client::check_address(cluster, VIP, testbed.edge.engine)?;
    deploy::wait_ready(cluster)?;
    let lost = report.lost.len();
    Ok(format!(
        "{TRIES} of {TRIES} put off with 421; mail {:.1} s after the API server was ready again; {lost} of {OPEN} open \
         sessions lost",
        after.as_secs_f32()
    ))
}

/// Whether a client is greeted with 421.
fn is_put_off() -> bool {
    let greeting = Session::connect(VIP, 25, b"").and_then(|mut session| session.line());
    greeting.is_ok_and(|line| line.starts_with("421"))
}

/// SIGKILL to the daemon on the first edge node; the kubelet starts it again.
fn kill_daemon(cluster: &Cluster) -> Result<()> {
    cluster.machine(Node::Edge1).run(&["pkill", "-KILL", "-f", "-x", "injector run"]).map(drop)
}

/// A second slice of the Service changes ten times a second: an endpoint that is ready and is not.
fn endpoints_change(testbed: &Testbed<'_>) -> Result<String> {
    const CHANGES: u32 = 200;
    let cluster = testbed.cluster;
    settle(testbed, Node::Worker)?;
    let (_, _, address) = mail::pod(cluster)?;
    let slice = |ready: bool| {
        json!({
            "apiVersion": "discovery.k8s.io/v1beta1", "kind": "EndpointSlice",
            "metadata": { "name": "changing", "namespace": "mail", "labels": {
                "kubernetes.io/service-name": "mailserver-proxy" } },
            "addressType": "IPv4",
            "endpoints": [{ "addresses": [address], "conditions": { "ready": ready } }],
            "ports": [
                { "name": "smtp", "port": 2525 }, { "name": "submissions", "port": 4465 },
                { "name": "submission", "port": 5587 }, { "name": "imaps", "port": 10993 },
            ],
        })
    };
    cluster.apply(&slice(true).to_string())?;
    let load = Load::start(VIP, RATE, OPEN, Duration::MAX)?;
    let outcome = cluster.with_api(|api| {
        let url = format!("{api}/apis/discovery.k8s.io/v1beta1/namespaces/mail/endpointslices/changing");
        for change in 0..CHANGES {
            let text = slice(change % 2 == 0).to_string();
            let put = ureq::patch(&url).header("Content-Type", "application/merge-patch+json").send(&text);
            put.with_context(|| format!("change {change}"))?;
            pause(Duration::from_millis(80))?;
        }
        Ok(())
    });
    let report = load.finish();
    cluster.kubectl(&["-n", "mail", "delete", "endpointslice", "changing"])?;
    outcome?;
    ensure!(report.failures.is_empty() && report.lost.is_empty(), "clients noticed it: {report}");
    client::check_address(cluster, VIP, testbed.edge.engine)?;
    Ok(format!("{CHANGES} changes; {report}"))
}

/// `kubectl drain` moves the mail server; a DaemonSet's pods stay.
fn node_drained(testbed: &Testbed<'_>) -> Result<String> {
    let cluster = testbed.cluster;
    settle(testbed, Node::Edge1)?;
    // The next pod may be on either node; for now the worker takes none.
    cluster.kubectl(&["cordon", "worker"])?;
    mail::allow(cluster, &[Node::Edge1, Node::Worker])?;
    let prepared = mail::wait_ready(cluster);
    cluster.kubectl(&["uncordon", "worker"])?;
    prepared?;
    client::wait_served(VIP, RECOVERY)?;
    let load = Load::start(VIP, RATE, OPEN, Duration::MAX)?;
    let drained = drain(cluster, Node::Edge1);
    let served = client::wait_served(VIP, RECOVERY);
    let report = load.finish();
    cluster.kubectl(&["uncordon", "edge1"])?;
    drained?;
    served?;
    let (node, ..) = mail::pod(cluster)?;
    ensure!(node == Node::Worker, "the mail server runs on {node}");
    client::check_address(cluster, VIP, testbed.edge.engine)?;
    Ok(report.to_string())
}

fn drain(cluster: &Cluster, node: Node) -> Result<()> {
    let options = ["--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s"];
    cluster.kubectl(&[&["drain", node.name()], &options[..]].concat())?;
    wait("the mail server elsewhere", RECOVERY, || {
        Ok(mail::pod(cluster).is_ok_and(|(now, ..)| now != node).then_some(()))
    })?;
    mail::wait_ready(cluster)?;
    Ok(())
}
