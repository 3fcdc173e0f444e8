//! What the rules are made from: services, backends and the table's name.

use std::{fmt, net::SocketAddr, str::FromStr};

use thiserror::Error;

/// A port that clients connect to, and its backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// For the comments of the rules and for error messages; the listener's name.
    pub name: String,
    /// Where clients connect. `0.0.0.0` and `[::]` stand for every address of the host in that
    /// family (only that: `[::]` does not take IPv4). Port never 0.
    pub listen: Vec<SocketAddr>,
    /// The backends. Connections to IPv4 listeners go to the IPv4 backends, those to IPv6 listeners
    /// to the IPv6 ones.
    pub backends: Vec<Backend>,
    /// Whether the backend sees the host's address instead of the client's, and so answers through
    /// the host even where its routes would lead elsewhere.
    pub masquerade: bool,
}

/// A backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Reached by forwarding, so never an address of the host itself.
    pub address: SocketAddr,
    /// Its share of new connections, in proportion to the sum of its family. 0 gets none.
    pub weight: u32,
}

/// The name of the table: 1 to 63 of a-z, A-Z, 0-9, `_` and `-`, first a letter.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TableName(String);

impl Default for TableName {
    /// `injector`.
    fn default() -> Self {
        Self("injector".to_owned())
    }
}

impl FromStr for TableName {
    type Err = NatError;

    fn from_str(name: &str) -> Result<Self, NatError> {
        let charset = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
        let letter = name.starts_with(|first: char| first.is_ascii_alphabetic());
        // nft's JSON takes any name, even one that makes the ruleset's own listing impossible to
        // load again.
        if letter && name.len() <= 63 && name.bytes().all(charset) {
            Ok(Self(name.to_owned()))
        } else {
            Err(NatError::TableName(name.to_owned()))
        }
    }
}

impl TableName {
    /// As nft is given it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why services cannot be turned into rules.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum NatError {
    /// Not a [`TableName`].
    #[error("{0:?} is not a table name: 1 to 63 of a-z, A-Z, 0-9, _ and -, first a letter")]
    TableName(String),
    /// Nothing to listen on.
    #[error("{service}: no address to listen on")]
    NoListener {
        /// Its name.
        service: String,
    },
    /// An address that clients elsewhere cannot connect to, or port 0.
    #[error("{service}: cannot listen on {listen}: {reason}")]
    Listener {
        /// Its name.
        service: String,
        /// As given.
        listen: SocketAddr,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Two rules for the same packets.
    #[error("{service}: {listen} is already used by {other}")]
    ListenTwice {
        /// Its name.
        service: String,
        /// As given.
        listen: SocketAddr,
        /// The service that uses it already; may be the same service.
        other: String,
    },
    /// An address that connections cannot be forwarded to, or port 0.
    #[error("{service}: {backend} cannot be a backend: {reason}")]
    Backend {
        /// Its name.
        service: String,
        /// As given.
        backend: SocketAddr,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// NAT does not translate between families.
    #[error("{service}: {listen} has no {family} backend of weight 1 or more")]
    NoBackend {
        /// Its name.
        service: String,
        /// The listener that would have none.
        listen: SocketAddr,
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
    /// The kernel draws 32-bit numbers.
    #[error("{service}: the weights of the {family} backends add up to more than {}", u32::MAX)]
    Weights {
        /// Its name.
        service: String,
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
}
