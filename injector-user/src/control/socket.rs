//! The daemon's end of the control socket.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use thiserror::Error;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    time::timeout,
};

use super::{
    handler::Control,
    wire::{Reply, Request},
};
use crate::telemetry::{
    log::target,
    operator_connections::{ACCEPT_RETRY_DELAY, OperatorConnections},
};

/// Only the daemon's user and root may connect.
const MODE: u32 = 0o600;
/// Longer than every valid request.
const MAX_REQUEST_BYTES: u64 = 64 * 1024;
/// How long a client may take to send its request, and to receive the reply.
const IO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may take: longer than both, and than every command (a dry run tries
/// backends for 20 s).
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(40);

/// Why the control socket cannot be opened.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Another daemon listens there.
    #[error(
        "{path}: another injector{} runs with this admin.socket: stop it first, or give each its own",
        process.map(|process| format!(" (process {process})")).unwrap_or_default()
    )]
    InUse {
        /// The socket.
        path: PathBuf,
        /// The other daemon, once it listens.
        process: Option<i32>,
    },
    /// A file of another type exists there.
    #[error("{path}: the file exists and is not a socket: remove it, or use another path (admin.socket)")]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{path}: {error}: admin.socket must be in a directory that the injector can write to")]
    Io {
        /// The socket or its directory.
        path: PathBuf,
        /// Its error.
        error: io::Error,
    },
}

/// The listening socket. Its file is removed on drop.
#[derive(Debug)]
pub struct ControlSocket {
    listener: std::os::unix::net::UnixListener,
    path: PathBuf,
    _lock: Lock,
}

impl ControlSocket {
    /// Listens at `path`. Replaces a socket that a crashed daemon left there.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn open(path: &Path) -> Result<Self, SocketError> {
        let failed = |error| SocketError::Io { path: path.to_owned(), error };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|error| SocketError::Io { path: folder.to_owned(), error })?;
        }
        if let Ok(existing) = fs::symlink_metadata(path) {
            if !existing.file_type().is_socket() {
                return Err(SocketError::NotASocket { path: path.to_owned() });
            }
            // A daemon of an earlier version has no lock.
            if let Some(process) = process_at(path) {
                return Err(SocketError::InUse { path: path.to_owned(), process: Some(process) });
            }
        }
        let lock = Lock::take(path)?;
        // The socket gets its name after its mode, so that no other user can connect in between.
        let temporary = path.with_extension(format!("{}.new", std::process::id()));
        let open = || {
            let listener = std::os::unix::net::UnixListener::bind(&temporary)?;
            fs::set_permissions(&temporary, fs::Permissions::from_mode(MODE))?;
            listener.set_nonblocking(true)?;
            fs::rename(&temporary, path)?;
            Ok(listener)
        };
        let listener = open().map_err(|error| {
            // It may not exist.
            let _ = fs::remove_file(&temporary);
            failed(error)
        })?;
        Ok(Self { listener, path: path.to_owned(), _lock: lock })
    }

    /// Serves requests until the runtime ends.
    ///
    /// # Errors
    /// When the runtime cannot poll the socket.
    pub async fn serve(self, control: Control) -> io::Result<()> {
        let listener = UnixListener::from_std(self.listener.try_clone()?)?;
        let mut connections = OperatorConnections::default();
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let control = control.clone();
                    let exchange = async move {
                        let answer = async |request| control.answer(request).await;
                        if let Err(error) = handle(stream, IO_TIMEOUT, answer).await {
                            tracing::debug!(target: target::CONTROL, %error, "control connection failed");
                        }
                    };
                    connections.serve(EXCHANGE_TIMEOUT, exchange).await;
                }
                Err(error) => {
                    tracing::debug!(target: target::CONTROL, %error, "accepting a control connection failed; retrying");
                    tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                }
            }
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // Another daemon cannot have replaced it: `open` returns an error while this one listens.
        let _ = fs::remove_file(&self.path);
    }
}

/// The process that listens on a socket.
fn process_at(path: &Path) -> Option<i32> {
    let stream = std::os::unix::net::UnixStream::connect(path).ok()?;
    let peer = rustix::net::sockopt::socket_peercred(stream).ok()?;
    Some(peer.pid.as_raw_nonzero().get())
}

