//! What is attached to devices, and programs of other tools there.

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;

use anyhow::Context;

use super::program;
use super::syscall::{Attributes, call, descriptor};

/// Commands of bpf(2), include/uapi/linux/bpf.h.
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;
const BPF_LINK_DETACH: libc::c_long = 34;

const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;

/// A program of another tool at the tcx ingress of a device, in front of all others; detached on
/// drop.
#[derive(Debug)]
pub struct ForeignProgram {
    _link: OwnedFd,
}

impl ForeignProgram {
    /// Attaches one that accepts every packet (`TC_ACT_OK`). Call it in the device's namespace.
    ///
    /// # Errors
    /// As bpf(2), and when there is no such device.
    pub fn accepting(device: &str) -> anyhow::Result<Self> {
        const BPF_F_BEFORE: u32 = 1 << 3;
        const TC_ACT_OK: u64 = 0;
        let program = program::answering(BPF_PROG_TYPE_SCHED_CLS, BPF_TCX_INGRESS, TC_ACT_OK)?;
        let mut create = Attributes::new()
            .fd(0, &program)
            .u32(4, index(device)?)
            .u32(8, BPF_TCX_INGRESS)
            .u32(12, BPF_F_BEFORE);
        let link = descriptor(BPF_LINK_CREATE, &mut create).context("attaching a program of our own")?;
        Ok(Self { _link: link })
    }

    /// Attaches an XDP program that passes every packet. Call it in the device's namespace.
    ///
    /// # Errors
    /// As bpf(2), and when there is no such device.
    pub fn passing_xdp(device: &str) -> anyhow::Result<Self> {
        const BPF_PROG_TYPE_XDP: u32 = 6;
        const BPF_XDP: u32 = 37;
        const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
        const XDP_PASS: u64 = 2;
        let program = program::answering(BPF_PROG_TYPE_XDP, BPF_XDP, XDP_PASS)?;
        let mut create = Attributes::new()
            .fd(0, &program)
            .u32(4, index(device)?)
            .u32(8, BPF_XDP)
            .u32(12, XDP_FLAGS_SKB_MODE);
        let link = descriptor(BPF_LINK_CREATE, &mut create).context("attaching a program of our own")?;
        Ok(Self { _link: link })
    }
}

/// The ids of the links at the tcx ingress of a device, in the order in which their programs run.
/// Call it in the device's namespace.
///
/// # Errors
/// As bpf(2), and when there is no such device.
pub fn tcx_links(device: &str) -> anyhow::Result<Vec<u32>> {
    const MOST: usize = 64;
    let (mut programs, mut links) = ([0_u32; MOST], [0_u32; MOST]);
    let mut query = Attributes::new()
        .u32(0, index(device)?)
        .u32(4, BPF_TCX_INGRESS)
        .pointer(16, programs.as_mut_ptr().cast_const().cast())
        .u32(24, u32::try_from(MOST)?)
        .pointer(40, links.as_mut_ptr().cast_const().cast());
    match call(BPF_PROG_QUERY, &mut query) {
        Ok(_) => {}
        // Nothing was ever attached there.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Vec::new()),
        Err(error) => return Err(error).context("asking about tcx"),
    }
    let count = query.0.get(24..28).and_then(|count| count.try_into().ok()).map_or(0, u32::from_ne_bytes);
    Ok(links.into_iter().take(usize::try_from(count)?).collect())
}

/// Detaches a link, as an administrator does.
///
/// # Errors
/// As bpf(2).
pub fn detach_link(id: u32) -> anyhow::Result<()> {
    let link =
        descriptor(BPF_LINK_GET_FD_BY_ID, &mut Attributes::new().u32(0, id)).context("opening a link")?;
    call(BPF_LINK_DETACH, &mut Attributes::new().fd(0, &link)).context("detaching a link")?;
    Ok(())
}

fn index(device: &str) -> anyhow::Result<u32> {
    let name = CString::new(device)?;
    // SAFETY: a string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    anyhow::ensure!(index != 0, "no device {device}: {}", io::Error::last_os_error());
    Ok(index)
}
