//! Answers as text.

use std::{
    fmt::{self, Write as _},
    net::IpAddr,
    time::{Duration, UNIX_EPOCH},
};

use super::{
    bans, dry_run, guard,
    text::{age, bytes, write_more, write_table},
    wire::{
        Answer, BackendStatus, ConfigStatus, ListenerStatus, Reloaded, ServiceStatus, SessionRow, Sessions,
        Status,
    },
};
use crate::kubernetes::Readiness;

/// The answer as text, with a line end.
#[must_use]
pub fn show(answer: &Answer) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = match answer {
        Answer::Status(status) => write_status(&mut out, status),
        Answer::Sessions(sessions) => write_sessions(&mut out, sessions),
        Answer::SessionsEnded { count: 1 } => writeln!(out, "1 session ended"),
        Answer::SessionsEnded { count } => writeln!(out, "{count} sessions ended"),
        Answer::Drained { listeners } => writeln!(out, "draining: {}", listeners.join(", ")),
        Answer::Resumed { listeners } if listeners.is_empty() => writeln!(out, "no listener was draining"),
        Answer::Resumed { listeners } => writeln!(out, "accepting again: {}", listeners.join(", ")),
        Answer::BackendSet { listeners } => {
            writeln!(out, "backend state changed for {}", listeners.join(", "))
        }
        Answer::BackendWeightSet { listeners, weight } => {
            writeln!(out, "weight {weight} until the next reload for {}", listeners.join(", "))
        }
        Answer::Banned { .. } | Answer::Unbanned { .. } | Answer::Bans(_) => bans::write(&mut out, answer),
        Answer::LogLevelSet { levels } => writeln!(out, "log level until the next reload: {levels}"),
        Answer::Reloaded(reloaded) => write_reloaded(&mut out, reloaded),
        Answer::DryRun(dry_run) => dry_run::write(&mut out, dry_run),
    };
    out
}

fn write_status(out: &mut String, status: &Status) -> fmt::Result {
    let Status { version, pid, uptime_ms, readiness, connections, max_connections, .. } = status;
    writeln!(out, "injector {version}, process {pid}, up {}, {readiness}", age(*uptime_ms))?;
    let ConfigStatus { file, loaded_at, reload_error } = &status.config;
    writeln!(
        out,
        "configuration {}, loaded {}",
        file.display(),
        humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(*loaded_at))
    )?;
    if let Some(reason) = reload_error {
        writeln!(out, "  last reload failed: {}", reason.replace('\n', "\n    "))?;
    }
    writeln!(out, "log level {}", status.log_level)?;
    writeln!(
        out,
        "{connections} of {max_connections} connections{}, {} queued in the kernel for slow receivers",
        inline_part(status.inline_connections),
        bytes(status.backlog_bytes)
    )?;
    for engine in &status.engines {
        match &engine.failure {
            None => writeln!(out, "engine {}: available", engine.name)?,
            Some(failure) => writeln!(out, "engine {}: {failure}", engine.name)?,
        }
    }
    if let Some(guard) = &status.guard {
        guard::write_status(out, guard)?;
    }
    for service in &status.services {
        write_service(out, service)?;
    }
    for listener in &status.listeners {
        writeln!(out)?;
        write_listener(out, listener)?;
    }
    for removed in &status.removed_listeners {
        writeln!(
            out,
            "\n{}: removed, {} connections left, aborted in {}",
            removed.name,
            removed.sessions,
            age(removed.abort_in_ms)
        )?;
    }
    Ok(())
}

fn write_service(out: &mut String, status: &ServiceStatus) -> fmt::Result {
    let ServiceStatus { service, resource, endpoints, answered_ms_ago, error } = status;
    write!(out, "service {service}: ")?;
    match endpoints {
        Some(endpoints) => {
            for state in Readiness::ALL.map(Readiness::name) {
                let addresses = endpoints.get(state).map(Vec::as_slice).unwrap_or_default();
                write!(out, "{} {}{}, ", addresses.len(), state.replace('_', " "), some_of(addresses))?;
            }
        }
        None => write!(out, "{resource}, ")?,
    }
    match answered_ms_ago {
        Some(ago) => writeln!(out, "the API answered {} ago", age(*ago))?,
        None => writeln!(out, "the API has not answered yet")?,
    }
    match error {
        Some(error) => writeln!(out, "  {error}"),
        None => Ok(()),
    }
}

/// The first of the addresses, in parentheses.
fn some_of(addresses: &[IpAddr]) -> String {
    const MOST: usize = 4;
    let some: Vec<_> = addresses.iter().take(MOST).map(ToString::to_string).collect();
    match (some.as_slice(), addresses.len() > MOST) {
        ([], _) => String::new(),
        (some, more) => format!(" ({}{})", some.join(", "), if more { ", ..." } else { "" }),
    }
}

