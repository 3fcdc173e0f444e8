//! The daemon's end of the socket.

use crate::telemetry::log::target;
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

/// For the operator alone.
const MODE: u32 = 0o600;
/// More than any request has.
const MAX_REQUEST_BYTES: u64 = 64 * 1024;
/// How long a client may take to ask, and to take its answer.
const IO_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no socket.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error("{path}: another injector already listens on this socket: give each its own (admin.socket)")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// A file stands in the way.
    #[error("{path}: the file exists and is not a socket: remove it, or use another path (admin.socket)")]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The kernel refuses.
    #[error("{path}: {error}: admin.socket must be in a directory that the injector can write to")]
    Io {
        /// What it was about.
        path: PathBuf,
        /// What it said.
        error: io::Error,
    },
}

/// The socket; removed when dropped.
#[derive(Debug)]
pub struct ControlSocket {
    listener: std::os::unix::net::UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    /// Listens at `path`. What a daemon that crashed has left there is replaced.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn open(path: &Path) -> Result<Self, SocketError> {
        let failed = |error| SocketError::Io { path: path.to_owned(), error };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|error| SocketError::Io { path: folder.to_owned(), error })?;
        }
        if let Ok(there) = fs::symlink_metadata(path) {
            if !there.file_type().is_socket() {
                return Err(SocketError::NotASocket { path: path.to_owned() });
            }
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(SocketError::InUse { path: path.to_owned() });
            }
        }
        // Nobody can connect before the mode is right: it gets its name only then.
        let unnamed = path.with_extension(format!("{}.new", std::process::id()));
        let open = || {
            let listener = std::os::unix::net::UnixListener::bind(&unnamed)?;
            fs::set_permissions(&unnamed, fs::Permissions::from_mode(MODE))?;
            listener.set_nonblocking(true)?;
            fs::rename(&unnamed, path)?;
            Ok(listener)
        };
        let listener = open().map_err(|error| {
            // It may not be there.
            let _ = fs::remove_file(&unnamed);
            failed(error)
        })?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Answers until the runtime ends.
    ///
    /// # Errors
    /// When the runtime cannot poll the socket.
    pub async fn serve(self, control: Control) -> io::Result<()> {
        let listener = UnixListener::from_std(self.listener.try_clone()?)?;
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let control = control.clone();
                    tokio::spawn(async move {
                        if let Err(error) = handle(stream, &control).await {
                            tracing::debug!(target: target::CONTROL, %error, "control connection failed");
                        }
                    });
                }
                Err(error) => {
                    tracing::debug!(target: target::CONTROL, %error, "accepting a control connection failed; retrying");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // Unless another daemon has taken the name over meanwhile, which would have been told that it is taken.
        let _ = fs::remove_file(&self.path);
    }
}

async fn handle(mut stream: UnixStream, control: &Control) -> io::Result<()> {
    let mut line = Vec::new();
    let asked = async {
        let (read, _) = stream.split();
        BufReader::new(read.take(MAX_REQUEST_BYTES)).read_until(b'\n', &mut line).await
    };
    timeout(IO_TIMEOUT, asked).await??;
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
    fn the_socket_is_for_its_owner_and_goes_with_the_daemon() {
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
    fn what_a_crash_has_left_is_replaced_and_other_files_are_not() {
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
