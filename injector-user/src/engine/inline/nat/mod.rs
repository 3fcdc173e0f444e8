//! `nat = "managed"`: one nftables table that belongs to the daemon and sends connections on to the backends.
//!
//! [`ruleset`] turns services into rules, without touching anything; [`Ruleset::apply`] makes them the table's whole
//! contents in one transaction; [`remove`] takes the table away. No other table is ever written to.
//!
//! The table is of family `inet` and has two chains:
//! - `prerouting` (nat, priority dstnat) has one rule per listening address: DNAT to the backend of that family, or to
//!   one of several by `numgen random`. What starts on the host itself never passes it.
//! - `postrouting` (nat, priority srcnat) masquerades what `prerouting` has sent on, for services that ask for it.
//!
//! Only the first packet of a connection meets these rules; conntrack remembers the outcome. So established connections
//! outlive a replacement, also by an empty ruleset, with which they can be let finish. They do not outlive [`remove`]: with
//! the last rule of all tables that needs connection tracking, or the last nat chain, the kernel stops translating.
//!
//! Needs `nft` 0.9.7 or newer, and Linux 5.7 or newer for `iif` in postrouting (kernel commit 28f8bfd1ac94).

mod compare;
mod nft;
mod rules;

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use thiserror::Error;

pub use nft::{DroppingChain, NftError, chains_that_drop_forwarded, exists, remove};

/// A port that clients connect to, and who answers there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// For the comments of the rules and for error messages; the listener's name.
    pub name: String,
    /// Where clients connect. `0.0.0.0` and `[::]` stand for every address of the host in that family (only that: `[::]`
    /// does not take IPv4). Port never 0.
    pub listen: Vec<SocketAddr>,
    /// Who may get the connection. IPv4 listeners are sent to the IPv4 backends, IPv6 listeners to the IPv6 ones.
    pub backends: Vec<Backend>,
    /// Whether the backend sees the host's address instead of the client's, and so answers through the host even where
    /// its routes would lead elsewhere.
    pub masquerade: bool,
}

/// One that answers.
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
        // nft's JSON takes any name, even one that makes the ruleset's own listing impossible to load again.
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
        /// Who came first; may be the same service.
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

/// The contents of the table, ready to be applied. Made by [`ruleset`].
#[derive(Clone, Debug)]
pub struct Ruleset {
    table: TableName,
    chains: Vec<nftables::schema::Chain<'static>>,
    rules: Vec<nftables::schema::Rule<'static>>,
}

/// What [`Ruleset::apply`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The kernel had exactly these rules; nothing was touched.
    Unchanged,
    /// There was no such table.
    Created,
    /// The rules took the place of others, for every packet from one to the next.
    Replaced,
    /// The table held more than this version makes (another version's?) and was deleted and made again, in one
    /// transaction.
    Remade,
}

/// The rules for these services: first those for single addresses, then those for all addresses of the host, otherwise
/// in the order given. No service at all sends nothing new on. IPv4-mapped addresses count as IPv4.
///
/// # Errors
/// The first [`NatError`] found.
pub fn ruleset(table: &TableName, services: &[Service]) -> Result<Ruleset, NatError> {
    let services: Vec<Service> = services.iter().map(canonical).collect();
    let mut taken = BTreeMap::new();
    for service in &services {
        check_backends(service)?;
        check_listeners(service, &mut taken)?;
    }
    let rules = rules::rules(table, &services)?;
    Ok(Ruleset { table: table.clone(), chains: rules::chains(table), rules })
}

impl Ruleset {
    /// The table they are for.
    #[must_use]
    pub fn table(&self) -> &TableName {
        &self.table
    }
}

/// A service whose IPv4-mapped addresses are IPv4 addresses.
fn canonical(service: &Service) -> Service {
    let canonical = |address: &SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let backends = service.backends.iter();
    Service {
        listen: service.listen.iter().map(canonical).collect(),
        backends: backends.map(|b| Backend { address: canonical(&b.address), ..*b }).collect(),
        ..service.clone()
    }
}

fn check_backends(service: &Service) -> Result<(), NatError> {
    for Backend { address, .. } in &service.backends {
        let reason =
            if address.ip().is_unspecified() { Some("it names no host") } else { unroutable(address) };
        if let Some(reason) = reason {
            return Err(NatError::Backend { service: service.name.clone(), backend: *address, reason });
        }
    }
    Ok(())
}

fn check_listeners(service: &Service, taken: &mut BTreeMap<SocketAddr, String>) -> Result<(), NatError> {
    let name = || service.name.clone();
    if service.listen.is_empty() {
        return Err(NatError::NoListener { service: name() });
    }
    for listen in &service.listen {
        if let Some(reason) = unroutable(listen) {
            return Err(NatError::Listener { service: name(), listen: *listen, reason });
        }
        if let Some(other) = taken.insert(*listen, name()) {
            return Err(NatError::ListenTwice { service: name(), listen: *listen, other });
        }
    }
    Ok(())
}

/// Why connections to or from elsewhere cannot have this destination.
fn unroutable(address: &SocketAddr) -> Option<&'static str> {
    let link_local = match address.ip() {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let broadcast = address.ip() == IpAddr::V4(std::net::Ipv4Addr::BROADCAST);
    if address.port() == 0 {
        Some("port 0 stands for no port")
    } else if address.ip().is_loopback() {
        Some("the kernel forwards nothing to or from loopback")
    } else if link_local {
        Some("link-local addresses are not forwarded")
    } else if address.ip().is_multicast() || broadcast {
        Some("TCP knows neither multicast nor broadcast")
    } else {
        None
    }
}

#[cfg(test)]
mod tests;
