//! The output of `injector check`: the effective configuration, with all defaults.

use std::{
    fmt::{self, Write as _},
    net::SocketAddr,
};

use super::{
    Backend, CheckHeader, Config, Destination, Health, Inline, Kubernetes, Limits, Listener, ProxyVersion,
    Receiver, Source,
};
use crate::protocol::FirstSpeaker;

/// Describes a configuration: one block per listener, with all defaults.
pub fn summary(config: &Config) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut out, config);
    out
}

fn write(out: &mut String, config: &Config) -> fmt::Result {
    for listener in &config.listeners {
        write_listener(out, listener)?;
        writeln!(out)?;
    }
    let count = config.listeners.len();
    write!(out, "{count} listener{}, ", if count == 1 { "" } else { "s" })?;
    let Limits { max_connections, workers } = config.limits;
    write!(out, "at most {max_connections} connections, {workers} worker threads, ")?;
    writeln!(
        out,
        "sessions may finish for {} after SIGTERM",
        humantime::format_duration(config.stop.deadline)
    )?;
    if config.listeners.iter().any(|listener| listener.engine.may_be_inline()) {
        write_inline(out, &config.inline)?;
    }
    if !config.services().is_empty() {
        write_kubernetes(out, &config.kubernetes)?;
    }
    match config.metrics {
        Some(metrics) => writeln!(out, "metrics on http://{}/metrics", metrics.listen)?,
        None => writeln!(out, "no metrics (add [metrics] listen)")?,
    }
    if let Some(health) = config.health {
        writeln!(out, "health on http://{}/readyz", health.listen)?;
    }
    match &config.admin {
        Some(admin) => writeln!(out, "control socket {}", admin.socket.display()),
        None => writeln!(out, "no control socket (add [admin] socket)"),
    }
}

fn write_listener(out: &mut String, listener: &Listener) -> fmt::Result {
    writeln!(out, "{} ({}, engine {})", listener.name, listener.protocol, listener.engine)?;
    let bind: Vec<_> = listener.bind.iter().map(|address| bind(*address)).collect();
    writeln!(out, "  listens on   {}", bind.join(", "))?;
    if !listener.virtual_addresses.is_empty() {
        writeln!(out, "  virtual      {}", listener.virtual_addresses)?;
    }
    if !listener.translated_sources.is_empty() {
        writeln!(out, "  refuses      {} (translated sources)", join(&listener.translated_sources))?;
    }
    let resolves =
        listener.backends.iter().any(|backend| matches!(backend.destination, Destination::Name { .. }));
    let interval = humantime::format_duration(listener.resolve_interval);
    let resolves = if resolves { format!(" (names resolved every {interval})") } else { String::new() };
    let is_service = |backend: &Backend| matches!(backend.destination, Destination::Service { .. });
    let follows =
        if listener.backends.iter().any(is_service) { " (endpoints of services followed)" } else { "" };
    let backends: Vec<_> = listener.backends.iter().map(backend).collect();
    writeln!(out, "  backends     {}{resolves}{follows}", backends.join(", "))?;
    if !listener.source_addresses.is_empty() {
        writeln!(out, "  connects by  {}", join(&listener.source_addresses))?;
    }
    writeln!(out, "  health       {}", health(&listener.health))?;
    writeln!(out, "  header       {}", header(&listener.receiver))?;
    let timeouts = &listener.timeouts;
    let [connect, idle, half_closed, client_fin, wait, user_timeout, keepalive, drain] = [
        timeouts.connect,
        timeouts.idle,
        timeouts.half_closed,
        timeouts.client_fin,
        timeouts.header_wait,
        timeouts.user_timeout,
        timeouts.keepalive,
        timeouts.drain,
    ]
    .map(humantime::format_duration);
    write!(
        out,
        "  timeouts     connect {connect}, idle {idle}, half-closed {half_closed}, client FIN {client_fin}"
    )?;
    match listener.protocol.speaks_first() {
        FirstSpeaker::Server => writeln!(out)?,
        FirstSpeaker::Client | FirstSpeaker::Unknown => {
            writeln!(out, ", header waits {wait} for the client")?
        }
    }
    writeln!(out, "  dead peers   probed after {keepalive}, timed out after {user_timeout}")?;
    writeln!(out, "  draining     connections may finish for {drain}")?;
    match listener.max_connections {
        Some(most) => writeln!(out, "  connections  at most {most}"),
        None => Ok(()),
    }
}

