//! `backends` of a listener.

use std::{fmt, net::SocketAddr};

use super::{
    host::Host,
    parse::{
        address,
        section::{Entry, Section},
    },
};

/// A mail server that expects the PROXY header on this port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Backend {
    /// An address or a name.
    pub host: Host,
    /// Never 0.
    pub port: u16,
    /// Its share of new connections relative to the other backends of its kind. With 0 it gets
    /// none.
    pub weight: u32,
    /// Whether it gets connections only while no primary backend is available.
    pub backup: bool,
    /// The limit of its concurrent sessions from this daemon.
    pub max_connections: Option<usize>,
}

/// Which of the backends that are up gets the next connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Balance {
    /// In turn, in proportion to the weights.
    #[default]
    Weighted,
    /// The one with the fewest sessions for its weight.
    LeastConnections,
    /// The same one for each client's address, while it is up.
    Source,
}

impl Balance {
    pub(super) const CHOICES: [(&'static str, Self); 3] = [
        ("weighted", Self::Weighted),
        ("least_connections", Self::LeastConnections),
        ("source", Self::Source),
    ];

    /// The name in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Weighted => "weighted",
            Self::LeastConnections => "least_connections",
            Self::Source => "source",
        }
    }
}

impl Backend {
    /// The highest weight.
    pub const MAX_WEIGHT: u32 = 1000;
}

/// What the backends of a listener must have among them.
pub const PRIMARY_REQUIRED: &str = "at least one non-backup backend with weight > 0 is required";

/// Whether one of these backends meets [`PRIMARY_REQUIRED`]: of each, whether it is a backup, and its
/// weight.
pub fn has_primary(mut backends: impl Iterator<Item = (bool, u32)>) -> bool {
    backends.any(|(backup, weight)| !backup && weight > 0)
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => SocketAddr::new(*ip, self.port).fmt(f),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

pub(super) fn read_all(section: &Section<'_>, binds: &[SocketAddr]) -> Vec<Backend> {
    let entries = section.required("backends", |section, field| section.entries(field)).unwrap_or_default();
    let mut backends: Vec<Backend> = Vec::new();
    for entry in entries {
        let (at, text, weight, backup, max_connections) = match entry {
            Entry::Text((at, text)) => (at, text, 1, false, None),
            Entry::Table(table) => {
                let address = table.required("address", |table, field| table.string(field));
                let weight = table.integer("weight", 0, u64::from(Backend::MAX_WEIGHT));
                let backup = table.flag("backup").is_some_and(|(_, backup)| backup);
                let max_connections = table.count("max_connections");
                table.finish();
                let Some((at, text)) = address else { continue };
                let weight = weight.and_then(|(_, weight)| u32::try_from(weight).ok()).unwrap_or(1);
                (at, text, weight, backup, max_connections)
            }
        };
        let (host, port) = match address::backend(text) {
            Ok(backend) => backend,
            Err(advice) => {
                section.report_field(at, "backends", &format!(" {text:?}: {advice}"));
                continue;
            }
        };
        if backends.iter().any(|other| (&other.host, other.port) == (&host, port)) {
            section.report_field(at, "backends", &format!(" {text:?}: listed twice"));
        }
        if let Some(bind) = binds.iter().find(|bind| address::is_loop(**bind, &host, port)) {
            let message =
                format!(" {text:?}: points back at this listener (bind \"{bind}\"): connections would loop");
            section.report_field(at, "backends", &message);
        }
        backends.push(Backend { host, port, weight, backup, max_connections });
    }
    let roles = backends.iter().map(|backend| (backend.backup, backend.weight));
    if !backends.is_empty() && !has_primary(roles) {
        section.report_field(section.at(), "backends", &format!(": {PRIMARY_REQUIRED}"));
    }
    backends
}
