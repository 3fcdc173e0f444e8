//! Services checked, and turned into the contents of the table.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use super::{
    rules,
    service::{Backend, NatError, Service, TableName},
};

/// The contents of the table, ready to be applied. Made by [`ruleset`].
#[derive(Clone, Debug)]
pub struct Ruleset {
    pub(super) table: TableName,
    pub(super) chains: Vec<nftables::schema::Chain<'static>>,
    pub(super) rules: Vec<nftables::schema::Rule<'static>>,
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
    /// The table held more than this version makes (another version's?) and was deleted and made
    /// again, in one transaction.
    Remade,
}

/// The rules for these services: first those for single addresses, then those for all addresses of
/// the host, otherwise in the order given. No service at all sends nothing new on. IPv4-mapped
/// addresses count as IPv4.
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