/// Held as long as the daemon runs, so that of two that start at once one gets the socket. The kernel
/// releases it when the process ends in any way. The file is removed on drop.
#[derive(Debug)]
struct Lock {
    _file: File,
    path: PathBuf,
}

impl Lock {
    /// Takes the lock of a socket, in a file beside it.
    fn take(socket: &Path) -> Result<Self, SocketError> {
        let mut path = socket.to_owned().into_os_string();
        path.push(".lock");
        let path = PathBuf::from(path);
        let failed = |error| SocketError::Io { path: path.clone(), error };
        loop {
            let mut options = File::options();
            let options = options.write(true).create(true).truncate(false).mode(MODE);
            let file = options.open(&path).map_err(failed)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    return Err(SocketError::InUse { path: socket.to_owned(), process: process_at(socket) });
                }
                Err(error) => return Err(failed(error.into())),
            }
            // A daemon that has just ended may have removed the file between the two calls.
            let locked = file.metadata().map_err(failed)?;
            if fs::metadata(&path)
                .is_ok_and(|there| (there.dev(), there.ino()) == (locked.dev(), locked.ino()))
            {
                return Ok(Self { _file: file, path });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is locked.
        let _ = fs::remove_file(&self.path);
    }
}

/// Reads one request and writes its reply. The client may take `io_timeout` for each.
async fn handle(
    mut stream: UnixStream,
    io_timeout: Duration,
    answer: impl AsyncFnOnce(Request) -> Reply,
) -> io::Result<()> {
    let mut line = Vec::new();
    let read_request = async {
        let (read, _) = stream.split();
        BufReader::new(read.take(MAX_REQUEST_BYTES)).read_until(b'\n', &mut line).await
    };
    timeout(io_timeout, read_request).await??;
    let reply = match serde_json::from_slice(&line) {
        Ok(request) => answer(request).await,
        Err(error) => Reply::Error(format!("not understood: {error}")),
    };
    let mut text = serde_json::to_vec(&reply)?;
    text.push(b'\n');
    timeout(io_timeout, stream.write_all(&text)).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_is_private_and_removed_on_drop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/admin.sock");
        let socket = ControlSocket::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
        let files = || fs::read_dir(path.parent().unwrap()).unwrap().count();
        // With its lock.
        assert_eq!(files(), 2);
        let error = ControlSocket::open(&path).unwrap_err().to_string();
        let own = format!("another injector (process {}) runs with this admin.socket", std::process::id());
        assert!(error.contains(&own), "{error}");
        drop(socket);
        assert_eq!(files(), 0);
    }

    #[test]
    fn of_two_daemons_that_start_at_once_one_gets_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        // It holds the lock, and does not listen yet.
        let lock = Lock::take(&path).unwrap();
        let error = ControlSocket::open(&path).unwrap_err();
        assert!(matches!(error, SocketError::InUse { process: None, .. }), "{error}");
        drop(lock);
        // Killed: the file is left, and not locked.
        fs::write(dir.path().join("admin.sock.lock"), "").unwrap();
        let opened = std::thread::scope(|scope| {
            let start = || scope.spawn(|| ControlSocket::open(&path));
            let started: Vec<_> = (0..8).map(|_| start()).collect();
            started.into_iter().map(|started| started.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(opened.iter().filter(|opened| opened.is_ok()).count(), 1);
    }

    /// Handles a client that has sent this, and that reads nothing. The answer takes more than a socket's
    /// buffers.
    async fn handled(sent: &[u8]) -> io::Result<()> {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(sent).await.unwrap();
        let answer = async |_| Reply::Error("x".repeat(8 << 20));
        let handled = handle(server, Duration::from_millis(20), answer);
        timeout(Duration::from_secs(10), handled).await.expect("the client holds the connection")
    }

    #[tokio::test]
    async fn a_client_that_sends_or_reads_nothing_is_given_up() {
        for sent in [&b""[..], b"{\"command\"", b"{\"command\":\"status\"}\n", b"nonsense\n"] {
            let outcome = handled(sent).await;
            let timed_out = outcome.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut);
            // The answer to nonsense is short.
            assert_eq!(timed_out, sent != b"nonsense\n", "{outcome:?}");
        }
    }

    #[test]
    fn stale_socket_is_replaced_and_other_files_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(ControlSocket::open(&path).unwrap());
        fs::write(&path, "mine").unwrap();
        assert!(matches!(ControlSocket::open(&path), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }
}
