//! Typed access to the maps of the splice engine. The kernel half is
//! `injector-ebpf/src/splice/maps.rs`.

use std::{
    os::fd::{AsFd as _, AsRawFd},
    sync::Mutex,
};

use aya::{
    Ebpf,
    maps::{HashMap, MapData, MapError, PerCpuArray, RingBuf, SkStorage, SockHash},
};
use injector_common::{
    SeqNumber,
    splice::{Counter, Credit, Flow, Header, PeerIsn},
};

use crate::{
    engine::bpf::{LoadError, MapPool, take_data, take_map as take},
    os::mmap::MmapArray,
};

type Sockets = MapPool<SockHash<MapData, u64>>;

pub(super) struct Maps {
    pub(super) inject: Sockets,
    pub(super) verdict: Sockets,
    targets: Sockets,
    headers: MapPool<SkStorage<MapData, Header>>,
    flows: MapPool<HashMap<MapData, u64, Flow>>,
    peer_isns: MmapArray,
    /// Kept open because programs that are loaded later refer to the map by its descriptor.
    _peer_isns: MapData,
    credit: MapPool<HashMap<MapData, u64, Credit>>,
    counters: PerCpuArray<MapData, u64>,
    pub(super) backlog_events: Mutex<Option<RingBuf<MapData>>>,
}

impl Maps {
    pub(super) fn take(programs: &mut Ebpf) -> Result<Self, LoadError> {
        let array = take_data(programs, "PEER_ISNS")?;
        let words = MmapArray::of(array.fd().as_fd(), PeerIsn::COUNT as usize);
        let peer_isns = words.map_err(|error| LoadError::Memory { map: "PEER_ISNS", error })?;
        Ok(Self {
            inject: MapPool::take(programs, "INJECT")?,
            verdict: MapPool::take(programs, "VERDICT")?,
            targets: MapPool::take(programs, "TARGETS")?,
            headers: MapPool::take(programs, "HEADERS")?,
            flows: MapPool::take(programs, "FLOWS")?,
            peer_isns,
            _peer_isns: array,
            credit: MapPool::take(programs, "CREDIT")?,
            counters: take(programs, "COUNTERS")?,
            backlog_events: Mutex::new(Some(take(programs, "BACKLOG_EVENTS")?)),
        })
    }

    pub(super) fn store_header(&self, socket: &impl AsRawFd, header: &Header) -> Result<(), MapError> {
        self.headers.get().insert(socket, header, 0)
    }

    pub(super) fn header(&self, socket: &impl AsRawFd) -> Result<Header, MapError> {
        self.headers.get().get(socket, 0)
    }

    pub(super) fn watch_first_message(&self, cookie: u64, socket: &impl AsRawFd) -> Result<(), MapError> {
        self.inject.get().insert(cookie, socket.as_raw_fd(), NOEXIST)
    }

    pub(super) fn unwatch_first_message(&self, cookie: u64) -> Result<(), MapError> {
        self.inject.get().remove(&cookie)
    }

    pub(super) fn peer_isn(&self, cookie: u64) -> Option<u32> {
        let word = self.peer_isns.get(PeerIsn::index(cookie) as usize)?;
        PeerIsn(word).sequence(cookie)
    }

    pub(super) fn add_flow(&self, source: u64, next: SeqNumber) -> Result<(), MapError> {
        self.flows.get().insert(source, Flow::new(next), NOEXIST)
    }

    pub(super) fn flow(&self, source: u64) -> Result<Flow, MapError> {
        self.flows.get().get(&source, 0)
    }

    pub(super) fn remove_flow(&self, source: u64) -> Result<(), MapError> {
        self.flows.get().remove(&source)
    }

    pub(super) fn set_credit(&self, source: u64, credit: Credit) -> Result<(), MapError> {
        self.credit.get().insert(source, credit, 0)
    }

    pub(super) fn remove_credit(&self, source: u64) -> Result<(), MapError> {
        self.credit.get().remove(&source)
    }

    pub(super) fn add_target(&self, source: u64, target: &impl AsRawFd) -> Result<(), MapError> {
        self.targets.get().insert(source, target.as_raw_fd(), NOEXIST)
    }

    pub(super) fn remove_target(&self, source: u64) -> Result<(), MapError> {
        self.targets.get().remove(&source)
    }

    pub(super) fn add_source(&self, cookie: u64, socket: &impl AsRawFd) -> Result<(), MapError> {
        self.verdict.get().insert(cookie, socket.as_raw_fd(), NOEXIST)
    }

    pub(super) fn remove_source(&self, cookie: u64) -> Result<(), MapError> {
        self.verdict.get().remove(&cookie)
    }

    pub(super) fn counter(&self, counter: Counter) -> u64 {
        self.counters.get(&(counter as u32), 0).map_or(0, |values| values.iter().sum())
    }

    /// The number of sockets and flows in all maps.
    pub(super) fn entries(&self) -> Result<usize, MapError> {
        let mut entries = 0;
        for sockets in [&self.inject, &self.verdict, &self.targets] {
            for key in sockets.get().keys() {
                key?;
                entries += 1;
            }
        }
        for key in self.flows.get().keys() {
            key?;
            entries += 1;
        }
        for key in self.credit.get().keys() {
            key?;
            entries += 1;
        }
        Ok(entries)
    }

    /// Updates a map as a session does, under a key that no socket has: cookies start at 1.
    pub(super) fn probe(&self) -> Result<(), MapError> {
        self.add_flow(0, SeqNumber(0))?;
        self.remove_flow(0)
    }
}

/// `BPF_NOEXIST`: a cookie belongs to one socket for good, so an existing entry is a bug of the
/// daemon.
const NOEXIST: u64 = 1;
