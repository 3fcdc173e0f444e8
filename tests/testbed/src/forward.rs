//! What the edge forwards, for both HAProxy and the injector.

use std::net::SocketAddr;

use crate::netns::{Family, HostAddresses, MAIL};
use crate::service::Service;

/// One listener on the edge and the backend behind it.
#[derive(Clone, Debug)]
pub struct Forward {
    /// Unique name within one front, for example `smtp-ipv4`.
    pub name: String,
    /// The protocol's name in the injector's configuration.
    pub protocol: &'static str,
    /// Where clients connect.
    pub bind: SocketAddr,
    /// Destination of the header and the payload.
    pub backend: SocketAddr,
}

impl Forward {
    /// From a public address, on a service's standard port, to the mail host's port with a header,
    /// all in one family.
    #[must_use]
    pub fn to_mail(vip: HostAddresses, service: Service, family: Family) -> Self {
        Self {
            name: format!("{}-{}", service.protocol, family.name()),
            protocol: service.protocol,
            bind: SocketAddr::new(vip.of(family), service.standard),
            backend: SocketAddr::new(MAIL.of(family), service.proxied),
        }
    }
}
