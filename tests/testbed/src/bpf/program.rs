//! Programs.

use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, bail};

use super::fdinfo::descriptors_with;
use super::syscall::{Attributes, call, descriptor};

/// Commands of bpf(2), include/uapi/linux/bpf.h.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;

/// A program of a running process.
#[derive(Debug)]
pub struct Program(OwnedFd);

/// What running a program gave.
#[derive(Clone, Copy, Debug)]
pub struct Ran {
    /// What it returned.
    pub answer: u32,
    /// The mean time of one run.
    pub duration: Duration,
}

impl Program {
    /// The program called `name` that the process `pid` has open, or has attached by a link.
    ///
    /// # Errors
    /// When it has none.
    pub fn of(pid: u32, name: &str) -> anyhow::Result<Self> {
        for id in descriptors_with(pid, "prog_id")?.into_keys() {
            let program = descriptor(BPF_PROG_GET_FD_BY_ID, &mut Attributes::new().u32(0, id));
            let program = Self(program.with_context(|| format!("opening BPF program {id}"))?);
            if program.name()? == name {
                return Ok(program);
            }
        }
        bail!("process {pid} has no program {name}")
    }

    fn name(&self) -> anyhow::Result<String> {
        /// Size of `struct bpf_prog_info` up to and including the name, and its offset.
        const INFO: u32 = 80;
        const NAME: usize = 64;
        let mut info = [0_u8; INFO as usize];
        let mut query =
            Attributes::new().fd(0, &self.0).u32(4, INFO).pointer(8, info.as_mut_ptr().cast_const());
        call(BPF_OBJ_GET_INFO_BY_FD, &mut query).context("asking about a program")?;
        let name = info.get(NAME..).unwrap_or_default().split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(name).into_owned())
    }

    /// Runs it this often with a packet, which belongs to the loopback device of the calling
    /// thread's namespace.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn test_run(&self, packet: &[u8], times: u32) -> anyhow::Result<Ran> {
        let mut run = Attributes::new()
            .fd(0, &self.0)
            .u32(8, u32::try_from(packet.len())?)
            .pointer(16, packet.as_ptr())
            .u32(32, times);
        call(BPF_PROG_TEST_RUN, &mut run).context("running a program")?;
        let [answer, nanos] = [4, 36].map(|at| {
            let bytes = run.0.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u32::from_ne_bytes)
        });
        Ok(Ran { answer, duration: Duration::from_nanos(nanos.into()) })
    }
}

/// A program that always returns this.
pub(super) fn answering(kind: u32, attach_type: u32, answer: u64) -> anyhow::Result<OwnedFd> {
    // r0 = answer; exit
    let program: [u64; 2] = [answer << 32 | 0x00b7, 0x0095];
    let licence = c"GPL";
    let mut load = Attributes::new()
        .u32(0, kind)
        .u32(4, 2)
        .pointer(8, program.as_ptr().cast())
        .pointer(16, licence.as_ptr().cast())
        .u32(68, attach_type);
    descriptor(BPF_PROG_LOAD, &mut load).context("loading a program of our own")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_of_this_process_is_run() {
        const BPF_PROG_TYPE_XDP: u32 = 6;
        const XDP_DROP: u64 = 1;
        let Ok(_program) = answering(BPF_PROG_TYPE_XDP, 0, XDP_DROP) else {
            eprintln!("skipped: may not load BPF programs");
            return;
        };
        // It has no name.
        let found = Program::of(std::process::id(), "").unwrap();
        assert_eq!(found.test_run(&[0; 64], 10).unwrap().answer, 1);
        assert!(Program::of(std::process::id(), "guard").is_err());
    }
}
