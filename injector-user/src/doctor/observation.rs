//! What is tried on a backend's address, and what was seen: plain data between the thin part that has sockets and the part
//! that judges.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use crate::{
    config::{ProxyVersion, Receiver},
    protocol::{FirstSpeaker, Protocol},
};

/// Sooner than this is at once: nobody was waited for. Dovecot gives a header 3 s, Postfix 5 s.
pub const IMMEDIATE: Duration = Duration::from_millis(1500);

/// Family of the addresses in a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    #[must_use]
    pub const fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// One address of one backend of one listener: what is examined.
#[derive(Clone, Debug)]
pub struct Target {
    /// The listener's name.
    pub listener: String,
    /// What is spoken on it.
    pub protocol: Protocol,
    /// What the injector sends there.
    pub receiver: Receiver,
    /// Whether clients can come to the listener over IPv6.
    pub ipv6_clients: bool,
    /// Whether clients can come to the listener over IPv4.
    pub ipv4_clients: bool,
    /// As the configuration has it, `mail.internal:2525`.
    pub backend: String,
    /// Where the probes go.
    pub address: SocketAddr,
    /// Whom the backend sees, as the kernel chose it; `None` without a route.
    pub source: Option<IpAddr>,
    /// Other addresses of this host, from which nobody should be believed.
    pub other_sources: Vec<IpAddr>,
    /// This host is not the injector's: nobody here should be believed.
    pub untrusted: bool,
}

impl Target {
    /// Whether the client speaks first, and in TLS.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.protocol.speaks_first() == FirstSpeaker::Client
    }

    /// Whether the listener's header carries more than addresses.
    #[must_use]
    pub fn has_tlvs(&self) -> bool {
        let Receiver { crc32c, unique_id, authority, noop, custom, .. } = &self.receiver;
        *crc32c || *unique_id || authority.is_some() || noop.is_some() || !custom.is_empty()
    }

    /// The version that the injector is not set to.
    #[must_use]
    pub const fn other_version(&self) -> ProxyVersion {
        match self.receiver.version {
            ProxyVersion::V1 => ProxyVersion::V2,
            ProxyVersion::V2 => ProxyVersion::V1,
        }
    }
}

/// What is sent on a connection of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Nothing.
    NoHeader,
    /// A TLS ClientHello, without a header.
    Tls,
    /// A header, and in the protocols of implicit TLS a ClientHello after it.
    Header {
        /// Its version.
        version: ProxyVersion,
        /// The family of its addresses.
        family: Family,
        /// With the TLVs of the listener.
        tlvs: bool,
    },
    /// The listener's header with another client in it, and after the greeting the question what that client may do.
    Claim {
        /// The header's version.
        version: ProxyVersion,
        /// The family of its addresses.
        family: Family,
        /// The client in it.
        client: Client,
    },
}

/// A client that is not this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// 127.0.0.1 or ::1, which servers tend to trust.
    Localhost,
    /// An address for documentation, which nobody trusts.
    Documentation,
}

impl Client {
    /// Its address.
    #[must_use]
    pub const fn ip(self, family: Family) -> IpAddr {
        match (self, family) {
            (Self::Localhost, Family::V4) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            (Self::Localhost, Family::V6) => IpAddr::V6(Ipv6Addr::LOCALHOST),
            (Self::Documentation, Family::V4) => IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
            (Self::Documentation, Family::V6) => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
        }
    }
}

/// A probe, and from where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What is sent.
    pub probe: Probe,
    /// The local address to bind to; `None` leaves it to the kernel, as the daemon does.
    pub from: Option<IpAddr>,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The connection was refused.
    Refused,
    /// Nobody answered the SYN.
    NoAnswer,
    /// No connection for another reason, such as no route.
    Unreachable(String),
    /// The server greeted, and took nothing that was sent for a command.
    Greeted(Greeting),
    /// The server greeted, and took the header for commands.
    Misunderstood {
        /// How it greeted.
        greeting: Greeting,
        /// Its first complaint.
        complaint: String,
    },
    /// In place of a greeting the server said that it will not serve.
    TurnedAway(String),
    /// Something that is not the protocol; in TLS: clear text.
    Strange(String),
    /// A TLS alert by this name.
    Alert(String),
    /// The server closed without a byte.
    Closed {
        /// By a reset.
        reset: bool,
    },
    /// Nothing came, and nothing ended.
    Silent,
}

