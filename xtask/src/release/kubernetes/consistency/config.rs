//! The part of the configuration that other objects must agree with.

use std::{net::SocketAddr, time::Duration};

use serde::Deserialize;

#[derive(Debug, Deserialize)]
pub(super) struct Config {
    pub(super) admin: Admin,
    pub(super) stop: Stop,
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

#[derive(Debug, Deserialize)]
pub(super) struct Listener {
    pub(super) name: String,
    pub(super) bind: Vec<SocketAddr>,
    #[serde(default)]
    pub(super) engine: String,
    pub(super) backends: Vec<Backend>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Backend {
    Plain(String),
    Table { address: String },
}

impl Backend {
    pub(super) fn address(&self) -> &str {
        match self {
            Self::Plain(address) | Self::Table { address } => address,
        }
    }
}

fn duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    humantime::parse_duration(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}
