//! `injector reload --watch`: reloads the configuration whenever the file changes.
//!
//! For Kubernetes, which replaces the files of a ConfigMap behind a symbolic link. So the contents
//! are compared, not times or inodes.

use std::{
    fs, io,
    path::Path,
    time::{Duration, Instant},
};

use tokio::signal::unix::{SignalKind, signal};

use super::{
    client::{self, ClientError},
    wire::{Answer, Reloaded, Request},
};

/// How often the file is read.
const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// How long after a rejected reload the same file is tried again: what it needs, such as an address
/// of this host, may have come meanwhile.
const RETRY_REJECTED: Duration = Duration::from_secs(30);

/// Watches `file` until SIGTERM or SIGINT. Both need a handler, because the first process of a
/// container ignores them otherwise. The daemon reloads once at the beginning: the file may have
/// changed since it read it. A rejected reload is tried again, and so is one that no daemon answers.
///
/// # Errors
/// When the runtime or a signal handler cannot be created.
pub fn watch(socket: &Path, file: &Path) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut poll = tokio::time::interval(POLL_INTERVAL);
        poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut watched = WatchedFile::default();
        loop {
            tokio::select! {
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                _ = poll.tick() => reload_if_due(&mut watched, socket, file),
            }
        }
    })
}

fn reload_if_due(watched: &mut WatchedFile, socket: &Path, file: &Path) {
    let contents = match fs::read(file) {
        Ok(contents) => contents,
        Err(error) => return report(watched, format!("{}: {error}", file.display())),
    };
    if !watched.is_due(&contents, Instant::now()) {
        return;
    }
    match client::send(socket, &Request::Reload) {
        Ok(answer) => {
            // Usual at the beginning.
            if answer != Answer::Reloaded(Reloaded::default()) {
                print!("{}", client::show(&answer));
            }
            watched.applied(contents);
        }
        Err(error) => {
            if matches!(error, ClientError::Rejected(_)) {
                watched.rejected(contents, Instant::now());
            }
            report(watched, error.to_string());
        }
    }
}

fn report(watched: &mut WatchedFile, error: String) {
    if let Some(error) = watched.new_error(error) {
        eprintln!("injector: {error}");
    }
}

/// What became of the file's contents.
#[derive(Debug, Default)]
struct WatchedFile {
    /// The last answer of the daemon, to these contents.
    answered: Option<(Vec<u8>, Outcome)>,
    /// The last error that was printed, until a reload succeeds.
    error: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Applied,
    Rejected(Instant),
}

impl WatchedFile {
    /// Whether the daemon must reload.
    fn is_due(&self, contents: &[u8], now: Instant) -> bool {
        match &self.answered {
            Some((answered, Outcome::Applied)) => answered != contents,
            Some((answered, Outcome::Rejected(at))) => {
                answered != contents || now.duration_since(*at) >= RETRY_REJECTED
            }
            None => true,
        }
    }

    fn applied(&mut self, contents: Vec<u8>) {
        self.answered = Some((contents, Outcome::Applied));
        self.error = None;
    }

    fn rejected(&mut self, contents: Vec<u8>, now: Instant) {
        self.answered = Some((contents, Outcome::Rejected(now)));
    }

    /// The error, unless it is the one that was printed before.
    fn new_error(&mut self, error: String) -> Option<String> {
        (self.error.as_ref() != Some(&error)).then(|| self.error.insert(error).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_loaded_at_the_beginning_and_when_it_changes() {
        let (mut watched, now) = (WatchedFile::default(), Instant::now());
        assert!(watched.is_due(b"a", now), "it may have changed before");
        assert!(watched.is_due(b"a", now), "no daemon has answered");
        watched.applied(b"a".to_vec());
        assert!(!watched.is_due(b"a", now + 10 * RETRY_REJECTED));
        assert!(watched.is_due(b"b", now));
    }

    #[test]
    fn a_rejected_file_is_tried_again() {
        let (mut watched, now) = (WatchedFile::default(), Instant::now());
        watched.rejected(b"a".to_vec(), now);
        assert!(!watched.is_due(b"a", now + RETRY_REJECTED - Duration::from_millis(1)));
        assert!(watched.is_due(b"a", now + RETRY_REJECTED));
        assert!(watched.is_due(b"b", now));
        watched.rejected(b"a".to_vec(), now + RETRY_REJECTED);
        assert!(!watched.is_due(b"a", now + RETRY_REJECTED));
    }

    #[test]
    fn an_error_is_printed_once_until_a_reload_succeeds() {
        let mut watched = WatchedFile::default();
        let mut prints = |error: &str| watched.new_error(error.to_owned()).is_some();
        assert!(prints("no daemon") && !prints("no daemon") && prints("refused") && prints("no daemon"));
        watched.applied(Vec::new());
        assert!(watched.new_error("no daemon".to_owned()).is_some());
    }
}
