//! `EndpointSlice` of `discovery.k8s.io`, in the fields that versions v1 and v1beta1 share, and in
//! those of each (Kubernetes API reference, "EndpointSlice v1").

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use serde::Deserialize;

use super::{
    endpoints::{Endpoint, Endpoints, Readiness},
    resource::{Metadata, Resource, Selector},
};
use crate::config::ServiceRef;

/// The label by which a slice belongs to a Service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// What v1beta1 has in place of `nodeName` and `zone`: labels of the node.
const NODE_LABEL: &str = "kubernetes.io/hostname";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// A part of the endpoints of a Service.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EndpointSlice {
    metadata: Metadata,
    #[serde(default)]
    address_type: String,
    endpoints: Option<Vec<SliceEndpoint>>,
    ports: Option<Vec<SlicePort>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SliceEndpoint {
    #[serde(default)]
    addresses: Vec<String>,
    conditions: Option<Conditions>,
    node_name: Option<String>,
    zone: Option<String>,
    topology: Option<BTreeMap<String, String>>,
    hints: Option<Hints>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Hints {
    for_zones: Option<Vec<Named>>,
    for_nodes: Option<Vec<Named>>,
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
}

#[derive(Debug, Deserialize)]
struct SlicePort {
    name: Option<String>,
    /// Without it, all ports.
    port: Option<u16>,
    protocol: Option<String>,
}

impl Conditions {
    /// As kube-proxy reads them (`pkg/proxy/endpointslicecache.go`): what is not said is ready, serves as
    /// it is ready, and does not end.
    fn readiness(self) -> Readiness {
        let ready = self.ready.unwrap_or(true);
        let serves = self.serving.unwrap_or(ready);
        match (ready, serves && self.terminating.unwrap_or(false)) {
            (true, _) => Readiness::Ready,
            (false, true) => Readiness::Terminating,
            (false, false) => Readiness::NotReady,
        }
    }
}

impl EndpointSlice {
    fn endpoints(&self) -> impl Iterator<Item = Endpoint> {
        let tcp = |port: &&SlicePort| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
        let numbered = |port: &SlicePort| {
            Some((port.name.clone().unwrap_or_default(), port.port.filter(|number| *number != 0)?))
        };
        let ports: Arc<[_]> = self.ports.iter().flatten().filter(tcp).filter_map(numbered).collect();
        self.endpoints
            .iter()
            .flatten()
            .flat_map(|endpoint| endpoint.addresses.iter().map(move |address| (endpoint, address)))
            .filter_map(move |(endpoint, address)| {
                let address = self.address(address)?;
                Some(endpoint.at(address, Arc::clone(&ports)))
            })
    }

    /// An address to which connections may go. A user who may write slices must not lead them to a daemon
    /// on the loopback device of this host, which would take them for local.
    fn address(&self, text: &str) -> Option<IpAddr> {
        let address: IpAddr = text.parse().ok()?;
        let family = match self.address_type.as_str() {
            "IPv4" => address.is_ipv4(),
            "IPv6" => address.is_ipv6(),
            _ => false,
        };
        let is_local = match address {
            IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local() || ip == Ipv4Addr::BROADCAST,
            IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local() || ip.to_ipv4_mapped().is_some(),
        };
        let usable = family && !is_local && !address.is_unspecified() && !address.is_multicast();
        usable.then_some(address)
    }
}

impl SliceEndpoint {
    fn at(&self, address: IpAddr, ports: Arc<[(String, u16)]>) -> Endpoint {
        let label = |key: &str| self.topology.as_ref().and_then(|labels| labels.get(key)).cloned();
        let names = |hints: fn(&Hints) -> &Option<Vec<Named>>| -> BTreeSet<String> {
            let named = self.hints.as_ref().and_then(|it| hints(it).as_ref());
            named.into_iter().flatten().map(|named| named.name.clone()).collect()
        };
        Endpoint {
            address,
            ports,
            readiness: self.conditions.unwrap_or_default().readiness(),
            node: self.node_name.clone().or_else(|| label(NODE_LABEL)),
            zone: self.zone.clone().or_else(|| label(ZONE_LABEL)),
            for_zones: names(|hints| &hints.for_zones),
            for_nodes: names(|hints| &hints.for_nodes),
        }
    }
}

impl Resource for EndpointSlice {
    type State = Endpoints;

    const PLURAL: &'static str = "endpointslices";
    const GROUP: &'static str = "discovery.k8s.io";
    // Before 1.21 there is only v1beta1, since 1.25 only v1.
    const VERSIONS: &'static [&'static str] = &["v1", "v1beta1"];

    fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    fn selector(service: &ServiceRef) -> Selector {
        Selector::Label(format!("{SERVICE_LABEL}={}", service.name()))
    }

    fn state<'o>(slices: impl Iterator<Item = &'o Self>) -> Endpoints {
        Endpoints::new(slices.flat_map(Self::endpoints).collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read(slice: serde_json::Value) -> Vec<Endpoint> {
        let slice: EndpointSlice = serde_json::from_value(slice).unwrap();
        slice.endpoints().collect()
    }

    /// As Kubernetes 1.20 answers, which has no other version.
    #[test]
    fn version_v1beta1_names_node_and_zone_in_labels() {
        let endpoints = read(json!({
            "metadata": { "name": "mx-2j7vk", "resourceVersion": "812", "generateName": "mx-" },
            "addressType": "IPv4",
            "endpoints": [{
                "addresses": ["10.244.1.7"],
                "conditions": { "ready": true },
                "targetRef": { "kind": "Pod", "namespace": "mail", "name": "mx-0" },
                "topology": { "kubernetes.io/hostname": "edge-1", "topology.kubernetes.io/zone": "west" },
            }],
            "ports": [{ "name": "smtp", "protocol": "TCP", "port": 2525 }],
        }));
        let expected = Endpoint {
            address: "10.244.1.7".parse().unwrap(),
            ports: [("smtp".to_owned(), 2525)].into(),
            readiness: Readiness::Ready,
            node: Some("edge-1".to_owned()),
            zone: Some("west".to_owned()),
            for_zones: BTreeSet::new(),
            for_nodes: BTreeSet::new(),
        };
        assert_eq!(endpoints, [expected]);
    }

    #[test]
    fn version_v1_has_fields_for_them() {
        let endpoints = read(json!({
            "metadata": { "name": "mx-2j7vk", "resourceVersion": "812" },
            "addressType": "IPv6",
            "endpoints": [{
                "addresses": ["fd00::7"],
                "conditions": { "ready": false, "serving": true, "terminating": true },
                "nodeName": "edge-1",
                "zone": "west",
                "hints": { "forZones": [{ "name": "west" }, { "name": "north" }], "forNodes": [{ "name": "edge-1" }] },
            }],
            // Only TCP, and no port that stands for all.
            "ports": [
                { "name": "smtp", "port": 2525 },
                { "name": "dns", "protocol": "UDP", "port": 53 },
                { "name": "all" },
            ],
        }));
        let expected = Endpoint {
            address: "fd00::7".parse().unwrap(),
            ports: [("smtp".to_owned(), 2525)].into(),
            readiness: Readiness::Terminating,
            node: Some("edge-1".to_owned()),
            zone: Some("west".to_owned()),
            for_zones: ["north", "west"].map(str::to_owned).into(),
            for_nodes: ["edge-1".to_owned()].into(),
        };
        assert_eq!(endpoints, [expected]);
    }

    #[test]
    fn what_a_condition_does_not_say_has_a_default() {
        for (conditions, expected) in [
            (json!(null), Readiness::Ready),
            (json!({}), Readiness::Ready),
            (json!({ "ready": null }), Readiness::Ready),
            (json!({ "ready": false }), Readiness::NotReady),
            (json!({ "ready": false, "serving": true }), Readiness::NotReady),
            (json!({ "ready": false, "terminating": true }), Readiness::NotReady),
            (json!({ "ready": false, "serving": true, "terminating": true }), Readiness::Terminating),
            (json!({ "ready": false, "serving": false, "terminating": true }), Readiness::NotReady),
            // With publishNotReadyAddresses.
            (json!({ "ready": true, "serving": false, "terminating": true }), Readiness::Ready),
        ] {
            let endpoints = read(json!({
                "metadata": {},
                "addressType": "IPv4",
                "endpoints": [{ "addresses": ["10.0.0.1"], "conditions": conditions }],
            }));
            assert_eq!(endpoints[0].readiness, expected, "{conditions}");
        }
    }

    #[test]
    fn addresses_that_no_pod_has_are_left_out() {
        for (family, address) in [
            ("IPv4", "127.0.0.1"),
            ("IPv4", "0.0.0.0"),
            ("IPv4", "169.254.1.1"),
            ("IPv4", "224.0.0.1"),
            ("IPv4", "255.255.255.255"),
            ("IPv4", "fd00::1"),
            ("IPv4", "mail.internal"),
            ("IPv6", "::1"),
            ("IPv6", "::"),
            ("IPv6", "fe80::1"),
            ("IPv6", "ff02::1"),
            ("IPv6", "::ffff:127.0.0.1"),
            ("IPv6", "10.0.0.1"),
            ("FQDN", "10.0.0.1"),
        ] {
            let slice =
                json!({ "metadata": {}, "addressType": family, "endpoints": [{ "addresses": [address] }] });
            assert_eq!(read(slice), [], "{family} {address}");
        }
    }

    #[test]
    fn a_slice_may_have_no_endpoints() {
        assert_eq!(
            read(json!({ "metadata": {}, "addressType": "IPv4", "endpoints": null, "ports": null })),
            []
        );
        assert_eq!(read(json!({ "metadata": {}, "addressType": "IPv4" })), []);
    }

    /// Any JSON of a depth and a size.
    fn any_json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(json!(null)),
            any::<bool>().prop_map(|it| json!(it)),
            any::<i64>().prop_map(|it| json!(it)),
            "(IPv4|IPv6|10\\.0\\.0\\.[0-9]|::1|TCP|.{0,4})".prop_map(|it| json!(it)),
        ];
        let key = prop::sample::select(vec![
            "metadata",
            "name",
            "addressType",
            "endpoints",
            "addresses",
            "conditions",
            "ready",
            "ports",
            "port",
            "hints",
            "forZones",
            "topology",
        ]);
        leaf.prop_recursive(6, 48, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(|it| json!(it)),
                prop::collection::vec((key.clone(), inner), 0..6)
                    .prop_map(|fields| { json!(fields.into_iter().collect::<BTreeMap<_, _>>()) }),
            ]
        })
    }

    proptest! {
        #[test]
        fn nonsense_is_refused_or_read_without_a_panic(slice in any_json()) {
            if let Ok(slice) = serde_json::from_value::<EndpointSlice>(slice) {
                for endpoint in slice.endpoints() {
                    prop_assert!(!endpoint.address.is_loopback());
                }
            }
        }
    }
}
