//! `docs/config.md` against the code.

use std::{collections::BTreeSet, time::Duration};

use super::{LISTENER, and, diagnostics, with};
use crate::{
    config::{
        Balance, Captcha, CheckHeader, Config, EngineChoice, Guard, Health, Inline, Limits, LogFormat,
        LogLevel, PerSource, Receiver, Splice, Stop,
    },
    protocol::Protocol,
};

/// The complete example of the documentation, with every field away from its default.
#[test]
fn the_documented_example_parses_and_sets_every_field() {
    let document = include_str!("../../../../docs/config.md");
    let (_, rest) = document.split_once("<!-- complete example -->\n```toml\n").unwrap();
    let (text, _) = rest.split_once("```").unwrap();
    let config = Config::parse(text, "docs/config.md").unwrap_or_else(|error| panic!("{error}"));
    assert!(config.metrics.is_some() && config.health.is_some());
    assert!(config.admin.is_some());
    assert_ne!(config.limits, Limits::default());
    assert_ne!(config.stop, Stop::default());
    let (splice, default) = (config.splice, Splice::default());
    assert_ne!(splice.watermarks.high, default.watermarks.high);
    assert_ne!(splice.watermarks.low, default.watermarks.low);
    assert_ne!(splice.watermarks.total_high, default.watermarks.total_high);
    assert_ne!(splice.watermarks.total_limit, default.watermarks.total_limit);
    assert_ne!(splice.enrolment.messages, default.enrolment.messages);
    assert_ne!(splice.enrolment.bytes, default.enrolment.bytes);
    assert_ne!(splice.enrolment.age, default.enrolment.age);
    assert_ne!(splice.header, default.header);
    let kubernetes = &config.kubernetes;
    assert!(kubernetes.kubeconfig.is_some() && kubernetes.context.is_some());
    assert!(kubernetes.node.is_some() && kubernetes.zone.is_some());
    let (inline, default) = (&config.inline, Inline::default());
    // Source addresses need the default of `source`.
    assert!(!inline.source_addresses.is_empty() && !inline.devices.is_empty() && !inline.peers.is_empty());
    assert_ne!((inline.flows, inline.attachment), (default.flows, default.attachment));
    assert_ne!(inline.pin, default.pin);
    let (guard, default) = (config.guard.as_ref().unwrap(), Guard::default());
    for networks in [&guard.deny, &guard.allow] {
        assert!(!networks.is_empty());
    }
    for files in [&guard.deny_files, &guard.allow_files] {
        assert!(!files.is_empty());
    }
    assert!(!guard.devices.is_empty());
    assert_ne!((guard.max_bans, guard.xdp), (default.max_bans, default.xdp));
    assert_ne!((&guard.pin, &guard.state), (&default.pin, &default.state));
    assert_ne!(guard.source_prefix_ipv4, default.source_prefix_ipv4);
    assert_ne!(guard.source_prefix_ipv6, default.source_prefix_ipv6);
    assert!(is_limited(guard.per_source));
    let crowdsec = guard.crowdsec.as_ref().unwrap();
    assert!(crowdsec.ca_file.is_some() && !crowdsec.usage_metrics);
    assert!(!crowdsec.origins.is_empty() && !crowdsec.scenarios_containing.is_empty());
    assert_ne!(crowdsec.interval, Duration::from_secs(10));
    assert_ne!(crowdsec.captcha, Captcha::default());
    assert_ne!((config.log.format, config.log.level), (LogFormat::default(), LogLevel::default()));
    let listener = config.listeners.iter().find(|listener| listener.name == "imaps").unwrap();
    let default = Protocol::Imaps.timeouts();
    assert_ne!(listener.timeouts.connect, default.connect);
    assert_ne!(listener.timeouts.idle, default.idle);
    assert_ne!(listener.timeouts.header_wait, default.header_wait);
    assert_ne!(listener.timeouts.half_closed, default.half_closed);
    assert_ne!(listener.timeouts.client_fin, default.client_fin);
    assert_ne!(listener.timeouts.user_timeout, default.user_timeout);
    assert_ne!(listener.timeouts.keepalive, default.keepalive);
    assert_ne!(listener.timeouts.drain, default.drain);
    assert_ne!(listener.engine, EngineChoice::default());
    assert_ne!(listener.resolve_interval, Duration::from_secs(15));
    assert!(!listener.source_addresses.is_empty());
    for (listed, services) in [
        (listener.virtual_addresses.listed.len(), listener.virtual_addresses.services.len()),
        (config.inline.peers.listed.len(), config.inline.peers.services.len()),
    ] {
        assert_eq!((listed, services), (1, 1));
    }
    assert!(!listener.translated_sources.is_empty());
    assert!(listener.max_connections.is_some());
    assert!(is_limited(listener.per_source));
    assert!(listener.backends.iter().any(|backend| backend.weight != 1));
    assert!(listener.backends.iter().any(|backend| backend.backup));
    assert!(listener.backends.iter().any(|backend| backend.max_connections.is_some()));
    assert_ne!(listener.balance, Balance::default());
    assert_ne!(listener.max_queue, 100);
    assert_ne!(listener.timeouts.queue, Duration::from_secs(30));
    let health = listener.health;
    assert_ne!(health.ejection.after, Health::default().ejection.after);
    assert_ne!(health.ejection.time, Health::default().ejection.time);
    let check = health.check.unwrap();
    assert_eq!((check.protocol, check.port), (Some(Protocol::Imap), Some(143)));
    assert_eq!(check.header, CheckHeader::Local);
    assert_ne!((check.interval, check.timeout), (Duration::from_secs(10), Duration::from_secs(5)));
    assert_ne!(check.rise, 2);
    assert_ne!(check.fall, 3);
    let receiver = &listener.receiver;
    assert!(receiver.crc32c && receiver.unique_id && receiver.authority.is_some() && receiver.noop.is_some());
    assert_eq!(receiver.custom.len(), 2);
    assert_ne!(receiver.max_header, Receiver::default().max_header);
}

