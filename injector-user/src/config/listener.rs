//! `[[listener]]`: each on its own, then all of them together.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use super::{
    Backend, EngineChoice, Listener, Timeouts, health,
    parse::{
        address,
        section::{At, Entry, Section, Zero},
    },
    receiver::read as read_receiver,
};
use crate::protocol::{Protocol, Speaker};

/// Dovecot gives a header 3 seconds (postscreen 5) and then closes.
const HEADER_WAIT_LIMIT: Duration = Duration::from_secs(3);
/// `MAX_TCP_KEEPIDLE`, include/net/tcp.h.
const KEEPALIVE_LIMIT: Duration = Duration::from_secs(32_767);
const RESOLVE_INTERVAL: Duration = Duration::from_secs(15);

/// A bind address with its place in the file and the name of its listener.
struct Bound {
    at: usize,
    address: SocketAddr,
    owner: String,
}

/// Reads all listeners; `None` if one could not be understood, which is then reported.
pub(super) fn read_all(root: &Section<'_>, metrics: Option<At<SocketAddr>>) -> Option<Vec<Listener>> {
    let Some(sections) = root.sections("listener") else {
        if !root.has("listener") {
            root.problem(0, "no [[listener]]: at least one is needed");
        }
        return None;
    };
    if sections.is_empty() {
        root.problem(0, "no [[listener]]: at least one is needed");
    }
    let mut names = BTreeMap::new();
    let mut bound: Vec<Bound> = Vec::new();
    if let Some((at, address)) = metrics {
        bound.push(Bound { at, address, owner: "metrics.listen".to_owned() });
    }
    let listeners: Vec<_> = sections
        .into_iter()
        .enumerate()
        .map(|(index, section)| read(section, index + 1, &mut names, &mut bound))
        .collect();
    listeners.into_iter().collect()
}

fn read(
    mut section: Section<'_>,
    number: usize,
    names: &mut BTreeMap<String, usize>,
    bound: &mut Vec<Bound>,
) -> Option<Listener> {
    section.set_listener(format!("#{number}"));
    let name = name(&mut section, names);
    let protocol = section
        .required("protocol", |section, field| section.choice(field, &Protocol::ALL.map(|p| (p.name(), p))));
    let engine = engine(&section);
    let bind = binds(&section, protocol, bound);
    let backends = backends(&section, &bind);
    let resolve_interval = section.duration("resolve_interval", Zero::Refused);
    let max_connections = section.count("max_connections");
    // Without a valid protocol the rest is still checked, against the one that restricts least.
    let timeouts =
        timeouts(section.section("timeouts"), protocol.unwrap_or(Protocol::Plain), protocol.is_some());
    let receiver = read_receiver(section.section("receiver"));
    let health = health::read(section.section("health"), protocol.unwrap_or(Protocol::Plain), &receiver);
    section.finish();
    Some(Listener {
        name: name?,
        bind,
        protocol: protocol?,
        engine: engine.unwrap_or_default(),
        backends,
        health,
        resolve_interval: resolve_interval.map_or(RESOLVE_INTERVAL, |(_, interval)| interval),
        max_connections,
        timeouts,
        receiver,
    })
}

fn name(section: &mut Section<'_>, names: &mut BTreeMap<String, usize>) -> Option<String> {
    let (at, name) = section.required("name", |section, field| section.string(field))?;
    let charset =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_' || byte == b'-';
    if !(1..=63).contains(&name.len()) || !name.bytes().all(charset) {
        section.field_problem(at, "name", &format!(" {name:?}: must be 1 to 63 of a-z, 0-9, _ and -"));
        return None;
    }
    section.set_listener(name.to_owned());
    if let Some(first) = names.get(name) {
        let line = section.line(*first);
        section.field_problem(at, "name", &format!(" {name:?}: already used by the listener in line {line}"));
        return None;
    }
    names.insert(name.to_owned(), at);
    Some(name.to_owned())
}

fn engine(section: &Section<'_>) -> Option<EngineChoice> {
    let engine = section.string("engine")?;
    section.choose("engine", engine, &EngineChoice::CHOICES)
}

fn binds(section: &Section<'_>, protocol: Option<Protocol>, bound: &mut Vec<Bound>) -> Vec<SocketAddr> {
    let texts = section.required("bind", |section, field| section.strings(field)).unwrap_or_default();
    let mut addresses = Vec::new();
    for (at, text) in texts {
        match address::socket_address(text, protocol.and_then(Protocol::usual_port)) {
            Ok(address) => {
                refuse_overlap(section, at, text, address, bound);
                bound.push(Bound { at, address, owner: format!("listener {:?}", section.listener()) });
                addresses.push(address);
            }
            Err(advice) => section.field_problem(at, "bind", &format!(" {text:?}: {advice}")),
        }
    }
    addresses
}

