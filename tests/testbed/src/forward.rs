//! What the edge is asked to do, said once for HAProxy and the injector.

use std::net::SocketAddr;

use crate::netns::{Family, MAIL, Place};
use crate::service::Service;

/// One listener on the edge and the backend behind it.
#[derive(Clone, Debug)]
pub struct Forward {
    /// Unique within one front, for example `smtp-ipv4`.
    pub name: String,
    /// The protocol's name in the injector's configuration.
    pub protocol: &'static str,
    /// Where clients connect.
    pub bind: SocketAddr,
    /// Where the header and what follows it go.
    pub backend: SocketAddr,
}

impl Forward {
    /// From a public address, on a service's stock port, to the mail host's port with a header, all in one family.
    #[must_use]
    pub fn to_mail(vip: Place, service: Service, family: Family) -> Self {
        Self {
            name: format!("{}-{}", service.protocol, family.name()),
            protocol: service.protocol,
            bind: SocketAddr::new(vip.of(family), service.stock),
            backend: SocketAddr::new(MAIL.of(family), service.proxied),
        }
    }
}
