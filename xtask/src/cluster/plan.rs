//! Nodes and addresses of the cluster: which exist, and who reaches whom.
//!
//! ```text
//! client 198.51.100.7 ── router ── control 10.0.0.10
//!                          ├────── edge1   10.0.0.11, pods 10.244.11.0/24
//!                          ├────── edge2   10.0.0.12, pods 10.244.12.0/24
//!                          └────── worker  10.0.0.13, pods 10.244.13.0/24
//! ```
//! The router leads the public address 192.0.2.10 to one of the edge nodes, as it would after
//! MetalLB's announcement.

use std::{fmt, net::Ipv4Addr};

use serde::{Deserialize, Serialize};

/// The prefix of the names of namespaces, and the folder of control groups.
pub(super) const PREFIX: &str = "inj-cluster";

/// The public address.
pub(super) const VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);

/// The client, and its router.
pub(super) const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
pub(super) const CLIENT_ROUTER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// The router among the nodes.
pub(super) const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

/// The network of all pods.
pub(super) const PODS: &str = "10.244.0.0/16";

/// The network of cluster IPs.
pub(super) const SERVICES: &str = "10.96.0.0/16";

/// The API server's address in that network: its first (kube-apiserver, `--service-cluster-ip-range`).
pub(super) const API_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);

/// A machine of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Node {
    /// etcd, API server, controller manager and scheduler, and no pods.
    Control,
    Edge1,
    Edge2,
    Worker,
}

impl Node {
    pub(super) const ALL: [Self; 4] = [Self::Control, Self::Edge1, Self::Edge2, Self::Worker];

    /// Those with a kubelet.
    pub(super) const KUBELETS: [Self; 3] = [Self::Edge1, Self::Edge2, Self::Worker];

    /// Those where an injector runs.
    pub(super) const EDGES: [Self; 2] = [Self::Edge1, Self::Edge2];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Edge1 => "edge1",
            Self::Edge2 => "edge2",
            Self::Worker => "worker",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Control => 10,
            Self::Edge1 => 11,
            Self::Edge2 => 12,
            Self::Worker => 13,
        }
    }

    pub(super) fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 0, self.number())
    }

    /// The address with this last number in the network of the node's pods; .1 is the node's own
    /// there.
    pub(super) fn pod(self, last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.number(), last)
    }

    /// The network of the node's pods.
    pub(super) fn pods(self) -> String {
        format!("{}/24", self.pod(0))
    }

    /// The name of the network namespace.
    pub(super) fn netns(self) -> String {
        format!("{PREFIX}-{}", self.name())
    }

    /// The node with this name.
    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|node| node.name() == name)
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The namespaces without a node's processes.
pub(super) fn router_netns() -> String {
    format!("{PREFIX}-router")
}

pub(super) fn client_netns() -> String {
    format!("{PREFIX}-client")
}

/// How kube-proxy translates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub(super) enum ProxyMode {
    Iptables,
    /// Needs the kernel's IPVS.
    Ipvs,
    /// Copies in user space, as before Kubernetes 1.2; removed in 1.26
    Userspace,
}

impl ProxyMode {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
            Self::Userspace => "userspace",
        }
    }
}

/// How pods are connected to their node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub(super) enum Cni {
    /// By a bridge, as flannel and k3s do; iptables sees its packets twice.
    Bridge,
    /// By a route for each pod, as Calico does
    Routed,
}

impl Cni {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Routed => "routed",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_nodes_share_an_address_or_a_network() {
        let addresses: BTreeSet<_> = Node::ALL.map(Node::address).into_iter().chain([ROUTER]).collect();
        assert_eq!(addresses.len(), Node::ALL.len() + 1);
        let pods: BTreeSet<_> = Node::ALL.map(Node::pods).into_iter().collect();
        assert_eq!(pods.len(), Node::ALL.len());
        assert!(Node::ALL.iter().all(|node| node.pod(1).octets()[..2] == [10, 244]), "outside {PODS}");
    }

    #[test]
    fn a_node_has_its_name() {
        assert!(Node::ALL.iter().all(|node| Node::named(node.name()) == Some(*node)));
        assert_eq!(Node::named("client"), None);
    }
}
