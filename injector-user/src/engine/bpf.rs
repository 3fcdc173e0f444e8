//! What both kernel engines use from aya: programs and maps by name, program reports, error texts.

use std::{
    os::fd::AsFd as _,
    sync::{Mutex, MutexGuard},
};

use aya::{
    Ebpf, EbpfError,
    maps::{Map, MapData, MapError},
    programs::{Program, ProgramError},
    sys::SyscallError,
};
use thiserror::Error;

use crate::engine::check::ProgramReport;

/// Why programs or maps cannot be loaded or used.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The kernel rejected the object: missing capabilities, or a feature that it does not have.
    #[error("loading the BPF programs: {}{}", chain(.0), advice(.0))]
    Load(#[from] EbpfError),
    /// A program was rejected, by the verifier or at attachment.
    #[error("program {program}: {}", refusal(.error))]
    Program {
        /// Its name.
        program: &'static str,
        /// The kernel's error.
        error: ProgramError,
    },
    /// A map differs from what the daemon expects, or an operation on it failed.
    #[error("map {map}: {}", chain(.error))]
    Map {
        /// Its name.
        map: &'static str,
        /// The cause.
        error: MapError,
    },
    /// A pinned map that cannot be used.
    #[error("map {map}: {error}")]
    Pin {
        /// Its name.
        map: &'static str,
        /// The kernel's error.
        error: std::io::Error,
    },
    /// A map whose memory the daemon cannot map.
    #[error("map {map}: mapping its memory failed: {error}; memory-mapped arrays need Linux 5.5")]
    Memory {
        /// Its name.
        map: &'static str,
        /// The kernel's error.
        error: std::io::Error,
    },
    /// The object in this binary lacks a part: daemon and programs were not built together.
    #[error("this binary's BPF object has no {0}; build it again with `cargo xtask build`")]
    Missing(&'static str),
}

/// Finds a program of the object.
pub(crate) fn program<'a, P>(programs: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, LoadError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = programs.program_mut(name).ok_or(LoadError::Missing(name))?;
    program.try_into().map_err(|error| LoadError::Program { program: name, error })
}

/// Takes a map out of the object.
pub(crate) fn take_map<M>(programs: &mut Ebpf, map: &'static str) -> Result<M, LoadError>
where
    M: TryFrom<Map, Error = MapError>,
{
    let data = programs.take_map(map).ok_or(LoadError::Missing(map))?;
    data.try_into().map_err(|error| LoadError::Map { map, error })
}

/// Handles to one map whose entries many threads insert and remove. aya needs exclusive access for
/// that, and a thread that waits for another thread's bpf(2) call sleeps and is woken. With several
/// handles, a thread takes the first free one.
pub(crate) struct MapPool<M> {
    first: Mutex<M>,
    others: Box<[Mutex<M>]>,
}

impl<M> MapPool<M> {
    /// Each handle takes a descriptor.
    const MAX: usize = 8;

    /// Takes a map out of the object, with one handle per processor, at most [`MapPool::MAX`]. The
    /// first handle is the object's own: programs that are loaded later refer to the map by its
    /// descriptor.
    pub(crate) fn take(programs: &mut Ebpf, map: &'static str) -> Result<Self, LoadError>
    where
        M: TryFrom<Map, Error = MapError>,
    {
        let failed = |error| LoadError::Map { map, error };
        let data = take_data(programs, map)?;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let others: Result<_, _> = (1..processors.min(Self::MAX)).map(|_| another(&data)).collect();
        Ok(Self { others: others.map_err(failed)?, first: handle(data).map_err(failed)? })
    }

    /// Locks the first free handle, or waits for the first.
    pub(crate) fn get(&self) -> MutexGuard<'_, M> {
        let mut all = std::iter::once(&self.first).chain(&self.others);
        all.find_map(|handle| handle.try_lock().ok()).unwrap_or_else(|| lock(&self.first))
    }
}

fn another<M: TryFrom<Map, Error = MapError>>(data: &MapData) -> Result<Mutex<M>, MapError> {
    let cloned = data.fd().as_fd().try_clone_to_owned();
    let descriptor = cloned.map_err(|io_error| SyscallError { call: "fcntl", io_error })?;
    handle(MapData::from_fd(descriptor)?)
}

fn handle<M: TryFrom<Map, Error = MapError>>(data: MapData) -> Result<Mutex<M>, MapError> {
    Map::from_map_data(data).and_then(M::try_from).map(Mutex::new)
}

/// Takes a map of any supported type out of the object. Keep it until the programs are loaded: they
/// refer to it by its descriptor.
pub(crate) fn take_data(programs: &mut Ebpf, map: &'static str) -> Result<MapData, LoadError> {
    match programs.take_map(map).ok_or(LoadError::Missing(map))? {
        Map::Array(data) | Map::HashMap(data) | Map::SockHash(data) | Map::SkStorage(data) => Ok(data),
        _ => Err(LoadError::Missing(map)),
    }
}

/// The loaded programs and their verifier costs.
pub(crate) fn reports(programs: &Ebpf) -> Vec<ProgramReport> {
    programs
        .programs()
        .filter_map(|(name, program)| {
            let info = program.info().ok()?;
            let verified_instructions = info.verified_instruction_count();
            Some(ProgramReport { name: name.to_owned(), verified_instructions })
        })
        .collect()
}

/// Locks, even if a thread panicked while it held the lock.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// An error with all its causes, without repeating a cause that the error already prints.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

/// Why a program was rejected, with the last two lines of the verifier's log, which name the fault.
fn refusal(error: &ProgramError) -> String {
    let ProgramError::LoadError { io_error, verifier_log } = error else { return chain(error) };
    let log = verifier_log.to_string();
    let statistics = ["verification time", "stack depth", "processed"];
    let lines = log.lines().filter(|line| !statistics.iter().any(|start| line.starts_with(start)));
    let last: Vec<_> = lines.filter(|line| !line.is_empty()).collect();
    let last = last.split_at_checked(last.len().saturating_sub(2)).map_or(&last[..], |(_, last)| last);
    format!("{io_error}; the verifier's last lines: {}", last.join("; "))
}

fn advice(error: &EbpfError) -> &'static str {
    let text = chain(error);
    if text.contains("os error 1)") {
        " (run as root, or with CAP_BPF and CAP_NET_ADMIN)"
    } else if text.contains("os error 12)") {
        " (not enough memory for the maps: lower limits.max_connections)"
    } else {
        ""
    }
}
