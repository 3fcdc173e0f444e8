//! `[kubernetes]`

use std::path::PathBuf;

use super::{
    destination::Destination, inline::Inline, listener::Listener, parse::section::Section,
    service::ServiceRef,
};

/// `[kubernetes]`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kubernetes {
    /// The file with the API server and the credentials. `None`: those of the pod.
    pub kubeconfig: Option<PathBuf>,
    /// The context of that file. `None`: its current one.
    pub context: Option<String>,
    /// The node that the injector runs on.
    pub node: Option<String>,
    /// The zone of that node.
    pub zone: Option<String>,
}

pub(super) fn read(section: Section<'_>) -> Kubernetes {
    let text = |field| {
        let (at, text) = section.string(field)?;
        if text.is_empty() {
            section.report_field(at, field, ": must not be empty");
        }
        Some((at, text.to_owned()))
    };
    let kubeconfig = section.path("kubeconfig");
    let context = text("context");
    if let (Some((at, _)), false) = (&context, section.has("kubeconfig")) {
        section.report_field(*at, "context", ": has no effect without kubeconfig");
    }
    let without_at = |text: Option<(usize, String)>| text.map(|(_, text)| text);
    let kubernetes = Kubernetes {
        kubeconfig,
        context: without_at(context),
        node: without_at(text("node")),
        zone: without_at(text("zone")),
    };
    section.finish();
    kubernetes
}

/// The Services that these settings name, each once.
pub(super) fn services<'s>(listeners: &'s [Listener], inline: &'s Inline) -> Vec<&'s ServiceRef> {
    let backends = listeners.iter().flat_map(|listener| &listener.backends);
    let of_backends = backends.filter_map(|backend| match &backend.destination {
        Destination::Service { service, .. } => Some(service),
        Destination::Address(_) | Destination::Name { .. } => None,
    });
    let of_addresses = listeners.iter().flat_map(|listener| &listener.virtual_addresses.services);
    let mut services: Vec<_> = of_backends.chain(of_addresses).chain(&inline.peers.services).collect();
    services.sort_unstable();
    services.dedup();
    services
}
