//! How clients reach a Service, for `injector doctor --kubernetes`.

/// What kube-proxy and a load balancer make of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exposure {
    /// Its type: `ClusterIP`, `NodePort`, `LoadBalancer` or `ExternalName`.
    pub kind: String,
    /// It has no cluster address: kube-proxy has no rules for it.
    pub headless: bool,
    /// `externalTrafficPolicy: Local`: a node leads clients to its own endpoints alone, and keeps their
    /// addresses.
    pub keeps_clients_address: bool,
}
