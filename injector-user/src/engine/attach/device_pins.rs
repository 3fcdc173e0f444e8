//! The pin that each device has: of a link, or of a filter's program.

use std::{
    fs, io,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use crate::os::bpf::{self, Object};

/// The name of a device's pin. Namespaces may share a BPF file system.
pub(in crate::engine) fn pin_name(namespace: u64, device: u32) -> String {
    format!("{namespace}-{device}")
}

/// The inode of the calling thread's network namespace.
pub(in crate::engine) fn namespace() -> io::Result<u64> {
    Ok(rustix::fs::stat("/proc/thread-self/ns/net")?.st_ino)
}

/// Pins an object in the place of what was pinned there.
pub(in crate::engine) fn replace_pin(object: BorrowedFd<'_>, pin: &Path) -> io::Result<()> {
    fs::rename(pin_beside(object, pin)?, pin)
}

/// Pins an object under a name beside the one that it is to get.
pub(in crate::engine) fn pin_beside(object: BorrowedFd<'_>, pin: &Path) -> io::Result<PathBuf> {
    // A BPF file system allows no dots in names.
    let mut new = pin.to_owned().into_os_string();
    new.push("-new");
    let new = PathBuf::from(new);
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    bpf::pin(object, &new)?;
    Ok(new)
}

/// Removes the pin, and detaches the link if it is one; `false` if there is none.
pub(in crate::engine) fn remove(pin: &Path) -> io::Result<bool> {
    detach(pin)?;
    match fs::remove_file(pin) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        removed => removed.map(|()| true),
    }
}

/// Detaches the link that is pinned there, if one is. The kernel does that itself for a link
/// without pins, but later.
pub(in crate::engine) fn detach(pin: &Path) -> io::Result<()> {
    match bpf::open_pin(pin) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(object) if bpf::object(object.as_fd())? == Some(Object::Link) => bpf::detach_link(object.as_fd()),
        opened => opened.map(drop),
    }
}