/// The settings that only engine inline has.
fn write_inline(out: &mut String, inline: &Inline) -> fmt::Result {
    let source = match (inline.source, inline.source_addresses.as_slice()) {
        (Source::Client, _) => "the client's address".to_owned(),
        (Source::Edge, []) => "this host's address".to_owned(),
        (Source::Edge, addresses) => join(addresses),
    };
    let devices =
        if inline.devices.is_empty() { "all devices".to_owned() } else { inline.devices.join(", ") };
    let (flows, pin) = (inline.flows, inline.pin.display());
    writeln!(
        out,
        "inline: at most {flows} connections, from {source} to the backends, programs on {devices}, pins in {pin}"
    )?;
    if inline.peers.is_empty() {
        return Ok(());
    }
    writeln!(out, "inline: {} may connect to backends through this host", inline.peers)
}

fn write_kubernetes(out: &mut String, kubernetes: &Kubernetes) -> fmt::Result {
    let credentials = match (&kubernetes.kubeconfig, &kubernetes.context) {
        (None, _) => "the pod's service account".to_owned(),
        (Some(file), None) => file.display().to_string(),
        (Some(file), Some(context)) => format!("context {context} of {}", file.display()),
    };
    let or_none = |name: &Option<String>| name.clone().unwrap_or_else(|| "not set".to_owned());
    let (node, zone) = (or_none(&kubernetes.node), or_none(&kubernetes.zone));
    writeln!(out, "kubernetes: API by {credentials}, node {node}, zone {zone}")
}

fn bind(address: SocketAddr) -> String {
    if address.is_ipv6() && address.ip().is_unspecified() {
        format!("{address} (IPv4 and IPv6)")
    } else {
        address.to_string()
    }
}

fn backend(backend: &Backend) -> String {
    let mut notes = Vec::new();
    if backend.weight != 1 {
        notes.push(format!("weight {}", backend.weight));
    }
    if backend.backup {
        notes.push("backup".to_owned());
    }
    if notes.is_empty() { backend.to_string() } else { format!("{backend} ({})", notes.join(", ")) }
}

fn health(health: &Health) -> String {
    let checks = match &health.check {
        None => "not checked".to_owned(),
        Some(check) => {
            let what = check.protocol.map_or("tcp".to_owned(), |protocol| format!("mail ({protocol})"));
            let port = check.port.map_or("its own port".to_owned(), |port| format!("port {port}"));
            let header = if check.header == CheckHeader::Local { ", header LOCAL" } else { "" };
            let [interval, timeout] = [check.interval, check.timeout].map(humantime::format_duration);
            format!(
                "{what} on {port}{header}, every {interval} within {timeout}, down after {}, up after {}",
                check.fall, check.rise
            )
        }
    };
    match health.ejection.after {
        Some(after) => {
            let time = humantime::format_duration(health.ejection.time);
            format!("{checks}; ejected for {time} after {after} failed connections")
        }
        None => checks,
    }
}

fn header(receiver: &Receiver) -> String {
    let mut tlvs = Vec::new();
    if receiver.crc32c {
        tlvs.push("crc32c".to_owned());
    }
    if receiver.unique_id {
        tlvs.push("unique_id".to_owned());
    }
    if let Some(name) = &receiver.authority {
        tlvs.push(format!("authority {name}"));
    }
    if let Some(length) = receiver.noop {
        tlvs.push(format!("noop of {length} bytes"));
    }
    for custom in &receiver.custom {
        tlvs.push(format!("{:#X} of {} bytes", custom.kind, custom.value.len()));
    }
    let longest = receiver.max_header_len();
    let tlvs = if tlvs.is_empty() { "no TLVs".to_owned() } else { tlvs.join(", ") };
    match receiver.version {
        ProxyVersion::V1 => format!("PROXY v1, up to {longest} bytes"),
        ProxyVersion::V2 => format!("PROXY v2, up to {longest} bytes, {tlvs}"),
    }
}

fn join(items: &[impl ToString]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