/// How a server greeted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Greeting {
    /// Its first line.
    pub line: String,
    /// `220-` came well before `220 `: the mark of postscreen, which waits for clients that speak too early.
    pub teaser: bool,
}

/// What a server allows the client in a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dialogue {
    /// In SMTP: to send mail to a foreign domain without a login.
    Relay(Relay),
    /// In clear-text IMAP, POP3 and ManageSieve: to send a password.
    ClearTextLogin(bool),
}

/// A server's answer to a recipient in a foreign domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Relay {
    /// Accepted, in these words: it relays.
    Accepted(String),
    /// Refused, in these words.
    Refused(String),
    /// Neither, for this reason.
    Unknown(String),
}

impl Dialogue {
    /// The client is allowed what a stranger should not be.
    #[must_use]
    pub const fn is_allowed(&self) -> bool {
        matches!(self, Self::Relay(Relay::Accepted(_)) | Self::ClearTextLogin(true))
    }
}

/// One observation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// What was sent, and from where.
    pub step: Step,
    /// What came of it.
    pub outcome: Outcome,
    /// When, counted from the connection.
    pub after: Duration,
    /// The version of TLS, if a handshake was completed.
    pub tls: Option<String>,
    /// What the dialogue after the greeting came to, if there was one.
    pub dialogue: Option<Dialogue>,
}

impl Observation {
    /// The server spoke the protocol: it understood all that was sent.
    #[must_use]
    pub fn answered(&self) -> bool {
        match &self.outcome {
            Outcome::Greeted(_) => true,
            Outcome::Alert(name) => !is_record_error(name),
            Outcome::Misunderstood { .. } => false,
            _ => self.tls.is_some(),
        }
    }

    /// There was no connection.
    #[must_use]
    pub const fn failed_to_connect(&self) -> bool {
        matches!(self.outcome, Outcome::Refused | Outcome::NoAnswer | Outcome::Unreachable(_))
    }

    /// The server closed without a byte and without having waited for one.
    #[must_use]
    pub fn closed_immediately(&self) -> bool {
        matches!(self.outcome, Outcome::Closed { .. }) && self.tls.is_none() && self.after < IMMEDIATE
    }

    /// What the server said in clear text or in TLS.
    #[must_use]
    pub fn said(&self) -> Option<&str> {
        match &self.outcome {
            Outcome::Greeted(greeting) | Outcome::Misunderstood { greeting, .. } => Some(&greeting.line),
            Outcome::TurnedAway(line) | Outcome::Strange(line) => Some(line),
            _ => None,
        }
    }
}

/// Alerts with which a TLS server says that what came is no TLS, as where it took a header for a record (RFC 8446, section
/// 6.2). All others mean that it has read the ClientHello.
fn is_record_error(alert: &str) -> bool {
    ["UnexpectedMessage", "BadRecordMac", "RecordOverflow", "DecodeError"].contains(&alert)
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHeader => f.pad("without a header"),
            Self::Tls => f.pad("TLS without a header"),
            Self::Header { version, family, .. } => f.pad(&format!("header {version}, {family}")),
            Self::Claim { version, family, client } => {
                f.pad(&format!("header {version}, client {}", client.ip(*family)))
            }
        }
    }
}

impl Probe {
    /// Its name in JSON.
    #[must_use]
    pub fn code(&self) -> String {
        match self {
            Self::NoHeader => "silence".to_owned(),
            Self::Tls => "tls".to_owned(),
            Self::Header { version, family, tlvs } => {
                let tlvs = if *tlvs { "" } else { "_without_tlvs" };
                format!("header_{version}_{}{tlvs}", family.to_string().to_lowercase())
            }
            Self::Claim { version, family, client } => {
                let client = match client {
                    Client::Localhost => "localhost",
                    Client::Documentation => "documentation",
                };
                format!("header_{version}_{}_{client}", family.to_string().to_lowercase())
            }
        }
    }
}
