//! Which service is on which port. Only sizes matter: every byte of the payload is the same.

use std::fmt;

/// What the server expects before the payload on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortKind {
    /// A PROXY header with the client's address, complete in the first read; a connection without
    /// one is counted as bad.
    Header,
    /// Nothing; a header would be read as payload, and the sizes would not match.
    Bare,
}

/// What client and server exchange on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Script {
    /// The client sends and closes; the server reads everything, then closes too.
    Sink,
    /// The client sends a duration (four bytes, milliseconds, big-endian); the server sends for
    /// that long and closes.
    Source,
    /// Requests and responses.
    Dialogue {
        /// Bytes of the server's greeting; 0 if the client speaks first.
        greeting: usize,
        /// Bytes of each request and of its response; at least one pair.
        steps: &'static [(usize, usize)],
        /// Whether the server closes after the last response; otherwise the steps repeat.
        ends: bool,
    },
}

/// One service of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// Unique name.
    pub name: &'static str,
    /// The value of `protocol` in the injector's configuration; only which side speaks first
    /// matters.
    pub protocol: &'static str,
    /// The public port, and the server's port that requires a header.
    pub port: u16,
    /// What is exchanged.
    pub script: Script,
}

impl Service {
    /// The server's port without a header.
    #[must_use]
    pub const fn bare_port(&self) -> u16 {
        self.port + BARE
    }

    /// The service with this name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        ALL.iter().find(|service| service.name == name)
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name)
    }
}

/// Offset from a port with a header to the port of the same service without one.
const BARE: u16 = 1000;

/// Bytes of the largest request; it fits into any socket's send buffer at once.
pub const MAX_REQUEST: usize = 4096;

/// Uploads.
pub const SINK: Service = Service { name: "sink", protocol: "imaps", port: 7001, script: Script::Sink };
/// Downloads.
pub const SOURCE: Service = Service { name: "source", protocol: "imaps", port: 7002, script: Script::Source };
/// One request, one response, close: the cost of a connection.
pub const SHORT: Service = Service {
    name: "short",
    protocol: "imaps",
    port: 7003,
    script: Script::Dialogue { greeting: 0, steps: &[(64, 64)], ends: true },
};
/// Requests and responses of 64 bytes, without end.
pub const ECHO: Service = Service {
    name: "echo",
    protocol: "imaps",
    port: 7004,
    script: Script::Dialogue { greeting: 0, steps: &[(64, 64)], ends: false },
};
/// An SMTP message in clear text: EHLO, MAIL, RCPT, DATA, 4 KiB, QUIT; the server speaks first.
pub const SMTP: Service = Service {
    name: "smtp",
    protocol: "smtp",
    port: 7005,
    script: Script::Dialogue {
        greeting: 40,
        steps: &[(24, 190), (44, 14), (40, 14), (6, 37), (MAX_REQUEST, 42), (6, 15)],
        ends: true,
    },
};
/// A mail client that polls over TLS: NOOP, NOOP, STATUS, FETCH; sizes include TLS' 22 bytes per
/// record.
pub const IMAP: Service = Service {
    name: "imap",
    protocol: "imaps",
    port: 7006,
    script: Script::Dialogue {
        greeting: 0,
        steps: &[(33, 43), (33, 43), (64, 120), (72, 1480)],
        ends: false,
    },
};

/// All services.
pub const ALL: [Service; 6] = [SINK, SOURCE, SHORT, ECHO, SMTP, IMAP];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_names_are_distinct_and_stay_out_of_the_ephemeral_range() {
        let mut ports: Vec<_> = ALL.iter().flat_map(|it| [it.port, it.bare_port()]).collect();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 2 * ALL.len());
        assert!(ports.iter().all(|port| *port < 10_000));
        for service in &ALL {
            assert_eq!(Service::named(service.name), Some(service));
        }
    }

    #[test]
    fn every_dialogue_moves_in_both_directions() {
        for service in &ALL {
            if let Script::Dialogue { steps, .. } = service.script {
                assert!(!steps.is_empty());
                assert!(
                    steps.iter().all(|(request, response)| {
                        *request > 0 && *request <= MAX_REQUEST && *response > 0
                    })
                );
            }
        }
    }
}
