//! The client's address at the mail server, wherever its pod is and whatever leads there.

use anyhow::{Context as _, Result, ensure};

use super::{Testbed, Trial, trial};
use crate::cluster::{
    client::{self, Session},
    deploy::Edge,
    mail, network,
    plan::{Node, VIP},
};

/// Where the mail server may be, seen from the edge node that has the public address.
const PLACES: [(Node, &str); 3] =
    [(Node::Worker, "elsewhere"), (Node::Edge1, "on the same node"), (Node::Edge2, "on the other edge")];

pub(super) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for edge in Edge::ALL {
        let Edge { engine, policy } = edge;
        for (node, place) in PLACES {
            let name = format!("address/{engine}/{policy}/mail server {place}");
            trials.push(trial(name, edge, move |testbed| address(testbed, edge, node)));
        }
    }
    trials.push(trial("address/two edges, one pod", Edge::INLINE, two_edges));
    trials
}

fn address(testbed: &Testbed<'_>, edge: Edge, node: Node) -> Result<String> {
    network::announce(Node::Edge1)?;
    mail::place(testbed.cluster, node)?;
    if is_translated(edge) {
        return refused();
    }
    client::wait_served(VIP, super::RECOVERY)?;
    client::check_address(testbed.cluster, VIP, testbed.edge.engine)
}

/// Whether kube-proxy replaces the client's address before the sockets see the connection. Inline
/// takes it before kube-proxy does.
fn is_translated(edge: Edge) -> bool {
    edge.policy == "Cluster" && edge.engine != "inline"
}

/// kube-proxy chooses one of two endpoints each time: that of this node gets the client's address,
/// that of the other node gets this node's, and must refuse. [`super::run_one`] looks whether a node
/// was ever logged as the client.
fn refused() -> Result<String> {
    const TRIES: usize = 20;
    let mut replies = std::collections::BTreeSet::new();
    let mut served = 0;
    for _ in 0..TRIES {
        let mut session = Session::connect(VIP, 25, b"")?;
        let reply = session.line().context("no refusal, but an end without a reply")?;
        if reply.starts_with("220") {
            for command in ["EHLO client", "MAIL FROM:<a@client>", "RCPT TO:<b@example.test>", "QUIT"] {
                session.command(command)?;
            }
            served += 1;
            continue;
        }
        ensure!(reply.starts_with("421"), "a client whose address was lost is greeted with: {reply}");
        replies.insert(reply);
    }
    // None of so many at the other node: once in a million runs.
    ensure!(!replies.is_empty(), "all {TRIES} sessions were served");
    let replies = replies.into_iter().collect::<Vec<_>>().join(" | ");
    Ok(format!("{served} of {TRIES} served under the client's address, the others refused: {replies}"))
}

/// Each edge serves, and lets the other one's packets pass, wherever the pod is.
fn two_edges(testbed: &Testbed<'_>) -> Result<String> {
    let mut seen = String::new();
    for (node, _) in PLACES {
        mail::place(testbed.cluster, node)?;
        for edge in Node::EDGES {
            network::announce(edge)?;
            let context = || format!("public address at {edge}, mail server on {node}");
            client::wait_served(VIP, super::RECOVERY).with_context(context)?;
            seen = client::check_address(testbed.cluster, VIP, testbed.edge.engine).with_context(context)?;
        }
    }
    network::announce(Node::Edge1)?;
    Ok(format!("{seen}, from both edges, with the mail server on each node"))
}
