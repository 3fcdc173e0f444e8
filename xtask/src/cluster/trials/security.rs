//! What must never reach the mail server, and what does not pass the injector.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result, bail, ensure};
use injector_common::proxy::{Addresses, Command, v2};

use super::{Testbed, Trial, trial};
use crate::cluster::{
    client::{self, Session},
    deploy::{self, Edge},
    mail, network,
    plan::{Node, VIP},
    wait::wait,
};

/// The address that a client claims in a header of its own.
const FORGED: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 66);

pub(super) fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("security/no injector on any node", Edge::SPLICE, no_injector),
        trial("security/webmail on the standard ports", Edge::SPLICE, webmail),
        trial("security/roles as rendered", Edge::SPLICE, roles),
    ];
    for edge in Edge::ALL {
        let Edge { engine, policy } = edge;
        let name = |what: &str| format!("security/{engine}/{policy}/{what}");
        trials.push(trial(name("pods at the public address"), edge, pods_outside));
        if policy == "Local" {
            trials.push(trial(name("header of a client's own"), edge, own_header));
        }
    }
    trials
}

/// A PROXY header, version 2, as a client would forge it, and a message behind it.
fn forged() -> Result<Vec<u8>> {
    let source = SocketAddr::new(FORGED.into(), 40_000);
    let addresses = Addresses::new(source, SocketAddr::new(VIP.into(), 25));
    let mut bytes = vec![0; 28];
    v2::encode(&Command::Proxy(addresses), &[], &mut bytes)?;
    bytes.extend(b"EHLO forged.example\r\nMAIL FROM:<f@forged.example>\r\nRCPT TO:<forged@example.test>\r\n");
    bytes.extend(b"DATA\r\nSubject: forged\r\n\r\nforged\r\n.\r\nQUIT\r\n");
    Ok(bytes)
}

/// Sends the forged header to an address; the last line of what came back.
fn forge(to: Ipv4Addr, port: u16) -> Result<String> {
    let mut session = Session::connect(to, port, &forged()?)?;
    let mut last = String::from("nothing");
    while let Ok(line) = session.line() {
        last = line;
    }
    Ok(last)
}

/// With an injector, the client's header is payload behind the true one.
fn own_header(testbed: &Testbed<'_>) -> Result<String> {
    network::announce(Node::Edge1)?;
    client::wait_served(VIP, super::RECOVERY)?;
    let reply = forge(VIP, 25)?;
    mail::ensure_never_client(testbed.cluster, &[FORGED])?;
    Ok(format!("not believed; the client read at last: {reply}"))
}

/// Without one, nothing leads from outside to a port that would believe it.
fn no_injector(testbed: &Testbed<'_>) -> Result<String> {
    let cluster = testbed.cluster;
    for node in Node::EDGES {
        cluster.kubectl(&["label", "node", node.name(), "node-role.kubernetes.io/edge-"])?;
    }
    let outcome = (|| {
        wait("the end of the injectors", super::RECOVERY * 2, || {
            let pods = cluster.kubectl(&["-n", "injector", "get", "pods", "--no-headers"])?;
            Ok(pods.trim().is_empty().then_some(()))
        })?;
        let mut tried = Vec::new();
        let services = [25, 465, 587, 993, 2525, 4465, 5587, 10993];
        let places = [VIP, Node::Edge1.address(), Node::Edge2.address(), Node::Worker.address()];
        for to in places {
            for port in services {
                if let Ok(reply) = forge(to, port) {
                    bail!("{to}:{port} has accepted a connection and answered: {reply}");
                }
                tried.push(port);
            }
        }
        mail::ensure_never_client(cluster, &[FORGED])?;
        Ok(format!("no connection on {} ports of {} addresses", services.len(), places.len()))
    })();
    for node in Node::EDGES {
        cluster.kubectl(&["label", "node", node.name(), "node-role.kubernetes.io/edge="])?;
    }
    deploy::wait_ready(cluster)?;
    outcome
}

/// Webmail's own connections have no header, and the mail server expects none.
fn webmail(testbed: &Testbed<'_>) -> Result<String> {
    let cluster = testbed.cluster;
    let service = cluster.get(&["-n", "mail", "service", "mailserver"])?;
    let address = service["spec"]["clusterIP"].as_str().context("the Service has no address")?;
    let talk = format!(
        "exec 3<>/dev/tcp/{address}/25; read -r -t 5 greeting <&3; echo \"$greeting\"; \
         printf 'EHLO webmail\\r\\nQUIT\\r\\n' >&3; cat <&3"
    );
    let said = cluster.kubectl(&["exec", "webmail", "--", "/bin/bash", "-c", &talk])?;
    let greeting = said.lines().next().unwrap_or_default();
    ensure!(greeting.starts_with("220"), "greeted with: {greeting}");
    let pod = cluster.get(&["pod", "webmail"])?;
    let own = pod["status"]["podIP"].as_str().context("webmail has no address")?.to_owned();
    let line = mail::wait_log(cluster, &["postfix/smtpd", &format!("connect from unknown[{own}]")])?;
    let logged = line.split_once("postfix/").map_or(line.as_str(), |(_, rest)| rest).to_owned();
    Ok(format!("{greeting}; logged: {logged}"))
}

