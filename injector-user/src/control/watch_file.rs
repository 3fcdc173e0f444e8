//! `injector reload --watch`: reloads the configuration whenever the file changes.
//!
//! For Kubernetes, which replaces the files of a ConfigMap behind a symbolic link. So the contents
//! are compared, not times or inodes.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::signal::unix::{SignalKind, signal};

use super::{client, wire::Request};

/// How often the file is read.
const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// Watches `file` until SIGTERM or SIGINT. Both need a handler, because the first process of a
/// container ignores them otherwise. A rejected reload is reported and retried only after the next
/// change; while no daemon answers, the reload is retried.
///
/// # Errors
/// When the runtime or a signal handler cannot be created.
pub fn watch(socket: &Path, file: &Path) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut file_state = WatchedFile { file: file.to_owned(), applied: None };
        file_state.applied = file_state.read();
        loop {
            tokio::select! {
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                () = tokio::time::sleep(POLL_INTERVAL) => file_state.reload_if_changed(socket),
            }
        }
    })
}

#[derive(Debug)]
struct WatchedFile {
    file: PathBuf,
    /// The contents that the daemon loaded or rejected.
    applied: Option<Vec<u8>>,
}

impl WatchedFile {
    fn reload_if_changed(&mut self, socket: &Path) {
        let now = self.read();
        if now.is_none() || now == self.applied {
            return;
        }
        match client::send(socket, &Request::Reload) {
            Ok(answer) => print!("{}", client::show(&answer)),
            Err(error @ client::ClientError::Rejected(_)) => eprintln!("injector: {error}"),
            Err(error) => return eprintln!("injector: {error}"),
        }
        self.applied = now;
    }

    fn read(&self) -> Option<Vec<u8>> {
        match fs::read(&self.file) {
            Ok(contents) => Some(contents),
            Err(error) => {
                eprintln!("injector: {}: {error}", self.file.display());
                None
            }
        }
    }
}
