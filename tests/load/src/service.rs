//! What is spoken on which port. Sizes alone matter here: every byte of the payload is the same.

use std::fmt;

/// What must come before the payload on a port of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Door {
    /// A PROXY header with the client's address, whole in the first read; a connection without one is counted as bad.
    Header,
    /// Nothing; on this port a header would be taken for payload, and the sizes would not fit.
    Bare,
}

/// What a connection is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Talk {
    /// The client sends until it has enough and finishes; the server reads all of it, then finishes, too.
    Sink,
    /// The client says for how long (four bytes, milliseconds, big-endian); the server sends for so long and finishes.
    Source,
    /// Question and answer.
    Dialogue {
        /// Bytes with which the server begins; 0 where the client does.
        greeting: usize,
        /// Bytes of each question and of its answer; at least one pair.
        steps: &'static [(usize, usize)],
        /// Whether the server closes after the last answer; else the steps begin again.
        ends: bool,
    },
}

/// One service of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// Unique.
    pub name: &'static str,
    /// What the injector is told (`protocol = …`): who speaks first is all that counts.
    pub protocol: &'static str,
    /// The public port, and the server's port that demands a header.
    pub port: u16,
    /// What is spoken.
    pub talk: Talk,
}

impl Service {
    /// The server's port that takes no header.
    #[must_use]
    pub const fn bare_port(&self) -> u16 {
        self.port + BARE
    }

    /// The service of that name.
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

/// Distance of a port without a header from its like with one.
const BARE: u16 = 1000;

/// Bytes of the largest question; it fits into any socket's send buffer at once.
pub const LARGEST_QUESTION: usize = 4096;

/// Uploads.
pub const SINK: Service = Service { name: "sink", protocol: "imaps", port: 7001, talk: Talk::Sink };
/// Downloads.
pub const SOURCE: Service = Service { name: "source", protocol: "imaps", port: 7002, talk: Talk::Source };
/// One question, one answer, end: what a connection costs.
pub const SHORT: Service = Service {
    name: "short",
    protocol: "imaps",
    port: 7003,
    talk: Talk::Dialogue { greeting: 0, steps: &[(64, 64)], ends: true },
};
/// Questions and answers of 64 bytes without end.
pub const ECHO: Service = Service {
    name: "echo",
    protocol: "imaps",
    port: 7004,
    talk: Talk::Dialogue { greeting: 0, steps: &[(64, 64)], ends: false },
};
/// A message by SMTP in clear text: EHLO, MAIL, RCPT, DATA, 4 KiB, QUIT; the server speaks first.
pub const SMTP: Service = Service {
    name: "smtp",
    protocol: "smtp",
    port: 7005,
    talk: Talk::Dialogue {
        greeting: 40,
        steps: &[(24, 190), (44, 14), (40, 14), (6, 37), (LARGEST_QUESTION, 42), (6, 15)],
        ends: true,
    },
};
/// A mail client that looks for news over TLS: NOOP, NOOP, STATUS, FETCH; sizes with TLS' 22 bytes a record.
pub const IMAP: Service = Service {
    name: "imap",
    protocol: "imaps",
    port: 7006,
    talk: Talk::Dialogue { greeting: 0, steps: &[(33, 43), (33, 43), (64, 120), (72, 1480)], ends: false },
};

/// All of them.
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
            if let Talk::Dialogue { steps, .. } = service.talk {
                assert!(!steps.is_empty());
                assert!(steps.iter().all(|(question, answer)| {
                    *question > 0 && *question <= LARGEST_QUESTION && *answer > 0
                }));
            }
        }
    }
}
