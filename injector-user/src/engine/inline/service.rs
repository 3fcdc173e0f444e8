//! What the program serves of a listener now: by its drain state, its backends' health, and the
//! routes to them.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use injector_common::inline::{Timeouts, Usage};

use super::plan::{Destination, Service};
use crate::{
    backend::Backend,
    config::{self, Listener},
    engine::served_listener::ServedListener,
};

/// How connections to a backend leave this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TowardsBackend {
    /// From one of these addresses.
    From(Vec<IpAddr>),
    /// From the client's address.
    AsClient,
    /// Not at all: the backend is on this host.
    Local,
    /// Not at all: the kernel's error.
    Unreachable(String),
}

/// The listener with this place, without what gets no connections now.
pub(super) fn service(
    id: u32,
    served: &ServedListener,
    towards: &impl Fn(SocketAddr) -> TowardsBackend,
) -> Service {
    let ServedListener { listener, virtual_addresses, backends, draining } = served;
    let all = backends.all().iter().flat_map(Backend::addresses);
    let mut destinations = Vec::new();
    if !draining {
        for ipv6 in [false, true] {
            let of_family = |address: &SocketAddr| address.is_ipv6() == ipv6;
            // Backups are taken for a family as soon as no other backend of it is up.
            let eligible = backends.eligible(|backend| backend.addresses().iter().any(of_family));
            for backend in eligible.into_iter().filter(|backend| backend.health_state().is_up()) {
                for address in backend.usable_addresses(ipv6) {
                    let sources = match towards(address) {
                        TowardsBackend::From(sources) => sources,
                        TowardsBackend::AsClient => Vec::new(),
                        TowardsBackend::Local | TowardsBackend::Unreachable(_) => continue,
                    };
                    destinations.push(Destination { address, weight: backend.weight(), sources });
                }
            }
        }
    }
    Service {
        id,
        bind: listener.bind.clone(),
        virtual_addresses: listener.virtual_sockets(&virtual_addresses.current()).collect(),
        translated_sources: listener.translated_sources.clone(),
        timeouts: timeouts(listener),
        destinations,
        proxy_ports: all.collect(),
    }
}

/// A listener that the program does not serve, whose connections from before may go on: its
/// backends' PROXY ports stay closed to others.
pub(super) fn protected(served: &ServedListener) -> Service {
    Service {
        // No address leads to it.
        id: Usage::ALL,
        bind: Vec::new(),
        virtual_addresses: Vec::new(),
        translated_sources: Vec::new(),
        timeouts: timeouts(&served.listener),
        destinations: Vec::new(),
        proxy_ports: served.backends.all().iter().flat_map(Backend::addresses).collect(),
    }
}

