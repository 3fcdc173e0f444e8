//! The addresses of a Service's load balancer: `status.loadBalancer` of a `Service`.

use std::net::IpAddr;

use serde::Deserialize;

use super::{
    exposure::Exposure,
    resource::{Metadata, Resource, Selector},
};
use crate::config::ServiceRef;

/// A Service, in what its load balancer says of it.
#[derive(Debug, Deserialize)]
pub(super) struct Service {
    metadata: Metadata,
    #[serde(default)]
    spec: ServiceSpec,
    #[serde(default)]
    status: ServiceStatus,
}

/// The fields that say who reaches it. Their defaults are the API's.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceSpec {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    external_traffic_policy: Option<String>,
}

impl Service {
    /// How clients reach it.
    pub(super) fn exposure(&self) -> Exposure {
        let ServiceSpec { kind, cluster_ip, external_traffic_policy } = &self.spec;
        Exposure {
            kind: kind.clone().unwrap_or_else(|| "ClusterIP".to_owned()),
            headless: cluster_ip.as_deref() == Some("None"),
            keeps_clients_address: external_traffic_policy.as_deref() == Some("Local"),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceStatus {
    load_balancer: Option<LoadBalancer>,
}

#[derive(Debug, Deserialize)]
struct LoadBalancer {
    ingress: Option<Vec<Ingress>>,
}

#[derive(Debug, Deserialize)]
struct Ingress {
    /// Without it, the load balancer has a name.
    ip: Option<String>,
}

impl Resource for Service {
    type State = Vec<IpAddr>;

    const PLURAL: &'static str = "services";
    const GROUP: &'static str = "";
    const VERSIONS: &'static [&'static str] = &["v1"];

    fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// A Role that names the Service (`resourceNames`) allows a query with exactly this selector.
    fn selector(service: &ServiceRef) -> Selector {
        Selector::Field(format!("metadata.name={}", service.name()))
    }

    fn state<'o>(services: impl Iterator<Item = &'o Self>) -> Vec<IpAddr> {
        let balancers = services.filter_map(|service| service.status.load_balancer.as_ref());
        let ingress = balancers.flat_map(|balancer| balancer.ingress.iter().flatten());
        let addresses = ingress.filter_map(|ingress| ingress.ip.as_deref()?.parse().ok());
        let mut addresses: Vec<IpAddr> = addresses.filter(|ip: &IpAddr| !ip.is_unspecified()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn addresses_are_those_of_the_load_balancer() {
        for (status, expected) in [
            (json!({ "loadBalancer": {} }), &[][..]),
            (json!({ "loadBalancer": null }), &[]),
            (json!({ "loadBalancer": { "ingress": null } }), &[]),
            (
                json!({ "loadBalancer": { "ingress": [
                    { "ip": "2001:db8::10" }, { "ip": "192.0.2.10", "ipMode": "VIP" }, { "ip": "192.0.2.10" },
                ] } }),
                &["192.0.2.10", "2001:db8::10"],
            ),
            (json!({ "loadBalancer": { "ingress": [{ "hostname": "lb.example" }, { "ip": "x" }] } }), &[]),
        ] {
            let service: Service =
                serde_json::from_value(json!({ "metadata": { "name": "mx" }, "status": status })).unwrap();
            let addresses: Vec<_> =
                Service::state([&service].into_iter()).iter().map(ToString::to_string).collect();
            assert_eq!(addresses, expected, "{status}");
        }
    }
}
