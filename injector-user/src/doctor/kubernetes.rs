//! `injector doctor --kubernetes`: what the cluster makes of the Services that the configuration names.
//! [`backend_faults`] and [`public_faults`] decide, [`examine`] reads the API and the routes.

use std::{
    collections::BTreeSet,
    fmt::{self, Write as _},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::ensure;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    config::{Config, Destination, Network, ServicePort, ServiceRef, Source},
    kubernetes::{Endpoints, Exposure, Place, Readiness, Watcher},
};

/// What the API says of a Service.
#[derive(Debug)]
struct Seen {
    /// `None`: there is no such Service.
    exposure: Result<Option<Exposure>, String>,
    endpoints: Result<Endpoints, String>,
}

/// Something to change in the cluster or in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Fault {
    #[error("the API does not say what the Service is: {0}")]
    Unreadable(String),
    #[error("there is no such Service")]
    Missing,
    #[error("no address for connections: {0}")]
    NoAddress(String),
    #[error(
        "it is of type {0}: kube-proxy leads clients from outside to the PROXY port, which believes them any address. \
         Make it headless (clusterIP: None), and have the public Service select the injector's pods"
    )]
    Exposed(String),
    #[error(
        "it has a cluster address: kube-proxy leads every pod to the PROXY port, and engine inline does not use the \
         address. Make another one with clusterIP: None; the field of an existing Service cannot be changed"
    )]
    NotHeadless,
    #[error(
        "its endpoints include backends ({}): kube-proxy leads clients past the injector. Have it select the \
         injector's pods",
        join(.0)
    )]
    LeadsToBackends(BTreeSet<IpAddr>),
    #[error(
        "none of its endpoints ({}) is an address of this host: it selects other pods than the injector's, or the \
         injector's pods lack hostNetwork: true",
        join(.0)
    )]
    NotTheInjectors(BTreeSet<IpAddr>),
    #[error(
        "externalTrafficPolicy is Cluster, and listener {0:?} has no translated_sources: what inline does not take \
         may come from another node with that node's address, and mail would be accepted under it. List the nodes' \
         addresses, or set externalTrafficPolicy: Local"
    )]
    LosesClients(String),
}

/// The report.
#[derive(Debug)]
pub(super) struct ClusterReport {
    services: Vec<ServiceReport>,
    /// From which addresses this host connects to backends; `None` if from the clients'.
    sources: Option<BTreeSet<IpAddr>>,
}

#[derive(Debug)]
struct ServiceReport {
    service: ServiceRef,
    /// What the configuration uses it for.
    used_by: Vec<String>,
    /// How many endpoints have each readiness.
    counts: Option<[usize; 3]>,
    /// Addresses that get connections, and this host's address towards them.
    endpoints: Vec<(SocketAddr, Option<IpAddr>)>,
    faults: Vec<Fault>,
}

/// The faults of a Service of backends. It is the way to PROXY ports.
fn backend_faults(exposure: &Result<Option<Exposure>, String>) -> Vec<Fault> {
    match exposure {
        Err(error) => vec![Fault::Unreadable(error.clone())],
        Ok(None) => vec![Fault::Missing],
        Ok(Some(Exposure { kind, .. })) if kind != "ClusterIP" => vec![Fault::Exposed(kind.clone())],
        Ok(Some(Exposure { headless: false, .. })) => vec![Fault::NotHeadless],
        Ok(Some(_)) => Vec::new(),
    }
}

/// The faults of a Service whose addresses lead clients here. `unguarded` is a listener that uses it
/// without `translated_sources`, if there is one.
fn public_faults(
    exposure: &Result<Option<Exposure>, String>,
    endpoints: &BTreeSet<IpAddr>,
    backends: &BTreeSet<IpAddr>,
    local: &[IpAddr],
    unguarded: Option<&str>,
) -> Vec<Fault> {
    let exposure = match exposure {
        Err(error) => return vec![Fault::Unreadable(error.clone())],
        Ok(None) => return vec![Fault::Missing],
        Ok(Some(exposure)) => exposure,
    };
    let mut faults = Vec::new();
    let shared: BTreeSet<_> = endpoints.intersection(backends).copied().collect();
    if !shared.is_empty() {
        faults.push(Fault::LeadsToBackends(shared));
    } else if !endpoints.is_empty() && !endpoints.iter().any(|ip| local.contains(ip)) {
        faults.push(Fault::NotTheInjectors(endpoints.clone()));
    }
    if let (false, Some(listener)) = (exposure.keeps_clients_address, unguarded) {
        faults.push(Fault::LosesClients(listener.to_owned()));
    }
    faults
}

