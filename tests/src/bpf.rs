//! Spoiling the maps of a running daemon from outside, as the kernel allows to root: real failures of the real
//! mechanism, without a hook in the daemon.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, bail};

/// Commands of bpf(2), include/uapi/linux/bpf.h.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_MAP_GET_FD_BY_ID: libc::c_long = 14;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_FREEZE: libc::c_long = 22;

const BPF_PROG_TYPE_SK_MSG: u32 = 16;
const BPF_SK_MSG_VERDICT: u32 = 7;

/// A map of a running process.
#[derive(Debug)]
pub struct DaemonMap(OwnedFd);

impl DaemonMap {
    /// The map called `name` of the process `pid`.
    ///
    /// # Errors
    /// When the process has no such map.
    pub fn of(pid: u32, name: &str) -> anyhow::Result<Self> {
        for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
            // A descriptor may be closed meanwhile.
            let Ok(info) = fs::read_to_string(entry?.path()) else { continue };
            let id = info.lines().find_map(|line| line.strip_prefix("map_id:")?.trim().parse::<u32>().ok());
            let Some(id) = id else { continue };
            let map = Self(descriptor(BPF_MAP_GET_FD_BY_ID, &mut Attributes::new().u32(0, id))?);
            if map.name()? == name {
                return Ok(map);
            }
        }
        bail!("process {pid} has no map {name}")
    }

    /// From now on user space cannot change it.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn freeze(&self) -> anyhow::Result<()> {
        call(BPF_MAP_FREEZE, &mut Attributes::new().fd(0, &self.0)).context("freezing a map")?;
        Ok(())
    }

    /// Has every message dropped that is sent on a socket in this map from now on, in place of its program.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn drop_messages(&self) -> anyhow::Result<()> {
        // r0 = SK_DROP; exit
        let program: [u64; 2] = [0x0000_0000_0000_00b7, 0x0000_0000_0000_0095];
        let licence = c"GPL";
        let mut load = Attributes::new()
            .u32(0, BPF_PROG_TYPE_SK_MSG)
            .u32(4, 2)
            .pointer(8, program.as_ptr().cast())
            .pointer(16, licence.as_ptr().cast())
            .u32(68, BPF_SK_MSG_VERDICT);
        let program = descriptor(BPF_PROG_LOAD, &mut load).context("loading a program that drops")?;
        let mut attach = Attributes::new().fd(0, &self.0).fd(4, &program).u32(8, BPF_SK_MSG_VERDICT);
        call(BPF_PROG_ATTACH, &mut attach).context("attaching a program that drops")?;
        Ok(())
    }

    fn name(&self) -> anyhow::Result<String> {
        /// Of `bpf_map_info`: its size up to and with the name, and where the name is.
        const INFO: u32 = 40;
        const NAME: usize = 24;
        let mut info = [0_u8; INFO as usize];
        let mut query =
            Attributes::new().fd(0, &self.0).u32(4, INFO).pointer(8, info.as_mut_ptr().cast_const());
        call(BPF_OBJ_GET_INFO_BY_FD, &mut query).context("asking for a map's name")?;
        let name = info.get(NAME..).unwrap_or_default();
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        Ok(String::from_utf8_lossy(name.get(..end).unwrap_or_default()).into_owned())
    }
}

/// `union bpf_attr`.
struct Attributes([u8; 128]);

impl Attributes {
    fn new() -> Self {
        Self([0; 128])
    }

    fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        if let Some(place) = self.0.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
        self
    }

    fn u32(self, at: usize, value: u32) -> Self {
        self.put(at, &value.to_ne_bytes())
    }

    fn fd(self, at: usize, fd: &OwnedFd) -> Self {
        self.put(at, &fd.as_raw_fd().to_ne_bytes())
    }

    fn pointer(self, at: usize, pointer: *const u8) -> Self {
        self.put(at, &(pointer as u64).to_ne_bytes())
    }
}

fn call(command: libc::c_long, attributes: &mut Attributes) -> io::Result<i32> {
    let pointer = attributes.0.as_mut_ptr();
    // SAFETY: the attributes are a whole bpf_attr as far as this kernel reads (unknown bytes are zero), and what they
    // point to outlives the call in every caller.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, pointer, attributes.0.len()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(result).map_err(io::Error::other) }
}

fn descriptor(command: libc::c_long, attributes: &mut Attributes) -> io::Result<OwnedFd> {
    let fd = call(command, attributes)?;
    // SAFETY: these commands return a descriptor that is ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