fn write_listener(out: &mut String, listener: &ListenerStatus) -> fmt::Result {
    let ListenerStatus { name, protocol, engine, active, accepted, rejected, headers_sent, .. } = listener;
    let bind = listener.bind.iter().map(ToString::to_string);
    let led_here = listener.virtual_addresses.iter().map(|address| format!("{address} (virtual)"));
    let places: Vec<_> = bind.chain(led_here).collect();
    write!(out, "{name} ({protocol}, engine {engine}) on {}", places.join(", "))?;
    match (listener.draining, listener.abort_in_ms) {
        (true, Some(left @ 1..)) => writeln!(out, ": draining, older sessions are aborted in {}", age(left))?,
        (true, _) => writeln!(out, ": draining")?,
        (false, _) => writeln!(out)?,
    }
    writeln!(
        out,
        "  {active} active{}, {accepted} accepted, {rejected} rejected, {headers_sent} headers, {} to backends, {} to clients",
        inline_part(listener.active_inline),
        bytes(listener.bytes_to_backend),
        bytes(listener.bytes_to_client)
    )?;
    let width = listener.backends.iter().map(|backend| backend.name.len()).max().unwrap_or_default();
    for backend in &listener.backends {
        write_backend(out, backend, width)?;
    }
    Ok(())
}

/// How many of the connections inline carries.
#[must_use]
pub(super) fn inline_part(connections: u64) -> String {
    if connections == 0 { String::new() } else { format!(" ({connections} inline)") }
}

/// Its weight, or that it is a backup; beside a weight that the operator changed, the configured one.
#[must_use]
pub(super) fn role(backend: &BackendStatus) -> String {
    let BackendStatus { weight, .. } = backend;
    match (backend.backup, backend.configured_weight) {
        (false, None) => format!("weight {weight}"),
        (false, Some(configured)) => format!("weight {weight} (file: {configured})"),
        (true, None) => "backup".to_owned(),
        (true, Some(configured)) => format!("backup, weight {weight} (file: {configured})"),
    }
}

fn write_backend(out: &mut String, backend: &BackendStatus, width: usize) -> fmt::Result {
    let BackendStatus { name, active, sessions, checks_passed, checks_failed, ejections, .. } = backend;
    let role = role(backend);
    write!(out, "  {name:width$}  {}, {role}, {active} active, {sessions} sessions", backend.state.name())?;
    if checks_passed + checks_failed > 0 {
        write!(out, ", checks {checks_passed} passed {checks_failed} failed")?;
    }
    if *ejections > 0 {
        write!(out, ", ejected {ejections} times")?;
    }
    if let failing @ [_, ..] = backend.failing_addresses.as_slice() {
        let all = backend.addresses.len();
        let failing: Vec<_> = failing.iter().map(ToString::to_string).collect();
        write!(out, ", {} of {all} addresses fail ({})", failing.len(), failing.join(", "))?;
    }
    if backend.headers_misread > 0 {
        write!(out, ", {} headers read as commands", backend.headers_misread)?;
    }
    if backend.misreads_header {
        write!(out, ": NOT A PROXY PORT")?;
    }
    writeln!(out)
}

fn write_sessions(out: &mut String, sessions: &Sessions) -> fmt::Result {
    const TITLES: [&str; 9] =
        ["ID", "LISTENER", "ENGINE", "CLIENT", "TO", "BACKEND", "AGE", "TO BACKEND", "TO CLIENT"];
    write_table(out, TITLES, &sessions.rows.iter().map(cells).collect::<Vec<_>>())?;
    write_more(out, sessions.count, sessions.rows.len())
}

fn cells(row: &SessionRow) -> [String; 9] {
    [
        row.id.clone(),
        row.listener.clone(),
        row.engine.clone(),
        row.client.to_string(),
        row.local.to_string(),
        row.backend.map_or("-".to_owned(), |backend| backend.to_string()),
        age(row.age_ms),
        bytes(row.bytes_to_backend),
        bytes(row.bytes_to_client),
    ]
}

