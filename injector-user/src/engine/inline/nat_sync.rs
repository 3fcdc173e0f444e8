//! Keeps the NAT rules in step with the listeners, their drain state and their backends' health.

use std::{net::IpAddr, sync::Arc};

use super::{
    nat::{self, TableName},
    programs::addresses,
};
use crate::{
    backend::Backends,
    config::{Host, Inline as Settings, Listener, Nat},
    engine::served_listener::ServedListener,
    telemetry::log::target,
};

/// The listener before any health check of its backends.
pub(super) fn fresh(listener: &Listener) -> ServedListener {
    let backends = Arc::new(Backends::new(listener, None, Arc::default()));
    ServedListener { listener: listener.clone(), backends, draining: false }
}

pub(super) fn ruleset(settings: &Settings, served: &[ServedListener]) -> anyhow::Result<nat::Ruleset> {
    let mut services = Vec::new();
    for ServedListener { listener, backends, draining } in served {
        // A listener that the engine cannot serve is an error, not a listener without backends.
        addresses(listener).map_err(anyhow::Error::msg)?;
        let mut service = nat::Service {
            name: listener.name.clone(),
            listen: Vec::new(),
            backends: Vec::new(),
            masquerade: settings.masquerade,
        };
        for ipv6 in [false, true] {
            let of_family = |ip: IpAddr| ip.to_canonical().is_ipv6() == ipv6;
            let listen = || listener.bind.iter().filter(|address| of_family(address.ip()));
            let eligible = backends.eligible(|it| matches!(it.host, Host::Ip(ip) if of_family(ip)));
            let none_is_left = eligible.is_empty()
                && listener.backends.iter().any(|it| matches!(it.host, Host::Ip(ip) if of_family(ip)));
            if *draining || none_is_left {
                // The host resets these clients, because it has no socket there.
                continue;
            }
            service.listen.extend(listen());
            service.backends.extend(eligible.into_iter().flat_map(|backend| {
                let weight = backend.configured().weight;
                backend.addresses().into_iter().map(move |address| nat::Backend { address, weight })
            }));
        }
        if !service.listen.is_empty() {
            services.push(service);
        }
    }
    let table: TableName = settings.table.parse()?;
    Ok(nat::ruleset(&table, &services)?)
}

/// Empties the NAT table of an earlier run, if no listener is inline any more: its rules would
/// redirect new connections away from the daemon's sockets. Established connections continue.
pub(super) fn remove_stale_nat(settings: &Settings) {
    if !settings.present || settings.nat != Nat::Managed {
        return;
    }
    let table: Result<TableName, _> = settings.table.parse();
    let Ok(table) = table else { return };
    // Without nft there is no NAT table of the engine.
    if !nat::exists(&table).unwrap_or(false) {
        return;
    }
    match nat::ruleset(&table, &[]).map_err(anyhow::Error::from).and_then(|empty| Ok(empty.apply()?)) {
        Ok(change) => {
            tracing::info!(target: target::ENGINE_INLINE, table = settings.table, ?change, "no inline listener: NAT table emptied")
        }
        Err(error) => tracing::error!(target: target::ENGINE_INLINE,
            table = settings.table,
            error = format!("{error:#}"),
            "emptying the NAT table failed; it still forwards new connections: remove it (nft delete table inet {})",
            settings.table
        ),
    }
}

/// Updates the NAT rules so that they send new connections to the eligible backends.
pub(super) async fn apply_dnat(settings: &Settings, served: Vec<ServedListener>) {
    let table = &settings.table;
    let settings = settings.clone();
    let apply = move || -> anyhow::Result<nat::Change> { Ok(ruleset(&settings, &served)?.apply()?) };
    match tokio::task::spawn_blocking(apply).await {
        Ok(Ok(nat::Change::Unchanged)) => {}
        Ok(Ok(change)) => {
            tracing::info!(target: target::ENGINE_INLINE, table, ?change, "NAT rules updated")
        }
        Ok(Err(error)) => tracing::error!(target: target::ENGINE_INLINE,
            error = format!("{error:#}"),
            "updating NAT rules failed; new connections may reach backends that are down"
        ),
        Err(error) => {
            tracing::error!(target: target::ENGINE_INLINE, %error, "applying NAT rules failed; the previous rules stay in effect")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{backend::AdminState, config::Config};

    fn config(backends: &str) -> Config {
        let text = format!(
            "[[listener]]\nname = \"a\"\nbind = [\"192.0.2.10:25\", \"[2001:db8::10]:25\"]\nprotocol = \"smtp\"\n\
             engine = \"inline\"\nbackends = [{backends}, \"[2001:db8::20]:2525\"]\n"
        );
        Config::parse(&text, "test.toml").unwrap()
    }

    fn rules(config: &Config, served: &ServedListener) -> String {
        format!("{:?}", ruleset(&config.inline, std::slice::from_ref(served)).unwrap())
    }

    #[test]
    fn rules_have_the_configured_weights() {
        let of = |weights: [u32; 2]| {
            let [one, other] = weights.map(|weight| format!("weight = {weight}"));
            let backends = format!(
                "{{ address = \"10.0.0.1:2525\", {one} }}, {{ address = \"10.0.0.2:2525\", {other} }}"
            );
            let config = config(&backends);
            rules(&config, &fresh(&config.listeners[0]))
        };
        assert_eq!(of([1, 1]), of([7, 7]));
        assert_ne!(of([1, 1]), of([3, 1]));
    }

    #[test]
    fn rules_follow_the_health_of_each_family() {
        let config = config("\"10.0.0.1:2525\", { address = \"10.0.0.2:2525\", backup = true }");
        let served = fresh(&config.listeners[0]);
        let leads_to = |served: &ServedListener, backend: &str| rules(&config, served).contains(backend);
        assert!(leads_to(&served, "10.0.0.1") && !leads_to(&served, "10.0.0.2"));
        assert!(served.backends.set_admin_state("10.0.0.1:2525", AdminState::Down));
        assert!(!leads_to(&served, "10.0.0.1") && leads_to(&served, "10.0.0.2"));
        assert!(leads_to(&served, "2001:db8::20"));
        // No IPv4 backend is left: there are no IPv4 rules, and IPv6 continues.
        assert!(served.backends.set_admin_state("10.0.0.2:2525", AdminState::Down));
        assert!(!leads_to(&served, "192.0.2.10") && leads_to(&served, "2001:db8::20"));
        let drained = ServedListener { draining: true, ..served };
        assert!(!leads_to(&drained, "2001:db8::"));
    }
}