fn refuse_overlap(section: &Section<'_>, at: usize, text: &str, address: SocketAddr, bound: &[Bound]) {
    let Some(other) = bound.iter().find(|other| address::overlap(other.address, address)) else { return };
    let line = section.line(other.at);
    let what = if other.address == address {
        format!("already taken by {} in line {line}", other.owner)
    } else {
        format!("overlaps {:?} of {} in line {line}", other.address.to_string(), other.owner)
    };
    section.field_problem(at, "bind", &format!(" {text:?}: {what}"));
}

fn backends(section: &Section<'_>, binds: &[SocketAddr]) -> Vec<Backend> {
    let entries = section.required("backends", |section, field| section.entries(field)).unwrap_or_default();
    let mut backends: Vec<Backend> = Vec::new();
    for entry in entries {
        let (at, text, weight, backup) = match entry {
            Entry::Text((at, text)) => (at, text, 1, false),
            Entry::Table(table) => {
                let address = table.required("address", |table, field| table.string(field));
                let weight = table.integer("weight", 0, u64::from(Backend::MOST_WEIGHT));
                let backup = table.flag("backup").is_some_and(|(_, backup)| backup);
                table.finish();
                let Some((at, text)) = address else { continue };
                (at, text, weight.and_then(|(_, weight)| u32::try_from(weight).ok()).unwrap_or(1), backup)
            }
        };
        let (host, port) = match address::backend(text) {
            Ok(backend) => backend,
            Err(advice) => {
                section.field_problem(at, "backends", &format!(" {text:?}: {advice}"));
                continue;
            }
        };
        if backends.iter().any(|other| (&other.host, other.port) == (&host, port)) {
            section.field_problem(at, "backends", &format!(" {text:?}: listed twice"));
        }
        if let Some(bind) = binds.iter().find(|bind| address::loops_back(**bind, &host, port)) {
            let message =
                format!(" {text:?}: points back at this listener (bind \"{bind}\"): connections would loop");
            section.field_problem(at, "backends", &message);
        }
        backends.push(Backend { host, port, weight, backup });
    }
    if !backends.is_empty() && !backends.iter().any(|backend| !backend.backup && backend.weight > 0) {
        let message = ": at least one non-backup backend with weight > 0 is required";
        section.field_problem(section.at(), "backends", message);
    }
    backends
}

fn timeouts(section: Option<Section<'_>>, protocol: Protocol, protocol_known: bool) -> Timeouts {
    let default = protocol.timeouts();
    let mut timeouts = Timeouts {
        connect: default.connect,
        idle: default.idle,
        header_wait: default.header_wait,
        half_closed: default.half_closed,
        user_timeout: default.user_timeout,
        keepalive: default.keepalive,
        drain: default.drain,
    };
    let Some(section) = section else { return timeouts };
    let set = |field, value: &mut Duration| {
        if let Some((_, duration)) = section.duration(field, Zero::Refused) {
            *value = duration;
        }
    };
    set("connect", &mut timeouts.connect);
    set("idle", &mut timeouts.idle);
    set("half_closed", &mut timeouts.half_closed);
    set("user_timeout", &mut timeouts.user_timeout);
    set("drain", &mut timeouts.drain);
    if let Some((at, keepalive)) = section.duration("keepalive", Zero::Refused) {
        if keepalive.subsec_nanos() != 0 || keepalive > KEEPALIVE_LIMIT {
            let written = humantime::format_duration(keepalive);
            let what = format!(
                " \"{written}\": must be whole seconds, at most 9h 6m 7s (the limit of the kernel's TCP_KEEPIDLE)"
            );
            section.field_problem(at, "keepalive", &what);
        }
        timeouts.keepalive = keepalive;
    }
    if let Some((at, wait)) = section.duration("header_wait", Zero::Allowed) {
        let written = humantime::format_duration(wait);
        if protocol_known && protocol.speaks_first() == Speaker::Server {
            let what =
                format!(": has no effect with protocol {:?}: the server speaks first", protocol.name());
            section.field_problem(at, "header_wait", &what);
        } else if wait >= HEADER_WAIT_LIMIT {
            let what =
                format!(" \"{written}\": must be less than 3s: Dovecot waits at most 3s for the header");
            section.field_problem(at, "header_wait", &what);
        }
        timeouts.header_wait = wait;
    }
    section.finish();
    timeouts
}