/// Examines all Services of the configuration.
///
/// # Errors
/// When it names none.
pub(super) async fn examine(
    config: &Config,
    local: &[IpAddr],
    within: Duration,
    source_for: fn(SocketAddr) -> Option<IpAddr>,
) -> anyhow::Result<ClusterReport> {
    ensure!(
        !config.services().is_empty(),
        "the configuration names no Service: --kubernetes has nothing to examine (backends = [{{ service = \
         \"mail/mailserver\", port = \"smtp\" }}])"
    );
    let watcher = Watcher::new(config.kubernetes.clone());
    let mut seen = Vec::new();
    for service in config.services() {
        seen.push((service, look(&watcher, service, within).await));
    }
    let place = watcher.place().borrow().clone();
    let backends: BTreeSet<_> = backends(config)
        .filter_map(|(_, service, _)| seen.iter().find(|(of, _)| *of == service))
        .flat_map(|(_, seen)| seen.endpoints.as_ref().map(Endpoints::addresses).unwrap_or_default())
        .collect();
    let services: Vec<_> = seen
        .iter()
        .map(|(service, seen)| report(config, (service, seen), &backends, (local, &place), source_for))
        .collect();
    let sources = (config.inline.source != Source::Client).then(|| sources(config, &services));
    Ok(ClusterReport { services, sources })
}

async fn look(watcher: &Watcher, service: &ServiceRef, within: Duration) -> Seen {
    let exposure = timeout(within, watcher.exposure(service)).await;
    Seen {
        exposure: exposure.unwrap_or_else(|_elapsed| Err(late(within))),
        endpoints: watcher.endpoints_within(service, within).await.map(Arc::unwrap_or_clone),
    }
}

fn late(within: Duration) -> String {
    format!("no answer within {within:?}")
}

/// The listeners with a Service as a backend.
fn backends(config: &Config) -> impl Iterator<Item = (&str, &ServiceRef, &ServicePort)> {
    let all =
        config.listeners.iter().flat_map(|listener| listener.backends.iter().map(move |it| (listener, it)));
    all.filter_map(|(listener, backend)| match &backend.destination {
        Destination::Service { service, port } => Some((listener.name.as_str(), service, port)),
        Destination::Address(_) | Destination::Name { .. } => None,
    })
}

fn report(
    config: &Config,
    (service, seen): (&ServiceRef, &Seen),
    backends_of_all: &BTreeSet<IpAddr>,
    (local, place): (&[IpAddr], &Place),
    source_for: fn(SocketAddr) -> Option<IpAddr>,
) -> ServiceReport {
    let (mut used_by, mut faults, mut chosen) = (Vec::new(), Vec::new(), BTreeSet::new());
    let mut add = |fault: Fault| {
        if !faults.contains(&fault) {
            faults.push(fault);
        }
    };
    let uses: Vec<_> = backends(config).filter(|(_, of, _)| *of == service).collect();
    if let (Err(error), false) = (&seen.endpoints, uses.is_empty()) {
        add(Fault::NoAddress(error.clone()));
    }
    for (listener, _, port) in &uses {
        used_by.push(format!("backends of {listener}"));
        match seen.endpoints.as_ref().map(|endpoints| endpoints.choose(port, place)) {
            Ok(Ok(addresses)) => chosen.extend(addresses),
            Ok(Err(error)) => add(Fault::NoAddress(error.to_string())),
            Err(_) => {}
        }
    }
    if !uses.is_empty() {
        backend_faults(&seen.exposure).into_iter().for_each(&mut add);
    }
    let public: Vec<_> =
        config.listeners.iter().filter(|it| it.virtual_addresses.services.contains(service)).collect();
    used_by.extend(public.iter().map(|listener| format!("virtual_addresses of {}", listener.name)));
    if !public.is_empty() {
        let endpoints = seen.endpoints.as_ref().map(Endpoints::addresses).unwrap_or_default();
        let unguarded = public.iter().find(|listener| listener.translated_sources.is_empty());
        let unguarded = unguarded.map(|listener| listener.name.as_str());
        public_faults(&seen.exposure, &endpoints, backends_of_all, local, unguarded)
            .into_iter()
            .for_each(&mut add);
    }
    if config.inline.peers.services.contains(service) {
        used_by.push("inline.peers".to_owned());
    }
    let counts =
        seen.endpoints.as_ref().ok().map(|endpoints| Readiness::ALL.map(|it| endpoints.with(it).len()));
    let endpoints = chosen.into_iter().map(|address| (address, source_for(address))).collect();
    ServiceReport { service: service.clone(), used_by, counts, endpoints, faults }
}