/// Pods that take the way of clients outside are logged with their own address, or refused where
/// kube-proxy has replaced it: policy Cluster, and a node without inline.
fn pods_outside(testbed: &Testbed<'_>) -> Result<String> {
    network::announce(Node::Edge1)?;
    mail::place(testbed.cluster, Node::Worker)?;
    if testbed.edge.policy == "Local" || testbed.edge.engine == "inline" {
        client::wait_served(VIP, super::RECOVERY)?;
    }
    let mut seen = Vec::new();
    for pod in mail::WEBMAILS {
        for (to, what) in [(VIP, "public address"), (Node::Edge1.address(), "edge node")] {
            let outcome = pod_outside(testbed, pod, to).with_context(|| format!("{pod} to {to}"))?;
            seen.push(format!("{pod} to the {what}: {outcome}"));
        }
    }
    Ok(seen.join("; "))
}

/// One of them; whether it was logged or refused.
fn pod_outside(testbed: &Testbed<'_>, pod: &str, to: Ipv4Addr) -> Result<&'static str> {
    let cluster = testbed.cluster;
    let sender = client::unique(pod);
    let talk = format!(
        "exec 3<>/dev/tcp/{to}/25; hear() {{ while read -r -t 5 line <&3; do echo \"$line\"; \
         [ \"${{line:3:1}}\" = - ] || break; done; }}; hear; \
         for words in 'EHLO pod' 'MAIL FROM:<{sender}@pod.test>' 'RCPT TO:<a@elsewhere.test>' QUIT; do \
         printf '%s\\r\\n' \"$words\" >&3; hear; done"
    );
    let said = cluster
        .kubectl(&["exec", pod, "--", "/bin/bash", "-c", &talk])
        .unwrap_or_else(|error| format!("{error:#}"));
    let greeting = said.lines().next().unwrap_or_default();
    if greeting.starts_with("421") && to == VIP && testbed.edge.policy == "Cluster" {
        return Ok("refused with 421");
    }
    ensure!(greeting.starts_with("220"), "greeted with: {said}");
    // It relays for no client, and says in one line whom it has refused.
    let line = mail::wait_log(cluster, &["postfix/proxied25", "reject: RCPT from", &sender])?;
    let found = cluster.get(&["pod", pod])?;
    let own = found["status"]["podIP"].as_str().context("the pod has no address")?;
    ensure!(
        line.contains(&format!("unknown[{own}]")),
        "the pod is {own}, and the mail server logged: {line}"
    );
    Ok("its own address")
}

/// The service account may read what it follows, and no more.
fn roles(testbed: &Testbed<'_>) -> Result<String> {
    const ACCOUNT: &str = "--as=system:serviceaccount:injector:injector";
    let cluster = testbed.cluster;
    let may =
        |words: &[&str]| -> bool { cluster.kubectl(&[&["auth", "can-i", ACCOUNT], words].concat()).is_ok() };
    for verb in ["list", "watch"] {
        let words = [verb, "endpointslices.discovery.k8s.io", "-n", "mail"];
        ensure!(may(&words), "it may not {}", words.join(" "));
    }
    for namespace in ["mail", "injector"] {
        for what in ["secrets", "configmaps", "pods"] {
            let words = ["get", what, "-n", namespace];
            ensure!(!may(&words), "it may {}", words.join(" "));
        }
        for verb in ["get", "create", "update", "patch", "delete"] {
            let words = [verb, "endpointslices.discovery.k8s.io", "-n", namespace];
            ensure!(!may(&words), "it may {}", words.join(" "));
        }
    }
    let everywhere = ["list", "endpointslices.discovery.k8s.io", "-n", "default"];
    ensure!(!may(&everywhere), "it may {}", everywhere.join(" "));
    let listed = cluster.kubectl(&["auth", "can-i", "--list", ACCOUNT, "-n", "mail"])?;
    let own = listed.lines().filter(|line| !line.contains("selfsubject") && !line.starts_with(' '));
    println!("{}", own.map(|line| format!("      {line}\n")).collect::<String>().trim_end());
    Ok("lists and watches EndpointSlices in the mail server's namespace, changes none, and reads no Secrets, ConfigMaps or Pods".into())
}
