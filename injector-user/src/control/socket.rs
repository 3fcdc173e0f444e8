//! The daemon's end of the control socket.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use thiserror::Error;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    time::timeout,
};

use super::{handler::Control, wire::Reply};
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
    #[error("{path}: another injector already listens on this socket: give each its own (admin.socket)")]
    InUse {
        /// The socket.
        path: PathBuf,
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
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(SocketError::InUse { path: path.to_owned() });
            }
        }
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
        Ok(Self { listener, path: path.to_owned() })
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
                        if let Err(error) = handle(stream, &control).await {
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

/// Reads one request and writes its reply.
async fn handle(mut stream: UnixStream, control: &Control) -> io::Result<()> {
    let mut line = Vec::new();
    let read_request = async {
        let (read, _) = stream.split();
        BufReader::new(read.take(MAX_REQUEST_BYTES)).read_until(b'\n', &mut line).await
    };
    timeout(IO_TIMEOUT, read_request).await??;
    let reply = match serde_json::from_slice(&line) {
        Ok(request) => control.answer(request).await,
        Err(error) => Reply::Error(format!("not understood: {error}")),
    };
    let mut text = serde_json::to_vec(&reply)?;
    text.push(b'\n');
    timeout(IO_TIMEOUT, stream.write_all(&text)).await?
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
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        assert!(matches!(ControlSocket::open(&path), Err(SocketError::InUse { .. })));
        drop(socket);
        assert!(!path.exists());
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