/// From which addresses this host connects to the endpoints: what the routes choose, and what is
/// configured in place of that.
fn sources(config: &Config, services: &[ServiceReport]) -> BTreeSet<IpAddr> {
    let routes = services.iter().flat_map(|service| &service.endpoints).filter_map(|(_, source)| *source);
    let listeners = config.listeners.iter().flat_map(|listener| &listener.source_addresses);
    routes.chain(listeners.chain(&config.inline.source_addresses).copied()).collect()
}

impl ClusterReport {
    /// How many faults there are.
    pub(super) fn faults(&self) -> usize {
        self.services.iter().map(|service| service.faults.len()).sum()
    }

    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> fmt::Result {
        for ServiceReport { service, used_by, counts, endpoints, faults } in &self.services {
            writeln!(out, "service {service}: {}", used_by.join(", "))?;
            if let Some([ready, terminating, not_ready]) = counts {
                writeln!(
                    out,
                    "  endpoints  {ready} ready, {terminating} terminating, {not_ready} not ready"
                )?;
            }
            for (address, source) in endpoints {
                match source {
                    Some(source) => writeln!(out, "  {address}  from {source}")?,
                    None => writeln!(out, "  {address}  no route from this host")?,
                }
            }
            for fault in faults {
                writeln!(out, "  FAULT  {fault}")?;
            }
            writeln!(out)?;
        }
        match &self.sources {
            None => writeln!(
                out,
                "inline.source = \"client\": backends see clients' addresses, so no NetworkPolicy and no list of trusted \
                 addresses can tell the injector from others"
            )?,
            Some(sources) if sources.is_empty() => {}
            Some(sources) => {
                writeln!(
                    out,
                    "This host's addresses towards the endpoints. Run this on every edge node, and let all of"
                )?;
                writeln!(out, "them, and no others, in:")?;
                writeln!(out, "  NetworkPolicy, in ingress[].from:")?;
                for source in sources {
                    writeln!(out, "    - ipBlock: {{ cidr: \"{}\" }}", Network::host(*source))?;
                }
                writeln!(out, "  Dovecot: haproxy_trusted_networks = {}", join(sources).replace(", ", " "))?;
            }
        }
        match self.faults() {
            1 => writeln!(out, "1 fault"),
            count => writeln!(out, "{count} faults"),
        }
    }

    pub(super) fn json(&self) -> Value {
        let service = |it: &ServiceReport| {
            let endpoint = |(address, source): &(SocketAddr, Option<IpAddr>)| json!({ "address": address, "source": source });
            json!({
                "service": it.service.to_string(),
                "used_by": it.used_by,
                "ready": it.counts.map(|[ready, ..]| ready),
                "terminating": it.counts.map(|[_, terminating, _]| terminating),
                "not_ready": it.counts.map(|[.., not_ready]| not_ready),
                "endpoints": it.endpoints.iter().map(endpoint).collect::<Vec<_>>(),
                "faults": it.faults.iter().map(ToString::to_string).collect::<Vec<_>>(),
            })
        };
        json!({
            "services": self.services.iter().map(service).collect::<Vec<_>>(),
            "sources": self.sources,
            "faults": self.faults(),
        })
    }
}

