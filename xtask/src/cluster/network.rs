//! The cluster's networks: a router with a bridge to the nodes, and a client behind it.

use std::{fs, net::Ipv4Addr, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

use super::plan::{CLIENT, CLIENT_ROUTER, Node, PREFIX, ROUTER, VIP, client_netns, router_netns};

/// Where iproute2 keeps the names of namespaces (ip-netns(8)).
const NAMES: &str = "/run/netns";

/// Creates all namespaces and connects them.
///
/// # Errors
/// When `ip` fails.
pub(super) fn create() -> Result<()> {
    let (router, client) = (router_netns(), client_netns());
    let nodes = Node::ALL.map(Node::netns);
    for name in nodes.iter().chain([&router, &client]) {
        ip(&["netns", "add", name])?;
        ip(&["-n", name, "link", "set", "lo", "up"])?;
    }
    let at = |netns: &str, words: &[&str]| ip(&[&["-n", netns], words].concat());
    at(&router, &["link", "add", "nodes", "type", "bridge"])?;
    at(&router, &["address", "add", &format!("{ROUTER}/24"), "dev", "nodes"])?;
    at(&router, &["link", "set", "nodes", "up"])?;
    sysctl(&router, "net/ipv4/ip_forward", "1")?;
    for node in Node::ALL {
        let netns = node.netns();
        at(&router, &["link", "add", node.name(), "type", "veth", "peer", "name", "eth0", "netns", &netns])?;
        at(&router, &["link", "set", node.name(), "master", "nodes", "up"])?;
        at(&netns, &["address", "add", &format!("{}/24", node.address()), "dev", "eth0"])?;
        at(&netns, &["link", "set", "eth0", "up"])?;
        at(&netns, &["route", "add", "default", "via", &ROUTER.to_string()])?;
        for other in Node::KUBELETS.into_iter().filter(|other| *other != node) {
            at(&netns, &["route", "add", &other.pods(), "via", &other.address().to_string()])?;
        }
    }
    for node in Node::KUBELETS {
        sysctl(&node.netns(), "net/ipv4/ip_forward", "1")?;
        // kubeadm demands it; with it, iptables also sees what a bridge carries.
        sysctl(&node.netns(), "net/bridge/bridge-nf-call-iptables", "1")?;
    }
    at(&router, &["link", "add", "client", "type", "veth", "peer", "name", "eth0", "netns", &client])?;
    at(&router, &["address", "add", &format!("{CLIENT_ROUTER}/24"), "dev", "client"])?;
    at(&router, &["link", "set", "client", "up"])?;
    at(&client, &["address", "add", &format!("{CLIENT}/24"), "dev", "eth0"])?;
    at(&client, &["link", "set", "eth0", "up"])?;
    at(&client, &["route", "add", "default", "via", &CLIENT_ROUTER.to_string()])?;
    announce(Node::Edge1)
}

/// Leads the public address to a node.
///
/// # Errors
/// When `ip` fails.
pub(super) fn announce(node: Node) -> Result<()> {
    route(&format!("{VIP}/32"), node.address())
}

fn route(network: &str, via: Ipv4Addr) -> Result<()> {
    ip(&["-n", &router_netns(), "route", "replace", network, "via", &via.to_string()])
}

/// The existing namespaces of a cluster.
pub(super) fn existing() -> Vec<String> {
    let entries = fs::read_dir(NAMES).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.strip_prefix(PREFIX).is_some_and(|rest| rest.starts_with('-'))).collect()
}

/// The processes in a namespace.
pub(super) fn processes(netns: &str) -> Vec<libc::pid_t> {
    let output = Command::new("ip").args(["netns", "pids", netns]).output();
    let text = output.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&text).split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// Removes a namespace's name.
pub(super) fn remove(netns: &str) -> Result<()> {
    ip(&["netns", "delete", netns])
}

/// A program in a namespace, without anything else of a node.
pub(super) fn command(netns: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", Path::new(NAMES).join(netns).display())).arg(program);
    command
}

fn sysctl(netns: &str, key: &str, value: &str) -> Result<()> {
    let mut write = command(netns, "sh");
    let written = write.args(["-c", &format!("echo {value} > /proc/sys/{key}")]).status()?;
    ensure!(written.success(), "{netns} has no setting {key}");
    Ok(())
}

fn ip(words: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(words).output().context("cannot run ip (install iproute2)")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {}", words.join(" "), complaint.trim());
    Ok(())
}
