//! What the doctor sends to a backend's address, and what it observes: plain data between the part
//! that has sockets and the part that decides.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use crate::{
    config::{ProxyVersion, Receiver},
    protocol::{FirstSpeaker, Protocol},
};

/// A server that closes sooner did not wait for a header. Dovecot waits 3 s, Postfix 5 s.
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

/// One address of one backend of one listener.
#[derive(Clone, Debug)]
pub struct Target {
    /// The listener's name.
    pub listener: String,
    /// What is spoken on it.
    pub protocol: Protocol,
    /// The header that the injector sends.
    pub receiver: Receiver,
    /// Whether the listener accepts clients over IPv6.
    pub ipv6_clients: bool,
    /// Whether the listener accepts clients over IPv4.
    pub ipv4_clients: bool,
    /// The backend as configured, such as `mail.internal:2525`.
    pub backend: String,
    /// Where the probes go.
    pub address: SocketAddr,
    /// The source address that the kernel chose, which the backend sees; `None` without a route.
    pub source: Option<IpAddr>,
    /// Other addresses of this host, from which the backend should not trust a header.
    pub other_sources: Vec<IpAddr>,
    /// This host is not the injector's, so the backend should not trust its headers.
    pub untrusted: bool,
}

impl Target {
    /// Whether the protocol begins with a TLS ClientHello.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.protocol.speaks_first() == FirstSpeaker::Client
    }

    /// Whether the listener's header has TLVs.
    #[must_use]
    pub fn has_tlvs(&self) -> bool {
        let Receiver { crc32c, unique_id, authority, noop, custom, .. } = &self.receiver;
        *crc32c || *unique_id || authority.is_some() || noop.is_some() || !custom.is_empty()
    }

    /// Whether the backend's port is the one of the protocol, which other clients use.
    #[must_use]
    pub fn is_on_standard_port(&self) -> bool {
        self.protocol.standard_port() == Some(self.address.port())
    }

    /// The version that the listener does not use.
    #[must_use]
    pub const fn other_version(&self) -> ProxyVersion {
        match self.receiver.version {
            ProxyVersion::V1 => ProxyVersion::V2,
            ProxyVersion::V2 => ProxyVersion::V1,
        }
    }
}

/// What the doctor sends on one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Nothing.
    NoHeader,
    /// A TLS ClientHello, without a header.
    Tls,
    /// A header, followed by a ClientHello if the protocol begins with TLS.
    Header {
        /// Its version.
        version: ProxyVersion,
        /// The family of its addresses.
        family: Family,
        /// With the TLVs of the listener.
        tlvs: bool,
    },
    /// The listener's header with another client address, followed by a dialogue that tests what
    /// the server allows that client.
    Claim {
        /// The header's version.
        version: ProxyVersion,
        /// The family of its addresses.
        family: Family,
        /// The client in it.
        client: Client,
    },
    /// To the standard port of the protocol on the same host, which other clients use: nothing (in
    /// TLS, a ClientHello), or the listener's header.
    StandardPort {
        /// The family of the addresses in the header.
        header: Option<Family>,
    },
}

impl Probe {
    /// Where it goes.
    #[must_use]
    pub fn destination(self, target: &Target) -> SocketAddr {
        match (self, target.protocol.standard_port()) {
            (Self::StandardPort { .. }, Some(port)) => SocketAddr::new(target.address.ip(), port),
            _ => target.address,
        }
    }

    /// Whether it has no header.
    #[must_use]
    pub const fn is_bare(self) -> bool {
        matches!(self, Self::NoHeader | Self::Tls | Self::StandardPort { header: None })
    }

    /// Whether it goes to the backend's own port.
    #[must_use]
    pub const fn is_to_backend(self) -> bool {
        !matches!(self, Self::StandardPort { .. })
    }
}

/// A client address that is not this host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// 127.0.0.1 or ::1, which servers tend to trust.
    Localhost,
    /// An address for documentation, which servers should not trust.
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

/// A probe, and the address to send it from.
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
    /// No answer to the SYN.
    NoAnswer,
    /// Every source port of this host is in use towards the address.
    NoSourcePorts,
    /// The connection failed for another reason, such as no route.
    Unreachable(String),
    /// The server greeted, and read nothing of what was sent as a command.
    Greeted(Greeting),
    /// The server greeted, and answered with an error: it read the header as commands or, without
    /// one, refuses all commands.
    Misunderstood {
        /// How it greeted.
        greeting: Greeting,
        /// Its first complaint.
        complaint: String,
    },
    /// The server sent a rejection instead of a greeting.
    Rejected(String),
    /// The server sent something other than the protocol; in TLS, clear text.
    Strange(String),
    /// A TLS alert by this name.
    Alert(String),
    /// The server closed without a byte.
    Closed {
        /// By a reset.
        reset: bool,
    },
    /// The server sent nothing and did not close.
    Silent,
}

/// How a server greeted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Greeting {
    /// Its first line.
    pub line: String,
    /// `220-` came well before `220 `: this is postscreen, which waits for clients that send too
    /// early.
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

/// A server's reply to a recipient in a foreign domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Relay {
    /// Accepted with this reply: the server relays.
    Accepted(String),
    /// Rejected with this reply.
    Refused(String),
    /// Not determined, for this reason.
    Unknown(String),
}

impl Dialogue {
    /// The server allows the client what it should not allow any host.
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
    /// The time from the connection to the outcome.
    pub after: Duration,
    /// The version of TLS, if a handshake was completed.
    pub tls: Option<String>,
    /// The result of the dialogue after the greeting, if there was one.
    pub dialogue: Option<Dialogue>,
}

impl Observation {
    /// The server spoke the protocol, so it understood all that was sent.
    #[must_use]
    pub fn answered(&self) -> bool {
        match &self.outcome {
            Outcome::Greeted(_) => true,
            Outcome::Alert(name) => !is_record_error(name),
            Outcome::Misunderstood { .. } => false,
            _ => self.tls.is_some(),
        }
    }

    /// The connection could not be made.
    #[must_use]
    pub const fn failed_to_connect(&self) -> bool {
        matches!(
            self.outcome,
            Outcome::Refused | Outcome::NoAnswer | Outcome::NoSourcePorts | Outcome::Unreachable(_)
        )
    }

    /// The server closed without sending a byte, and did not wait for a header.
    #[must_use]
    pub fn closed_immediately(&self) -> bool {
        matches!(self.outcome, Outcome::Closed { .. }) && self.tls.is_none() && self.after < IMMEDIATE
    }

    /// The server's first line, in clear text or in TLS.
    #[must_use]
    pub fn said(&self) -> Option<&str> {
        match &self.outcome {
            Outcome::Greeted(greeting) | Outcome::Misunderstood { greeting, .. } => Some(&greeting.line),
            Outcome::Rejected(line) | Outcome::Strange(line) => Some(line),
            _ => None,
        }
    }
}

/// Alerts that mean that the server did not receive TLS, for example because it read a header as a
/// TLS record (RFC 8446, section 6.2). All others mean that it read the ClientHello.
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
            Self::StandardPort { header: None } => f.pad("standard port, without a header"),
            Self::StandardPort { header: Some(family) } => f.pad(&format!("standard port, header, {family}")),
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
            Self::StandardPort { header: None } => "standard_port".to_owned(),
            Self::StandardPort { header: Some(family) } => {
                format!("standard_port_header_{}", family.to_string().to_lowercase())
            }
        }
    }
}
