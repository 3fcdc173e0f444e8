//! `backends` of a listener.

use std::{fmt, net::SocketAddr};

use toml::de::DeValue;

use super::{
    destination::Destination,
    parse::{
        address,
        section::{Entry, Section, Spanned},
    },
    service::{ServicePort, ServiceRef},
};

/// A mail server that expects the PROXY header on this port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Backend {
    /// Where it is.
    pub destination: Destination,
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
        self.destination.fmt(f)
    }
}

pub(super) fn read_all(section: &Section<'_>, binds: &[SocketAddr]) -> Vec<Backend> {
    let entries = section.required("backends", |section, field| section.entries(field)).unwrap_or_default();
    let mut backends: Vec<Backend> = Vec::new();
    for entry in entries {
        let (destination, weight, backup, max_connections) = match entry {
            Entry::Text(text) => (address(section, "backends", text), 1, false, None),
            Entry::Table(table) => {
                let destination = destination(&table);
                let weight = table.integer("weight", 0, u64::from(Backend::MAX_WEIGHT));
                let backup = table.flag("backup").is_some_and(|(_, backup)| backup);
                let max_connections = table.count("max_connections");
                table.finish();
                let weight = weight.and_then(|(_, weight)| u32::try_from(weight).ok()).unwrap_or(1);
                (destination, weight, backup, max_connections)
            }
        };
        let Some((at, text, destination)) = destination else { continue };
        if backends.iter().any(|other| other.destination == destination) {
            section.report_field(at, "backends", &format!(" {text:?}: listed twice"));
        }
        if let Some(bind) = binds.iter().find(|bind| address::is_loop(**bind, &destination)) {
            let message =
                format!(" {text:?}: points back at this listener (bind \"{bind}\"): connections would loop");
            section.report_field(at, "backends", &message);
        }
        backends.push(Backend { destination, weight, backup, max_connections });
    }
    let roles = backends.iter().map(|backend| (backend.backup, backend.weight));
    if !backends.is_empty() && !has_primary(roles) {
        section.report_field(section.at(), "backends", &format!(": {PRIMARY_REQUIRED}"));
    }
    backends
}

/// A destination, its offset and its text in the file.
type Written = (usize, String, Destination);

fn address(section: &Section<'_>, field: &str, (at, text): Spanned<&str>) -> Option<Written> {
    match address::backend(text) {
        Ok(destination) => Some((at, text.to_owned(), destination)),
        Err(advice) => {
            section.report_field(at, field, &format!(" {text:?}: {advice}"));
            None
        }
    }
}

/// The destination of a table: `address`, or `service` and `port`.
fn destination(table: &Section<'_>) -> Option<Written> {
    let service = table.string("service");
    let port = service_port(table);
    let Some((at, text)) = service else {
        if table.has("port") {
            let advice = " is for a service; an address ends with its port, such as \"mail.internal:2525\"";
            table.report_field(table.at(), "port", advice);
        }
        let text = table.required("address", |table, field| table.string(field))?;
        return address(table, "address", text);
    };
    if let Some((at, _)) = table.string("address") {
        table.report_field(at, "address", " and service: a backend has one of them");
    }
    if !table.has("port") {
        table.report_field(at, "port", " is missing: the name of the Service's port, such as \"smtp\"");
    }
    match text.parse::<ServiceRef>() {
        Ok(service) => {
            let destination = Destination::Service { service, port: port? };
            Some((at, destination.to_string(), destination))
        }
        Err(advice) => {
            table.report_field(at, "service", &format!(" {text:?}: {advice}"));
            None
        }
    }
}

/// A number, or the name of a port.
fn service_port(table: &Section<'_>) -> Option<ServicePort> {
    let (at, value) = table.value("port")?;
    if let DeValue::Integer(_) = value {
        let (_, number) = table.integer("port", 1, u64::from(u16::MAX))?;
        return u16::try_from(number).ok().map(ServicePort::Number);
    }
    let (_, text) = table.string("port")?;
    match text.parse() {
        Ok(port) => Some(port),
        Err(advice) => {
            table.report_field(at, "port", &format!(" {text:?}: {advice}"));
            None
        }
    }
}