fn join(addresses: &BTreeSet<IpAddr>) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(texts: &[&str]) -> BTreeSet<IpAddr> {
        texts.iter().map(|it| it.parse().unwrap()).collect()
    }

    fn of_kind(kind: &str, headless: bool, keeps_clients_address: bool) -> Result<Option<Exposure>, String> {
        Ok(Some(Exposure { kind: kind.to_owned(), headless, keeps_clients_address }))
    }

    #[test]
    fn a_service_of_backends_is_headless() {
        for (exposure, faults) in [
            (of_kind("ClusterIP", true, false), vec![]),
            (of_kind("ClusterIP", false, false), vec![Fault::NotHeadless]),
            (of_kind("NodePort", false, false), vec![Fault::Exposed("NodePort".to_owned())]),
            (of_kind("LoadBalancer", false, true), vec![Fault::Exposed("LoadBalancer".to_owned())]),
            (Ok(None), vec![Fault::Missing]),
            (Err("403".to_owned()), vec![Fault::Unreadable("403".to_owned())]),
        ] {
            assert_eq!(backend_faults(&exposure), faults, "{exposure:?}");
        }
    }

    #[test]
    fn a_public_service_leads_to_the_injectors_with_the_clients_address() {
        let (edges, pods) = (ips(&["10.0.0.11", "10.0.0.12"]), ips(&["10.244.1.25"]));
        let local = ["10.0.0.11".parse().unwrap()];
        let (local_policy, cluster_policy) =
            (of_kind("LoadBalancer", false, true), of_kind("LoadBalancer", false, false));
        for (exposure, endpoints, unguarded, faults) in [
            (&local_policy, &edges, Some("smtp"), vec![]),
            (&cluster_policy, &edges, None, vec![]),
            (&cluster_policy, &edges, Some("smtp"), vec![Fault::LosesClients("smtp".to_owned())]),
            (&local_policy, &pods, None, vec![Fault::LeadsToBackends(pods.clone())]),
            (&local_policy, &ips(&["10.244.7.7"]), None, vec![Fault::NotTheInjectors(ips(&["10.244.7.7"]))]),
            // None is ready yet.
            (&local_policy, &ips(&[]), None, vec![]),
            (&Ok(None), &edges, None, vec![Fault::Missing]),
        ] {
            assert_eq!(
                public_faults(exposure, endpoints, &pods, &local, unguarded),
                faults,
                "{exposure:?} {endpoints:?}"
            );
        }
    }

    #[cfg(feature = "kubernetes")]
    mod with_api {
        use serde_json::json;

        use super::*;
        use crate::kubernetes::stub_api::{StubApi, slice};

        /// The stub has one kind of objects at a time for all paths, so it gets one that reads as both.
        fn service_and_slice(spec: Value, addresses: &[&str]) -> Value {
            let mut object = slice(addresses);
            object["spec"] = spec;
            object
        }

        async fn text(api: &StubApi, listener: &str) -> (usize, String) {
            let text = format!(
                "[[listener]]\nname = \"smtp\"\nbind = [\"[::]:25\"]\nprotocol = \"smtp\"\nbackends = [{{ service = \
                 \"mail/mailserver\", port = \"smtp\" }}]\n{listener}"
            );
            let mut config = Config::parse(&text, "f.toml").unwrap();
            config.kubernetes = api.settings();
            let source_for = |_: SocketAddr| Some(IpAddr::from([10, 0, 0, 11]));
            let local = [IpAddr::from([10, 0, 0, 11])];
            let report = examine(&config, &local, Duration::from_secs(10), source_for).await.unwrap();
            (report.faults(), report.text())
        }

        #[tokio::test]
        async fn a_sound_service_has_its_sources_printed() {
            let api = StubApi::start().await;
            let spec = json!({ "type": "ClusterIP", "clusterIP": "None" });
            api.set("mailserver", service_and_slice(spec, &["10.244.1.25"]));
            let (faults, text) = text(&api, "").await;
            assert_eq!(faults, 0, "{text}");
            insta::assert_snapshot!("sound", text);
        }

        #[tokio::test]
        async fn faults_say_what_to_change() {
            let api = StubApi::start().await;
            let spec = json!({ "type": "LoadBalancer", "clusterIP": "10.96.0.9", "externalTrafficPolicy": "Cluster" });
            api.set("mailserver", service_and_slice(spec, &["10.244.1.25"]));
            let (faults, text) =
                text(&api, "virtual_addresses = [{ service = \"mail/mailserver\" }]\n").await;
            assert_eq!(faults, 3, "{text}");
            insta::assert_snapshot!("faults", text);
        }
    }
}
