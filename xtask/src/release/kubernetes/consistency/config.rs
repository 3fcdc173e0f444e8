//! The part of the configuration that other objects must agree with.

use std::{net::SocketAddr, time::Duration};

use serde::Deserialize;

#[derive(Debug, Deserialize)]
pub(super) struct Config {
    pub(super) admin: Admin,
    pub(super) stop: Stop,
    #[serde(default)]
    pub(super) inline: Inline,
    pub(super) listener: Vec<Listener>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Admin {
    pub(super) socket: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Stop {
    #[serde(deserialize_with = "duration")]
    pub(super) deadline: Duration,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Inline {
    #[serde(default)]
    pub(super) peers: Vec<Addresses>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Listener {
    pub(super) name: String,
    pub(super) bind: Vec<SocketAddr>,
    pub(super) backends: Vec<Backend>,
    #[serde(default)]
    pub(super) virtual_addresses: Vec<Addresses>,
    #[serde(default)]
    pub(super) translated_sources: Vec<String>,
}

/// Addresses as text, or those of a Service.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Addresses {
    Text(String),
    /// `namespace/name`.
    Of {
        service: String,
    },
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Backend {
    Address(String),
    Table { address: String },
    Service { service: String, port: ServicePort },
}

/// The name of a Service's port, or the number at the endpoints.
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub(super) enum ServicePort {
    Name(String),
    Number(u64),
}

impl Config {
    /// Services of which the injector follows the endpoints in a namespace of mail servers.
    pub(super) fn backend_services(&self) -> impl Iterator<Item = &str> {
        self.listener.iter().flat_map(|listener| &listener.backends).filter_map(|backend| match backend {
            Backend::Service { service, .. } => Some(service.as_str()),
            Backend::Address(_) | Backend::Table { .. } => None,
        })
    }

    /// Services whose own addresses, or those of their endpoints, lead to the injectors.
    pub(super) fn own_services(&self) -> impl Iterator<Item = &str> {
        let virtual_addresses = self.listener.iter().flat_map(|listener| &listener.virtual_addresses);
        virtual_addresses.chain(&self.inline.peers).filter_map(Addresses::service)
    }
}

impl Addresses {
    pub(super) fn service(&self) -> Option<&str> {
        match self {
            Self::Text(_) => None,
            Self::Of { service } => Some(service),
        }
    }

    /// Whether these are those of a Service, or this one address.
    pub(super) fn is(&self, wanted: &str) -> bool {
        let (Self::Text(text) | Self::Of { service: text }) = self;
        text == wanted
    }
}

fn duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    humantime::parse_duration(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}
