//! The lock of the process that attaches a set of programs in a network namespace.

use std::{
    io,
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, Mode, OFlags};

/// Held by the process that attaches the programs in this network namespace and with these pins.
#[derive(Debug)]
pub(in crate::engine) struct Lock {
    _socket: UnixListener,
    _folder: Option<OwnedFd>,
}

/// What is locked.
#[derive(Debug)]
pub(in crate::engine) struct Name {
    /// The abstract socket that a daemon holds: such names belong to the network namespace, and are
    /// seen across containers that share it.
    pub(in crate::engine) socket: &'static [u8],
    /// The setting with the folder for pins.
    pub(in crate::engine) setting: &'static str,
}

/// Why a lock was not taken.
#[derive(Debug)]
pub(in crate::engine) enum LockError {
    /// Another process has it.
    Busy {
        /// Its process id, if it is in the same PID namespace.
        process: Option<i32>,
        /// What it shares with this process.
        place: String,
    },
    /// It cannot be taken.
    Folder {
        /// The folder, or what stands for it.
        path: PathBuf,
        /// The kernel's error.
        error: io::Error,
    },
}

impl Lock {
    /// Takes it.
    pub(in crate::engine) fn take(name: &Name, pin: &Path) -> Result<Self, LockError> {
        let namespace = Self::take_namespace(name)?;
        Ok(Self { _folder: Some(lock_folder(name, pin)?), ..namespace })
    }

    /// The same; that of the network namespace alone if the folder does not exist.
    pub(in crate::engine) fn take_existing(name: &Name, pin: &Path) -> Result<Self, LockError> {
        if pin.is_dir() { Self::take(name, pin) } else { Self::take_namespace(name) }
    }

    fn take_namespace(name: &Name) -> Result<Self, LockError> {
        let failed = |error| LockError::Folder { path: PathBuf::from("abstract socket"), error };
        let address = SocketAddr::from_abstract_name(name.socket).map_err(failed)?;
        let socket = UnixListener::bind_addr(&address).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => {
                let place = "in this network namespace".to_owned();
                LockError::Busy { process: process_of(&address), place }
            }
            _ => failed(error),
        })?;
        Ok(Self { _socket: socket, _folder: None })
    }
}

/// The process that listens there.
fn process_of(address: &SocketAddr) -> Option<i32> {
    let stream = UnixStream::connect_addr(address).ok()?;
    let peer = rustix::net::sockopt::socket_peercred(stream).ok()?;
    Some(peer.pid.as_raw_nonzero().get())
}

/// Locks a folder for pins, so that no daemon of another network namespace uses it too.
pub(in crate::engine) fn lock_folder(name: &Name, pin: &Path) -> Result<OwnedFd, LockError> {
    let failed = |error: rustix::io::Errno| LockError::Folder { path: pin.to_owned(), error: error.into() };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(pin, flags, Mode::empty()).map_err(failed)?;
    match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(folder),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let (pin, setting) = (pin.display(), name.setting);
            let place = format!(
                "with the pins in {pin}, perhaps in another network namespace (then set another {setting})"
            );
            Err(LockError::Busy { process: None, place })
        }
        Err(error) => Err(failed(error)),
    }
}