fn write_reloaded(out: &mut String, reloaded: &Reloaded) -> fmt::Result {
    let Reloaded { added, changed, removed, restart_needed_for } = reloaded;
    let mut changed_any = false;
    for (what, names) in [("added", added), ("changed", changed), ("removed", removed)] {
        if !names.is_empty() {
            writeln!(out, "{what}: {}", names.join(", "))?;
            changed_any = true;
        }
    }
    if !changed_any {
        writeln!(out, "no changes")?;
    }
    if !restart_needed_for.is_empty() {
        writeln!(out, "needs a restart: {}", restart_needed_for.join(", "))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{
        fixtures::{sessions, status},
        wire::{EngineStatus, RemovedListenerStatus},
    };

    #[test]
    fn status_page() {
        insta::assert_snapshot!(show(&Answer::Status(Box::new(status()))));
    }

    #[test]
    fn status_page_after_a_rejected_reload_and_a_removed_listener() {
        let mut status = status();
        status.config.reload_error = Some("i.toml:3: unknown key\ni.toml:9: unknown key".to_owned());
        status.engines.push(EngineStatus {
            name: "inline".to_owned(),
            failure: Some("not used by any listener".to_owned()),
        });
        status.services.push(ServiceStatus {
            service: "injector/injector".to_owned(),
            resource: "services".to_owned(),
            endpoints: None,
            answered_ms_ago: None,
            error: Some("no answer from the API server: connection refused".to_owned()),
        });
        status.removed_listeners.push(RemovedListenerStatus {
            name: "pop3".to_owned(),
            sessions: 3,
            abort_in_ms: 20_000,
        });
        insta::assert_snapshot!(show(&Answer::Status(Box::new(status))));
    }

    #[test]
    fn table_of_sessions() {
        insta::assert_snapshot!(show(&Answer::Sessions(Sessions { count: 3, ..sessions() })));
    }

    #[test]
    fn answers_of_drain_resume_backend_log_level_and_reload() {
        let names = || vec!["smtp".to_owned(), "imap".to_owned()];
        let reloaded = Reloaded {
            added: vec!["imaps".to_owned()],
            changed: names(),
            removed: vec!["pop3".to_owned()],
            restart_needed_for: vec!["log".to_owned()],
        };
        let answers = [
            Answer::SessionsEnded { count: 1 },
            Answer::SessionsEnded { count: 23 },
            Answer::Drained { listeners: names() },
            Answer::Resumed { listeners: names() },
            Answer::Resumed { listeners: Vec::new() },
            Answer::BackendSet { listeners: names() },
            Answer::BackendWeightSet { listeners: names(), weight: 3 },
            Answer::LogLevelSet { levels: "info,session=debug".to_owned() },
            Answer::Reloaded(Reloaded::default()),
            Answer::Reloaded(reloaded),
        ];
        insta::assert_snapshot!(answers.iter().map(show).collect::<String>());
    }

    #[test]
    fn session_without_a_backend_has_a_dash() {
        let row = SessionRow {
            id: "i1f".to_owned(),
            listener: "imaps".to_owned(),
            engine: "splice".to_owned(),
            client: "[2001:db8::7]:40000".parse().unwrap(),
            local: "[2001:db8::10]:993".parse().unwrap(),
            backend: None,
            age_ms: 900,
            bytes_to_backend: 12,
            bytes_to_client: 2048,
        };
        let text = show(&Answer::Sessions(Sessions { count: 3, rows: vec![row] }));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!(
            lines[1],
            "i1f  imaps     splice  [2001:db8::7]:40000  [2001:db8::10]:993  -        900ms  12 B        2.0 KiB"
        );
        assert_eq!(lines[2], "and 2 more");
    }

    #[test]
    fn a_port_that_reads_headers_as_commands_is_named() {
        let listeners = status().listeners;
        let mut backend = listeners.iter().flat_map(|listener| &listener.backends).next().unwrap().clone();
        (backend.headers_misread, backend.misreads_header) = (12, true);
        let mut out = String::new();
        write_backend(&mut out, &backend, 0).unwrap();
        assert!(out.ends_with(", 12 headers read as commands: NOT A PROXY PORT\n"), "{out}");
    }

    #[test]
    fn a_weight_of_the_operator_stands_beside_the_configured_one() {
        let mut backend = status().listeners[1].backends[0].clone();
        let mut with = |backup, weight, configured_weight| {
            (backend.backup, backend.weight, backend.configured_weight) = (backup, weight, configured_weight);
            role(&backend)
        };
        assert_eq!(with(false, 0, Some(3)), "weight 0 (file: 3)");
        assert_eq!(with(true, 0, Some(1)), "backup, weight 0 (file: 1)");
        assert_eq!([with(false, 3, None), with(true, 3, None)], ["weight 3", "backup"]);
    }

    #[test]
    fn reload_lists_the_changes() {
        assert_eq!(show(&Answer::Reloaded(Reloaded::default())), "no changes\n");
        let reloaded = Reloaded {
            removed: vec!["pop3".to_owned()],
            restart_needed_for: vec!["log".to_owned()],
            ..Reloaded::default()
        };
        assert_eq!(show(&Answer::Reloaded(reloaded)), "removed: pop3\nneeds a restart: log\n");
    }

    #[test]
    fn sizes_and_ages_have_two_units_at_most() {
        assert_eq!([0, 1023, 1024, 5 << 40].map(bytes), ["0 B", "1023 B", "1.0 KiB", "5.0 TiB"]);
        assert_eq!([5, 61_000, 90_061_000].map(age), ["5ms", "1m 1s", "1day 1h"]);
    }
}
