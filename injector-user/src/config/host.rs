//! The host part of a backend's address.

use std::{fmt, net::IpAddr};

/// An address, or a name to resolve.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// As written.
    Ip(IpAddr),
    /// A DNS name in lower case, with the final dot if it is written.
    Name(String),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => ip.fmt(f),
            Self::Name(name) => f.pad(name),
        }
    }
}
