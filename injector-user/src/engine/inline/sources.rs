//! From which addresses connections to backends leave.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
};

use super::service::TowardsBackend;
use crate::{
    config::{Inline as Settings, Source},
    telemetry::log::target,
};

/// The answers for all backends, until they are asked for again.
#[derive(Debug)]
pub(super) struct Sources {
    as_client: bool,
    addresses: Vec<IpAddr>,
    known: HashMap<SocketAddr, TowardsBackend>,
}

impl Sources {
    pub(super) fn new(settings: &Settings) -> Self {
        let Settings { source, source_addresses, .. } = settings;
        Self {
            as_client: *source == Source::Client,
            addresses: source_addresses.clone(),
            known: HashMap::new(),
        }
    }

    /// Asks the kernel for its routes to these backends. Logs what is new.
    pub(super) fn refresh(&mut self, backends: impl Iterator<Item = SocketAddr>) {
        let before = std::mem::take(&mut self.known);
        for backend in backends {
            if self.known.contains_key(&backend) {
                continue;
            }
            let now = self.ask(backend);
            if before.get(&backend) != Some(&now) {
                log(backend, &now);
            }
            self.known.insert(backend, now);
        }
    }

    /// How connections to this backend leave.
    pub(super) fn towards(&self, backend: SocketAddr) -> TowardsBackend {
        // A name has just got this address.
        self.known.get(&backend).cloned().unwrap_or_else(|| self.ask(backend))
    }

    fn ask(&self, backend: SocketAddr) -> TowardsBackend {
        match source_towards(backend) {
            Err(error) => TowardsBackend::Unreachable(error.to_string()),
            Ok(source) => self.choose(backend.ip(), source),
        }
    }

    /// `source` is the host's own address for this backend.
    fn choose(&self, backend: IpAddr, source: IpAddr) -> TowardsBackend {
        if source == backend || source.is_loopback() {
            return TowardsBackend::Local;
        }
        if self.as_client {
            return TowardsBackend::AsClient;
        }
        let of_family = |ip: &&IpAddr| ip.is_ipv6() == backend.is_ipv6();
        let configured: Vec<_> = self.addresses.iter().filter(of_family).copied().collect();
        TowardsBackend::From(if configured.is_empty() { vec![source] } else { configured })
    }
}

/// The address that this host's own connections to `backend` have. No packet is sent.
fn source_towards(backend: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr =
        if backend.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(backend)?;
    Ok(socket.local_addr()?.ip())
}

fn log(backend: SocketAddr, towards: &TowardsBackend) {
    match towards {
        TowardsBackend::Local => {
            tracing::info!(target: target::ENGINE_INLINE, %backend, "the backend is an address of this host: its connections are served without inline");
        }
        TowardsBackend::Unreachable(error) => {
            tracing::warn!(target: target::ENGINE_INLINE, %backend, error, "no route to the backend: inline sends it no connections until there is one");
        }
        TowardsBackend::From(sources) => {
            tracing::debug!(target: target::ENGINE_INLINE, %backend, ?sources, "source addresses towards the backend");
        }
        TowardsBackend::AsClient => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn choose(settings: &Settings, backend: &str, source: &str) -> TowardsBackend {
        Sources::new(settings).choose(ip(backend), ip(source))
    }

    #[test]
    fn the_hosts_own_address_or_the_configured_ones() {
        let own = Settings::default();
        assert_eq!(choose(&own, "10.0.0.1", "10.0.0.9"), TowardsBackend::From(vec![ip("10.0.0.9")]));
        let addresses = ["192.0.2.1", "192.0.2.2", "2001:db8::1"].map(ip).to_vec();
        let given = Settings { source_addresses: addresses, ..Settings::default() };
        let both = vec![ip("192.0.2.1"), ip("192.0.2.2")];
        assert_eq!(choose(&given, "10.0.0.1", "10.0.0.9"), TowardsBackend::From(both));
        assert_eq!(choose(&given, "fd00::1", "fd00::9"), TowardsBackend::From(vec![ip("2001:db8::1")]));
        let client = Settings { source: Source::Client, ..Settings::default() };
        assert_eq!(choose(&client, "10.0.0.1", "10.0.0.9"), TowardsBackend::AsClient);
    }

    #[test]
    fn backends_of_this_host_are_known_by_their_route() {
        let settings = Settings::default();
        assert_eq!(choose(&settings, "10.0.0.1", "10.0.0.1"), TowardsBackend::Local);
        for local in ["127.0.0.1:25", "127.0.0.2:25", "[::1]:25"] {
            assert_eq!(
                Sources::new(&settings).towards(local.parse().unwrap()),
                TowardsBackend::Local,
                "{local}"
            );
        }
    }
}
