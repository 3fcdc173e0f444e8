//! `injector reload --dry-run`: what a reload would do, as the daemon finds out, and as text.

use std::{
    fmt::{self, Write as _},
    net::SocketAddr,
    time::Duration,
};

use futures_util::future::join_all;
use tokio::time::timeout;

use super::wire::{AddressDryRun, BackendDryRun, DryRun, ListenerChange, ListenerDryRun};
use crate::{
    backend::{self, CheckError},
    config::{self, Config, Destination, Listener},
    guard::lists,
    kubernetes::Watcher,
    server::{Rehearsal, Server},
};

/// How long the backends of all listeners may take together: less than the client waits.
const BACKENDS_TIMEOUT: Duration = Duration::from_secs(20);

/// What the server would do with a configuration, and the listeners whose backends [`try_backends`]
/// is to try.
pub(super) fn rehearse(server: &Server, config: Config) -> (DryRun, Vec<Listener>) {
    let mut warnings = config::remarks(&config);
    warnings.extend(unreadable_lists(&config));
    let rehearsal = match server.rehearse(config) {
        Ok(rehearsal) => rehearsal,
        Err(error) => return (DryRun { error: Some(format!("{error:#}")), ..DryRun::default() }, Vec::new()),
    };
    let Rehearsal { listeners, removed, requires_restart } = rehearsal;
    let mut settings = Vec::new();
    let mut results = Vec::new();
    for (listener, result) in listeners {
        let before = server.listeners().iter().find(|active| active.settings.name == listener.name);
        let change = match before {
            None => ListenerChange::Added,
            Some(active) if active.settings == listener => ListenerChange::Unchanged,
            Some(_) => ListenerChange::Changed,
        };
        let (engine, error) = match result {
            Ok(selection) => (Some(selection.label()), None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        results.push(ListenerDryRun {
            name: listener.name.clone(),
            change,
            engine,
            error,
            backends: Vec::new(),
        });
        settings.push(listener);
    }
    let restart_needed_for = requires_restart.into_iter().map(str::to_owned).collect();
    (DryRun { error: None, listeners: results, removed, restart_needed_for, warnings }, settings)
}

/// The list files that cannot be read. The reload does not depend on them, because they are followed.
fn unreadable_lists(config: &Config) -> Vec<String> {
    let Some(guard) = &config.guard else { return Vec::new() };
    let files = guard.deny_files.iter().chain(&guard.allow_files);
    files.filter_map(|file| lists::read(file).err()).collect()
}

/// Resolves and checks the backends of all listeners.
pub(super) async fn try_backends(dry_run: &mut DryRun, listeners: &[Listener], watcher: &Watcher) {
    let all = join_all(listeners.iter().map(|listener| async move {
        let tried = listener.backends.iter().map(|backend| try_backend(listener, backend, watcher));
        join_all(tried).await
    }));
    for (result, backends) in dry_run.listeners.iter_mut().zip(all.await) {
        result.backends = backends;
    }
}

async fn try_backend(listener: &Listener, configured: &config::Backend, watcher: &Watcher) -> BackendDryRun {
    let tried = match timeout(BACKENDS_TIMEOUT, backend::try_once(listener, configured, watcher)).await {
        Ok(Ok(addresses)) => Ok(addresses),
        Ok(Err(error)) if matches!(configured.destination, Destination::Service { .. }) => {
            Err(error.to_string())
        }
        Ok(Err(error)) => Err(format!("the name cannot be resolved: {error}")),
        Err(_) => Err(format!("not finished within {BACKENDS_TIMEOUT:?}")),
    };
    let address = |(address, result): (SocketAddr, Result<(), CheckError>)| AddressDryRun {
        address,
        error: result.err().map(|error| error.to_string()),
    };
    let (addresses, error) = match tried {
        Ok(addresses) if addresses.is_empty() => (Vec::new(), Some("the name has no address".to_owned())),
        Ok(addresses) => (addresses.into_iter().map(address).collect(), None),
        Err(error) => (Vec::new(), Some(error)),
    };
    BackendDryRun { name: configured.to_string(), error, addresses }
}

/// The answer as text.
pub(super) fn write(out: &mut String, dry_run: &DryRun) -> fmt::Result {
    for listener in &dry_run.listeners {
        write_listener(out, listener)?;
    }
    if !dry_run.removed.is_empty() {
        writeln!(out, "would be removed: {}", dry_run.removed.join(", "))?;
    }
    if !dry_run.restart_needed_for.is_empty() {
        writeln!(out, "would need a restart: {}", dry_run.restart_needed_for.join(", "))?;
    }
    for warning in &dry_run.warnings {
        writeln!(out, "warning: {warning}")?;
    }
    match &dry_run.error {
        Some(error) => writeln!(out, "would be rejected: {error}"),
        None if dry_run.is_rejected() => Ok(()),
        None => writeln!(out, "the reload would be accepted; nothing was changed"),
    }
}

fn write_listener(out: &mut String, listener: &ListenerDryRun) -> fmt::Result {
    let change = match listener.change {
        ListenerChange::Added => "would be added",
        ListenerChange::Changed => "would be changed",
        ListenerChange::Unchanged => "stays",
    };
    write!(out, "{}: ", listener.name)?;
    match (&listener.error, &listener.engine) {
        (Some(error), _) => writeln!(out, "would be rejected: {error}")?,
        (None, Some(engine)) => writeln!(out, "{change}, engine {engine}")?,
        (None, None) => writeln!(out, "{change}")?,
    }
    for backend in &listener.backends {
        let BackendDryRun { name, error, addresses } = backend;
        if let Some(error) = error {
            writeln!(out, "  {name}  {error}")?;
        }
        for AddressDryRun { address, error } in addresses {
            let result = error.as_deref().unwrap_or("answers");
            if *name == address.to_string() {
                writeln!(out, "  {name}  {result}")?;
            } else {
                writeln!(out, "  {name}  {address}  {result}")?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listener_and_backend_has_a_line() {
        let backend = |name: &str, address: &str, error: Option<&str>| BackendDryRun {
            name: name.to_owned(),
            error: None,
            addresses: vec![AddressDryRun {
                address: address.parse().unwrap(),
                error: error.map(str::to_owned),
            }],
        };
        let listener = |name: &str, change| ListenerDryRun {
            name: name.to_owned(),
            change,
            engine: Some("splice".to_owned()),
            error: None,
            backends: Vec::new(),
        };
        let mut dry_run = DryRun {
            error: None,
            listeners: vec![
                ListenerDryRun {
                    backends: vec![
                        backend("192.0.2.20:2525", "192.0.2.20:2525", None),
                        backend(
                            "mail.internal:2525",
                            "192.0.2.21:2525",
                            Some("connecting: Connection refused"),
                        ),
                        BackendDryRun {
                            name: "mail.example:2525".to_owned(),
                            error: Some("the name has no address".to_owned()),
                            addresses: Vec::new(),
                        },
                    ],
                    ..listener("smtp", ListenerChange::Changed)
                },
                listener("imaps", ListenerChange::Added),
                listener("pop3s", ListenerChange::Unchanged),
            ],
            removed: vec!["pop3".to_owned()],
            restart_needed_for: vec!["log".to_owned()],
            warnings: vec!["a remark".to_owned()],
        };
        let text = |dry_run: &DryRun| {
            let mut out = String::new();
            write(&mut out, dry_run).unwrap();
            out
        };
        assert!(!dry_run.is_rejected(), "a backend that fails is no reason");
        assert_eq!(
            text(&dry_run),
            "smtp: would be changed, engine splice\n  \
               192.0.2.20:2525  answers\n  \
               mail.internal:2525  192.0.2.21:2525  connecting: Connection refused\n  \
               mail.example:2525  the name has no address\n\
             imaps: would be added, engine splice\n\
             pop3s: stays, engine splice\n\
             would be removed: pop3\n\
             would need a restart: log\n\
             warning: a remark\n\
             the reload would be accepted; nothing was changed\n"
        );
        dry_run.listeners.truncate(2);
        dry_run.listeners[1].error = Some("cannot listen".to_owned());
        assert!(dry_run.is_rejected());
        assert!(text(&dry_run).contains("imaps: would be rejected: cannot listen\n"));
        assert!(!text(&dry_run).contains("accepted"));
        let dry_run = DryRun { error: Some("f.toml:1:1: wrong".to_owned()), ..DryRun::default() };
        assert!(dry_run.is_rejected());
        assert_eq!(text(&dry_run), "would be rejected: f.toml:1:1: wrong\n");
    }
}
