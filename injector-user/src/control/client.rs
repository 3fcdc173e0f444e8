//! The client's end of the control socket.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use thiserror::Error;

pub use super::show::show;
use super::wire::{Answer, Reply, Request};

/// Longer than every command takes: even a reload resolves no names.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a request has no answer.
#[derive(Debug, Error)]
pub enum ClientError {
    /// No daemon listens there.
    #[error("{path}: {error}: {}", advice(.error))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The error of the system call.
        error: io::Error,
    },
    /// The connection failed.
    #[error("{path}: {error}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// The error of the system call.
        error: io::Error,
    },
    /// The reply is not valid, as from a daemon of another version.
    #[error("{path}: cannot parse the reply ({error}): is the daemon of another version?")]
    InvalidReply {
        /// The socket.
        path: PathBuf,
        /// The error of the parser.
        error: serde_json::Error,
    },
    /// The daemon rejected the request.
    #[error("{0}")]
    Rejected(String),
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            "no injector answers there: is it running, with [admin] socket in its configuration, and is this that socket \
             (--socket)?"
        }
        io::ErrorKind::PermissionDenied => {
            "only the user that the injector runs as, and root, may give commands"
        }
        _ => "cannot connect",
    }
}

/// Sends a request to the daemon that listens at `socket`, and returns its answer.
///
/// # Errors
/// [`ClientError`].
pub fn send(socket: &Path, request: &Request) -> Result<Answer, ClientError> {
    let path = || socket.to_owned();
    let mut stream =
        UnixStream::connect(socket).map_err(|error| ClientError::Connect { path: path(), error })?;
    let mut exchange = || -> io::Result<String> {
        stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
        stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        stream.write_all(line.as_bytes())?;
        let mut answer = String::new();
        BufReader::new(&stream).read_line(&mut answer)?;
        Ok(answer)
    };
    let answer = exchange().map_err(|error| ClientError::Io { path: path(), error })?;
    match serde_json::from_str(&answer).map_err(|error| ClientError::InvalidReply { path: path(), error })? {
        Reply::Ok(answer) => Ok(answer),
        Reply::Error(reason) => Err(ClientError::Rejected(reason)),
    }
}
