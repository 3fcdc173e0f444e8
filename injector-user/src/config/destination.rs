//! Where the connections to a backend go.

use std::{fmt, net::SocketAddr};

use super::service::{ServicePort, ServiceRef};

/// An address, or a name of one or more.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    /// As written. Its port is never 0.
    Address(SocketAddr),
    /// A name to resolve.
    Name {
        /// A DNS name in lower case, with the final dot if it is written.
        name: String,
        /// Never 0.
        port: u16,
    },
    /// The endpoints of a Service of Kubernetes.
    Service {
        /// The Service.
        service: ServiceRef,
        /// The port of its endpoints.
        port: ServicePort,
    },
}

impl Destination {
    /// The port, if the configuration has its number.
    #[must_use]
    pub const fn port(&self) -> Option<u16> {
        match self {
            Self::Address(address) => Some(address.port()),
            Self::Name { port, .. } | Self::Service { port: ServicePort::Number(port), .. } => Some(*port),
            Self::Service { port: ServicePort::Name(_), .. } => None,
        }
    }

    /// The host without the port.
    #[must_use]
    pub fn host(&self) -> String {
        match self {
            Self::Address(address) => address.ip().to_string(),
            Self::Name { name, .. } => name.clone(),
            Self::Service { service, .. } => service.to_string(),
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name { name, port } => write!(f, "{name}:{port}"),
            Self::Service { service, port } => write!(f, "{service}:{port}"),
        }
    }
}