fn is_limited(limits: PerSource) -> bool {
    limits.max_connections.is_some() && limits.max_rate.is_some() && limits.burst.is_some()
}

/// The reference lists exactly the keys that exist, each once. A heading with a code span
/// (`[splice]`, `listener.backends`) opens the keys of one table.
#[test]
fn the_documentation_names_every_field() {
    let document = include_str!("../../../../docs/config.md");
    let mut table = None;
    let mut documented = BTreeSet::new();
    for line in document.lines() {
        if line.starts_with("##") {
            let name = line.trim_start_matches('#').trim();
            let code = name.strip_prefix('`').and_then(|name| name.strip_suffix('`'));
            table = code.map(|code| code.trim_matches(['[', ']']));
        } else if let (Some(table), Some(row)) = (table, line.strip_prefix("| `")) {
            let (key, _) = row.split_once('`').unwrap();
            assert!(documented.insert(format!("{table}.{key}")), "{table}.{key} is listed twice");
        }
    }
    // An unknown field is answered with the known ones: they are asked for here.
    let known = |text: &str| -> Vec<String> {
        let all = diagnostics(text);
        let (_, list) = all[0].split_once("known fields: ").unwrap_or_else(|| panic!("{all:?}"));
        list.split(", ").map(str::to_owned).collect()
    };
    let mut real = BTreeSet::new();
    for section in
        ["metrics", "health", "admin", "limits", "splice", "inline", "kubernetes", "guard", "stop", "log"]
    {
        let listen = match section {
            "metrics" | "health" => "listen = \"127.0.0.1:1\"\n",
            "admin" => "socket = \"/run/x\"\n",
            _ => "",
        };
        let fields = known(&format!("[{section}]\nzzzzzzzz = 1\n{listen}{LISTENER}"));
        real.extend(fields.iter().map(|field| format!("{section}.{field}")));
    }
    let crowdsec = "url = \"http://x\"\napi_key_file = \"/k\"\n";
    let fields = known(&format!("[guard.crowdsec]\nzzzzzzzz = 1\n{crowdsec}{LISTENER}"));
    real.extend(fields.iter().map(|field| format!("guard.crowdsec.{field}")));
    real.extend(known(&and("zzzzzzzz = 1")).iter().map(|field| format!("listener.{field}")));
    let backend = "backends = [{ address = \"mail.internal:2525\", zzzzzzzz = 1 }]";
    real.extend(known(&with("backends", backend)).iter().map(|field| format!("listener.backends.{field}")));
    for (section, needed) in [
        ("[listener.timeouts]", ""),
        ("[listener.guard]", "[guard]"),
        ("[listener.health]", ""),
        ("[listener.receiver]", ""),
        ("[[listener.receiver.custom]]", "kind = 0xE0\nvalue = \"x\""),
    ] {
        let fields = known(&and(&format!("{section}\nzzzzzzzz = 1\n{needed}")));
        let path = section.trim_matches(['[', ']']);
        real.extend(fields.iter().map(|field| format!("{path}.{field}")));
    }
    // The tables themselves are headings.
    for table in [
        "guard.crowdsec",
        "listener.timeouts",
        "listener.guard",
        "listener.health",
        "listener.receiver",
        "listener.receiver.custom",
    ] {
        assert!(real.remove(table), "{table} is no longer a field");
    }
    assert_eq!(documented, real);
}

/// The installed file is complete, and reads like the documentation.
#[test]
fn the_installed_configuration_has_both_families_and_checks() {
    let text = include_str!("../../../../deploy/injector.toml");
    let config = Config::parse(text, "deploy/injector.toml").unwrap_or_else(|error| panic!("{error}"));
    let operations = include_str!("../../../../docs/operations.md");
    assert_eq!(config.listeners.len(), 4);
    for listener in &config.listeners {
        let name = &listener.name;
        let standard = listener.protocol.standard_port();
        let families: BTreeSet<_> = listener.bind.iter().map(std::net::SocketAddr::is_ipv4).collect();
        assert_eq!(families.len(), 2, "{name}");
        assert!(listener.bind.iter().all(|address| Some(address.port()) == standard), "{name}");
        assert!(listener.bind.iter().any(|address| operations.contains(&address.ip().to_string())), "{name}");
        let check = listener.health.check.as_ref().unwrap_or_else(|| panic!("{name} has no check"));
        assert_eq!((check.port, check.protocol.is_some()), (standard, true), "{name}");
        for backend in &listener.backends {
            assert!(operations.contains(&backend.destination.host()), "{name}: {backend}");
            assert_eq!(backend.destination.port(), listener.protocol.alternative_port(), "{name}");
        }
    }
}