fn timeouts(listener: &Listener) -> Timeouts {
    let seconds = |duration: Duration| {
        u32::try_from(duration.as_secs() + u64::from(duration.subsec_nanos() > 0)).unwrap_or(u32::MAX)
    };
    let config::Timeouts { idle, half_closed, client_fin, .. } = listener.timeouts;
    Timeouts { idle: seconds(idle), half_closed: seconds(half_closed), client_fin: seconds(client_fin) }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Instant};

    use super::{
        super::plan::{InUse, Planner},
        *,
    };
    use crate::{
        backend::{AdminState, Backends},
        config::Config,
        kubernetes::Followed,
    };

    fn served(backends: &str) -> ServedListener {
        let text = format!(
            "[[listener]]\nname = \"a\"\nbind = [\"192.0.2.10:25\", \"[2001:db8::10]:25\"]\nprotocol = \"smtp\"\n\
             backends = [{backends}]\n[listener.timeouts]\nidle = \"1500ms\"\nclient_fin = \"3s\"\n"
        );
        let listener = Config::parse(&text, "test.toml").unwrap().listeners.remove(0);
        let backends = Arc::new(Backends::new(&listener, None, Arc::default()));
        ServedListener {
            virtual_addresses: Followed::listed(Vec::new()),
            listener,
            backends,
            draining: false,
        }
    }

    fn towards(backend: SocketAddr) -> TowardsBackend {
        match backend.to_string().as_str() {
            "10.0.0.9:2525" => TowardsBackend::Local,
            "10.0.0.8:2525" => TowardsBackend::Unreachable("no route".to_owned()),
            _ => TowardsBackend::From(vec![IpAddr::from([10, 0, 0, 254])]),
        }
    }

    fn destinations(served: &ServedListener) -> Vec<(String, u32)> {
        let all = service(1, served, &towards).destinations.into_iter();
        all.map(|it| (it.address.to_string(), it.weight)).collect()
    }

    fn strings(all: &[(&str, u32)]) -> Vec<(String, u32)> {
        all.iter().map(|(address, weight)| ((*address).to_owned(), *weight)).collect()
    }

    #[test]
    fn weights_timeouts_and_ports_are_taken_over() {
        let served = served("{ address = \"10.0.0.1:2525\", weight = 3 }, \"[fd00::1]:2525\"");
        assert_eq!(destinations(&served), strings(&[("10.0.0.1:2525", 3), ("[fd00::1]:2525", 1)]));
        let service = service(1, &served, &towards);
        assert_eq!(service.timeouts, Timeouts { idle: 2, half_closed: 660, client_fin: 3 });
        assert_eq!((service.bind.len(), service.proxy_ports.len()), (2, 2));
    }

    #[test]
    fn backends_follow_their_health_in_each_family() {
        let served =
            served("\"10.0.0.1:2525\", { address = \"10.0.0.2:2525\", backup = true }, \"[fd00::1]:2525\"");
        assert_eq!(destinations(&served), strings(&[("10.0.0.1:2525", 1), ("[fd00::1]:2525", 1)]));
        assert!(served.backends.set_admin_state("10.0.0.1:2525", AdminState::Down));
        assert_eq!(destinations(&served), strings(&[("10.0.0.2:2525", 1), ("[fd00::1]:2525", 1)]));
        assert!(served.backends.set_admin_state("10.0.0.2:2525", AdminState::Down));
        assert_eq!(destinations(&served), strings(&[("[fd00::1]:2525", 1)]));
    }

    #[test]
    fn addresses_of_a_name_that_fail_are_left_out() {
        let served = served("\"mail.internal:2525\"");
        let addresses = ["10.0.0.1:2525", "10.0.0.2:2525", "[fd00::1]:2525"].map(|it| it.parse().unwrap());
        served.backends.all()[0].set_addresses(&addresses);
        assert_eq!(destinations(&served).len(), 3);
        served.backends.note_refused(addresses[0]);
        assert_eq!(destinations(&served), strings(&[("10.0.0.2:2525", 1), ("[fd00::1]:2525", 1)]));
        // The last one of a family stays.
        served.backends.note_refused(addresses[2]);
        assert_eq!(destinations(&served), strings(&[("10.0.0.2:2525", 1), ("[fd00::1]:2525", 1)]));
        assert_eq!(service(1, &served, &towards).proxy_ports.len(), 3);
        served.backends.note_connected(addresses[0]);
        assert_eq!(destinations(&served).len(), 3);
    }

    #[test]
    fn a_draining_listener_has_no_backends() {
        let served = ServedListener { draining: true, ..served("\"10.0.0.1:2525\"") };
        assert_eq!(destinations(&served), []);
        assert_eq!(service(1, &served, &towards).proxy_ports.len(), 1);
    }

    #[test]
    fn a_listener_that_is_not_served_keeps_its_proxy_ports() {
        let service = protected(&served("\"10.0.0.1:2525\", \"[fd00::1]:2525\""));
        let plan = Planner::new(&InUse::default()).plan(&[service], Instant::now());
        // Each port, and its host.
        assert_eq!((plan.proxy_ports.len(), plan.listeners.len(), plan.tables.len()), (4, 0, 0));
        assert_eq!(plan.shortages, []);
    }

    #[test]
    fn backends_on_this_host_and_without_route_are_left_out() {
        let served =
            served("\"10.0.0.8:2525\", \"10.0.0.9:2525\", { address = \"10.0.0.1:2525\", weight = 2 }");
        assert_eq!(destinations(&served), strings(&[("10.0.0.1:2525", 2)]));
    }
}
