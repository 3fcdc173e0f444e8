//! The system call bpf(2).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `union bpf_attr`.
pub(super) struct Attributes(pub(super) [u8; 128]);

impl Attributes {
    pub(super) fn new() -> Self {
        Self([0; 128])
    }

    pub(super) fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        if let Some(place) = self.0.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
        self
    }

    pub(super) fn u32(self, at: usize, value: u32) -> Self {
        self.put(at, &value.to_ne_bytes())
    }

    pub(super) fn fd(self, at: usize, fd: &OwnedFd) -> Self {
        self.put(at, &fd.as_raw_fd().to_ne_bytes())
    }

    pub(super) fn pointer(self, at: usize, pointer: *const u8) -> Self {
        self.put(at, &(pointer as u64).to_ne_bytes())
    }
}

pub(super) fn call(command: libc::c_long, attributes: &mut Attributes) -> io::Result<i32> {
    let pointer = attributes.0.as_mut_ptr();
    // SAFETY: the attributes are a complete bpf_attr as far as this kernel reads (unknown bytes are
    // zero), and what they point to outlives the call in every caller.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, pointer, attributes.0.len()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(result).map_err(io::Error::other) }
}

pub(super) fn descriptor(command: libc::c_long, attributes: &mut Attributes) -> io::Result<OwnedFd> {
    let fd = call(command, attributes)?;
    // SAFETY: these commands return a descriptor that this process owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
