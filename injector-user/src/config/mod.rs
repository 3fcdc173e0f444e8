//! The configuration file: TOML in, checked types out.
//!
//! All errors of a file are reported at once, each with its line, its listener and a suggestion.
//! The result of [`Config::load`] needs no further checks. `docs/config.md` is the reference.

mod admin;
mod backend;
mod crowdsec;
mod destination;
mod guard;
mod health;
mod health_endpoint;
mod inline;
mod kubernetes;
mod limits;
mod listener;
mod log;
mod metrics;
mod network;
mod parse;
mod receiver;
mod remarks;
mod service;
mod source_addresses;
mod splice;
mod stop;
mod summary;
#[cfg(test)]
mod tests;
mod timeouts;
mod virtual_addresses;
mod with_services;

use std::{fs, path::Path};

pub(crate) use self::parse::{
    address::{accepted, accepts, overlap},
    section::MAX_CONNECTIONS,
};
use self::parse::{diagnostic::Diagnostics, section::Section};
pub use self::{
    admin::Admin,
    backend::{Backend, Balance, PRIMARY_REQUIRED, has_primary},
    crowdsec::{Captcha, CrowdSec},
    destination::Destination,
    guard::{Guard, PerSource, Xdp},
    health::{Check, CheckHeader, Ejection, Health},
    health_endpoint::HealthEndpoint,
    inline::{Attachment, Inline, Source},
    kubernetes::Kubernetes,
    limits::Limits,
    listener::{EngineChoice, Listener},
    log::{Log, LogFormat, LogLevel},
    metrics::Metrics,
    network::Network,
    parse::{
        address::parse_flag_address,
        diagnostic::{ConfigError, Diagnostic},
        duration::{DurationError, parse_duration},
    },
    receiver::{CustomTlv, ProxyVersion, Receiver, UNIQUE_ID_LEN},
    remarks::remarks,
    service::{ServicePort, ServiceRef},
    splice::{EnrolmentPolicy, HeaderMethod, Splice, Watermarks},
    stop::Stop,
    summary::summary,
    timeouts::Timeouts,
    with_services::WithServices,
};

/// A minimal complete configuration, with the names that the documentation uses.
pub const EXAMPLE: &str = r#"[metrics]
listen = "127.0.0.1:9145"

[[listener]]
name = "smtp"
bind = ["192.0.2.10:25", "[2001:db8::10]:25"]
protocol = "smtp"
engine = "auto"
backends = ["mail.internal:2525"]
"#;

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where metrics and health are served, if anywhere.
    pub metrics: Option<Metrics>,
    /// Where health alone is served, if anywhere.
    pub health: Option<HealthEndpoint>,
    /// The control socket, if there is one.
    pub admin: Option<Admin>,
    /// Limits over all listeners.
    pub limits: Limits,
    /// How the splice engine uses the kernel.
    pub splice: Splice,
    /// How the inline engine uses the host.
    pub inline: Inline,
    /// How Services of Kubernetes are followed.
    pub kubernetes: Kubernetes,
    /// Bans and limits on sources; `None` if there are none.
    pub guard: Option<Guard>,
    /// How the daemon shuts down.
    pub stop: Stop,
    /// Format and level of the log.
    pub log: Log,
    /// At least one, with distinct names and addresses.
    pub listeners: Vec<Listener>,
}

impl Config {
    /// Reads and checks a file. Refuses one that names a Service of Kubernetes if this build cannot follow
    /// it.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::load_for(path, cfg!(feature = "kubernetes"))
    }

    fn load_for(path: &Path, follows_services: bool) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|error| ConfigError::Read { path: path.to_owned(), error })?;
        let config = Self::parse(&text, &path.display().to_string())?;
        if let (Some(service), false) = (config.services().first(), follows_services) {
            return Err(ConfigError::NotBuilt { path: path.to_owned(), service: (*service).clone() });
        }
        Ok(config)
    }

    /// The Services of Kubernetes that are followed, each once.
    #[must_use]
    pub fn services(&self) -> Vec<&ServiceRef> {
        kubernetes::services(&self.listeners, &self.inline)
    }

    /// Checks the text of a file. `file_name` only appears in messages.
    pub fn parse(text: &str, file_name: &str) -> Result<Self, ConfigError> {
        let diagnostics = Diagnostics::new(text, file_name);
        let config = match toml::de::DeTable::parse(text) {
            Ok(table) => read(Section::root(&table, &diagnostics)),
            Err(error) => {
                diagnostics.add(error.span().map_or(0, |span| span.start), None, error.message().to_owned());
                None
            }
        };
        match (config, diagnostics.into_error()) {
            (Some(config), None) => Ok(config),
            (_, Some(error)) => Err(error),
            (None, None) => Err(ConfigError::Incomplete { file: file_name.to_owned() }),
        }
    }
}

fn read(root: Section<'_>) -> Option<Config> {
    let metrics = root.section("metrics").and_then(metrics::read);
    let health = root.section("health").and_then(|section| health_endpoint::read(section, metrics));
    let admin = root.section("admin").and_then(admin::read);
    let limits = root.section("limits").map(limits::read).unwrap_or_default();
    let splice = root.section("splice").map(splice::read).unwrap_or_default();
    let inline = root.section("inline").map(inline::read).unwrap_or_default();
    let kubernetes = root.section("kubernetes").map(kubernetes::read).unwrap_or_default();
    let guard = root.section("guard").map(guard::read);
    let stop = root.section("stop").map(stop::read).unwrap_or_default();
    let log = root.section("log").map(log::read).unwrap_or_default();
    let listeners = listener::read_all(&root, &[("metrics.listen", metrics), ("health.listen", health)]);
    root.finish();
    let metrics = metrics.map(|(_, listen)| Metrics { listen });
    let health = health.map(|(_, listen)| HealthEndpoint { listen });
    Some(Config {
        metrics,
        health,
        admin,
        limits,
        splice,
        inline,
        kubernetes,
        guard,
        stop,
        log,
        listeners: listeners?,
    })
}
