//! `injector doctor`: connects to every backend, and names the fault and the line to change.
//!
//! [`plan`] decides which connection to make next, `observe` makes it, [`diagnosis`] finds the
//! faults and [`advice`] names the servers' settings. Only `observe`, `exchange` and this file do
//! I/O. What the doctor does to a server is in `docs/doctor.md`.

pub mod advice;
mod args;
pub mod diagnosis;
mod dialect;
mod dialogue;
mod exchange;
#[cfg(test)]
mod fixtures;
mod guard;
mod header_addresses;
mod kubernetes;
pub mod observation;
mod observe;
pub mod plan;
pub mod report;
pub mod server;

use std::{
    collections::BTreeMap,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::task::JoinSet;

pub use self::{
    args::{DoctorArgs, EXAMPLES},
    observe::claim_localhost,
};
use self::{
    diagnosis::{Finding, Verdict},
    header_addresses::HeaderAddresses,
    observation::{Family, Observation, Target},
    observe::Timeouts,
    report::{AddressReport, BackendReport, ListenerReport, Report},
};
use crate::{
    config::{Backend, Config, Destination, EngineChoice, Inline, Listener, Source},
    kubernetes::Watcher,
};

/// Everything is fine.
const EXIT_OK: u8 = 0;
/// At least one fault was found.
const EXIT_FAULTS: u8 = 1;
/// Nothing could be examined: no configuration, or no such listener.
const EXIT_NOT_EXAMINED: u8 = 2;

/// From at most this many other addresses of this host the doctor tests whether a server trusts it.
const MAX_OTHER_SOURCES: usize = 3;

/// Examines all backends and prints the report. The exit code is 0 without faults, 1 with faults,
/// and 2 if nothing could be examined.
#[must_use]
pub fn run(args: &DoctorArgs) -> ExitCode {
    match report(args) {
        Ok((text, faults)) => {
            // A reader that closed the pipe, as `head` does, wants no more; the exit code still
            // counts.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::from(if faults == 0 { EXIT_OK } else { EXIT_FAULTS })
        }
        Err(error) => {
            eprintln!("injector: {error:#}");
            ExitCode::from(EXIT_NOT_EXAMINED)
        }
    }
}

/// The report in the form that is asked for, and how many faults it has.
fn report(args: &DoctorArgs) -> anyhow::Result<(String, usize)> {
    let mut config = Config::load(&args.config)?;
    if let Some(name) = &args.listener {
        let names: Vec<_> = config.listeners.iter().map(|listener| listener.name.clone()).collect();
        config.listeners.retain(|listener| listener.name == *name);
        if config.listeners.is_empty() {
            bail!(
                "no listener {name:?} in {}; its listeners are {}",
                args.config.display(),
                names.join(", ")
            );
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let report = runtime.block_on(async {
        let written = |json: serde_json::Value, text: String| {
            if args.json { format!("{json:#}\n") } else { text }
        };
        if args.kubernetes {
            let local = local_addresses().context("cannot list this host's addresses")?;
            let report = kubernetes::examine(&config, &local, args.timeout, source_for).await?;
            return Ok((written(report.json(), report.text()), report.faults()));
        }
        let report = examine(config, args).await?;
        Ok((written(report.json(), report.text()), report.faults()))
    });
    // Do not wait for a resolver thread that still waits for its answer.
    runtime.shutdown_background();
    report
}

async fn examine(config: Config, args: &DoctorArgs) -> anyhow::Result<Report> {
    let local = local_addresses().context("cannot list this host's addresses")?;
    let addresses = resolve_all(&config, args.timeout).await?;
    let mut cases: Vec<Case> = Vec::new();
    for (index, listener) in config.listeners.iter().enumerate() {
        for backend in &listener.backends {
            for address in addresses.get(&backend.to_string()).into_iter().flatten().flatten() {
                let target = target(listener, backend, *address, &local, args.untrusted);
                let header_addresses = HeaderAddresses::new(target.source, &local, &listener.bind);
                let connect = listener.timeouts.connect.min(args.timeout);
                let timeouts = Timeouts { connect, answer: args.timeout };
                cases.push(Case { listener: index, target, header_addresses, timeouts, seen: Vec::new() });
            }
        }
    }
    if !args.json {
        eprintln!(
            "examining {} addresses; a server that requires a header may take seconds to reject a connection without one",
            cases.len()
        );
    }
    let cases = observe_all(cases).await?;
    // On another host, or for one listener, the guard is not what is asked about.
    let guard = if args.untrusted || args.listener.is_some() { Vec::new() } else { guard::examine(&config) };
    Ok(Report { guard, ..assemble(&config, &addresses, &cases, args.untrusted) })
}

/// One address of one listener, with what is needed to examine it.
struct Case {
    listener: usize,
    target: Target,
    header_addresses: HeaderAddresses,
    timeouts: Timeouts,
    seen: Vec<Observation>,
}

/// Examines servers in parallel, and sends the probes of one server in sequence, even if several
/// listeners use it.
async fn observe_all(cases: Vec<Case>) -> anyhow::Result<Vec<Case>> {
    let mut servers: BTreeMap<SocketAddr, Vec<(usize, Case)>> = BTreeMap::new();
    for (index, case) in cases.into_iter().enumerate() {
        servers.entry(case.target.address).or_default().push((index, case));
    }
    let mut tasks = JoinSet::new();
    for mut cases in servers.into_values() {
        tasks.spawn(async move {
            for (_, case) in &mut cases {
                while let Some(step) = plan::next(&case.target, &case.seen) {
                    let observation =
                        observe::observe(&case.target, step, &case.header_addresses, case.timeouts).await;
                    case.seen.push(observation);
                }
            }
            cases
        });
    }
    let mut done = BTreeMap::new();
    while let Some(cases) = tasks.join_next().await {
        done.extend(cases.context("a probe failed")?);
    }
    Ok(done.into_values().collect())
}

/// The addresses, or why there are none.
type Resolved = Result<Vec<SocketAddr>, String>;

/// The addresses of every backend, by its name in the configuration.
async fn resolve_all(config: &Config, within: Duration) -> anyhow::Result<BTreeMap<String, Resolved>> {
    let backends = config.listeners.iter().flat_map(|listener| &listener.backends);
    let distinct: BTreeMap<_, _> = backends.map(|backend| (backend.to_string(), backend.clone())).collect();
    let mut tasks = JoinSet::new();
    let watcher = Watcher::new(config.kubernetes.clone());
    for (name, backend) in distinct {
        let watcher = watcher.clone();
        tasks.spawn(async move { (name, resolve(&backend, &watcher, within).await) });
    }
    let mut addresses = BTreeMap::new();
    while let Some(resolved) = tasks.join_next().await {
        addresses.extend([resolved.context("resolving failed")?]);
    }
    Ok(addresses)
}

async fn resolve(backend: &Backend, watcher: &Watcher, within: Duration) -> Resolved {
    let (name, port) = match &backend.destination {
        Destination::Address(address) => return Ok(vec![*address]),
        Destination::Name { name, port } => (name, *port),
        Destination::Service { service, port } => {
            return watcher.addresses_within(service, port, within).await;
        }
    };
    match tokio::time::timeout(within, tokio::net::lookup_host((name.as_str(), port))).await {
        Ok(Ok(found)) => {
            let mut addresses: Vec<_> = found.collect();
            addresses.sort_unstable();
            addresses.dedup();
            if addresses.is_empty() { Err("the answer is empty".to_owned()) } else { Ok(addresses) }
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {within:?}")),
    }
}

fn target(
    listener: &Listener,
    backend: &Backend,
    address: SocketAddr,
    local: &[IpAddr],
    untrusted: bool,
) -> Target {
    let source = source_for(address);
    // A socket bound to [::] accepts IPv4 as well.
    let everywhere = |ip: IpAddr| ip.is_unspecified() && ip.is_ipv6();
    let comes = |family: Family| {
        move |bound: &SocketAddr| Family::of(bound.ip().to_canonical()) == family || everywhere(bound.ip())
    };
    Target {
        listener: listener.name.clone(),
        protocol: listener.protocol,
        receiver: listener.receiver.clone(),
        ipv4_clients: listener.bind.iter().any(comes(Family::V4)),
        ipv6_clients: listener.bind.iter().any(comes(Family::V6)),
        backend: backend.to_string(),
        address,
        source,
        other_sources: other_sources(address, source, local),
        untrusted,
    }
}

/// Other addresses of this host, of the same family, that have a route to the backend.
fn other_sources(address: SocketAddr, source: Option<IpAddr>, local: &[IpAddr]) -> Vec<IpAddr> {
    let ip = address.ip();
    if ip.is_loopback() {
        return Vec::new();
    }
    let here = local.contains(&ip);
    let fits = |other: &&IpAddr| {
        let link_local = matches!(other, IpAddr::V6(other) if other.is_unicast_link_local());
        // A packet from loopback does not leave this host.
        let leads_there = here || !other.is_loopback();
        Family::of(**other) == Family::of(ip) && Some(**other) != source && leads_there && !link_local
    };
    local.iter().filter(fits).take(MAX_OTHER_SOURCES).copied().collect()
}

/// The source address that the kernel chooses towards `address`. Looks up the route and sends
/// nothing.
fn source_for(address: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(address).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

fn local_addresses() -> std::io::Result<Vec<IpAddr>> {
    Ok(if_addrs::get_if_addrs()?.into_iter().map(|interface| interface.ip()).collect())
}

fn assemble(
    config: &Config,
    addresses: &BTreeMap<String, Resolved>,
    cases: &[Case],
    untrusted: bool,
) -> Report {
    let listeners = config.listeners.iter().enumerate().map(|(index, listener)| {
        let backends = listener.backends.iter().map(|backend| {
            let name = backend.to_string();
            let findings = match addresses.get(&name) {
                Some(Err(why)) => vec![no_address_finding(&name, why)],
                _ => Vec::new(),
            };
            let own = cases.iter().filter(|case| case.listener == index && case.target.backend == name);
            let addresses = own.map(|case| {
                let Case { target, seen, .. } = case;
                let findings =
                    diagnosis::findings(target, seen, &injector_addresses(cases, target.address.port()));
                AddressReport::new(target, seen.clone(), findings)
            });
            BackendReport { name: name.clone(), findings, addresses: addresses.collect() }
        });
        ListenerReport {
            name: listener.name.clone(),
            protocol: listener.protocol,
            version: listener.receiver.version,
            findings: source_finding(listener)
                .into_iter()
                .chain(inline_source_finding(listener, &config.inline))
                .collect(),
            backends: backends.collect(),
        }
    });
    Report { listeners: listeners.collect(), guard: Vec::new(), untrusted }
}

/// All addresses from which this host connects to this port.
fn injector_addresses(cases: &[Case], port: u16) -> Vec<IpAddr> {
    let same = cases.iter().filter(|case| case.target.address.port() == port);
    same.filter_map(|case| case.target.source).collect()
}

fn no_address_finding(name: &str, why: &str) -> Finding {
    Finding::fault(Verdict::NoAddress, format!("{name} has no address: {why}"), Vec::new())
}

/// Connections to backends may have other source addresses than the doctor's probes.
fn source_finding(listener: &Listener) -> Option<Finding> {
    if listener.source_addresses.is_empty() {
        return None;
    }
    let addresses: Vec<_> = listener.source_addresses.iter().map(ToString::to_string).collect();
    Some(Finding::note(
        Verdict::SourceAddresses,
        format!(
            "splice and relay connect from source_addresses ({}): the backend's list of trusted addresses must contain \
             all of them, and the doctor has connected from the address that the route prefers",
            addresses.join(", ")
        ),
    ))
}

/// The connections of engine inline may have other source addresses than the doctor's probes.
fn inline_source_finding(listener: &Listener, inline: &Inline) -> Option<Finding> {
    if !matches!(listener.engine, EngineChoice::Inline | EngineChoice::Auto) {
        return None;
    }
    let source = match (inline.source, inline.source_addresses.as_slice()) {
        (Source::Edge, []) => return None,
        (Source::Edge, addresses) => {
            let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
            format!("connects from inline.source_addresses ({})", addresses.join(", "))
        }
        (Source::Client, _) => "connects from the client's address (inline.source = \"client\")".to_owned(),
    };
    Some(Finding::note(
        Verdict::InlineSource,
        format!(
            "engine inline {source}: the backend then sees other addresses than the doctor's, and its list of \
             trusted addresses must contain those"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_sources_have_the_same_family_and_a_route() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let local = ["127.0.0.1", "10.0.0.1", "10.0.0.9", "::1", "fe80::1", "fd25::1"]
            .map(|text| text.parse().unwrap());
        let tried =
            |address: &str, source: &str| other_sources(address.parse().unwrap(), Some(ip(source)), &local);
        assert_eq!(tried("10.0.0.2:25", "10.0.0.1"), [ip("10.0.0.9")]);
        assert_eq!(tried("10.0.0.1:25", "10.0.0.1"), [ip("127.0.0.1"), ip("10.0.0.9")]);
        assert_eq!(tried("127.0.0.1:25", "127.0.0.1"), Vec::<IpAddr>::new());
        assert_eq!(tried("[fd25::2]:25", "fd25::1"), Vec::<IpAddr>::new());
    }

    #[test]
    fn the_source_address_is_found_without_sending() {
        assert_eq!(source_for("127.0.0.1:1".parse().unwrap()), Some("127.0.0.1".parse().unwrap()));
    }
}
