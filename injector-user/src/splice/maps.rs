//! The maps of the splice engine, behind functions; their kernel side is `injector-ebpf/src/splice/maps.rs`.

use std::{os::fd::AsRawFd, sync::Mutex};

use aya::{
    Ebpf,
    maps::{HashMap, MapData, MapError, PerCpuArray, RingBuf, SkStorage, SockHash},
};
use injector_common::splice::{Counter, Credit, Flow, Header};

use super::Sockets;
use crate::bpf::{LoadError, lock, take_map as take};

pub(super) struct Maps {
    pub(super) inject: Sockets,
    pub(super) verdict: Sockets,
    targets: Sockets,
    headers: Mutex<SkStorage<MapData, Header>>,
    flows: Mutex<HashMap<MapData, u64, Flow>>,
    anchors: Mutex<HashMap<MapData, u64, u32>>,
    credit: Mutex<HashMap<MapData, u64, Credit>>,
    counters: PerCpuArray<MapData, u64>,
    pub(super) alarms: Mutex<Option<RingBuf<MapData>>>,
}

impl Maps {
    pub(super) fn take(programs: &mut Ebpf) -> Result<Self, LoadError> {
        Ok(Self {
            inject: Mutex::new(take::<SockHash<_, _>>(programs, "INJECT")?),
            verdict: Mutex::new(take::<SockHash<_, _>>(programs, "VERDICT")?),
            targets: Mutex::new(take::<SockHash<_, _>>(programs, "TARGETS")?),
            headers: Mutex::new(take::<SkStorage<_, _>>(programs, "HEADERS")?),
            flows: Mutex::new(take::<HashMap<_, _, _>>(programs, "FLOWS")?),
            anchors: Mutex::new(take::<HashMap<_, _, _>>(programs, "ANCHORS")?),
            credit: Mutex::new(take::<HashMap<_, _, _>>(programs, "CREDIT")?),
            counters: take(programs, "COUNTERS")?,
            alarms: Mutex::new(Some(take(programs, "ALARMS")?)),
        })
    }

    pub(super) fn store_header(&self, socket: &impl AsRawFd, header: &Header) -> Result<(), MapError> {
        lock(&self.headers).insert(socket, header, 0)
    }

    pub(super) fn header(&self, socket: &impl AsRawFd) -> Result<Header, MapError> {
        lock(&self.headers).get(socket, 0)
    }

    pub(super) fn watch_first_message(&self, cookie: u64, socket: &impl AsRawFd) -> Result<(), MapError> {
        lock(&self.inject).insert(cookie, socket.as_raw_fd(), NOEXIST)
    }

    pub(super) fn unwatch_first_message(&self, cookie: u64) -> Result<(), MapError> {
        lock(&self.inject).remove(&cookie)
    }

    pub(super) fn anchor(&self, cookie: u64) -> Result<u32, MapError> {
        lock(&self.anchors).get(&cookie, 0)
    }

    pub(super) fn remove_anchor(&self, cookie: u64) -> Result<(), MapError> {
        lock(&self.anchors).remove(&cookie)
    }

    pub(super) fn add_flow(&self, source: u64, next: u32) -> Result<(), MapError> {
        lock(&self.flows).insert(source, Flow::new(next), NOEXIST)
    }

    pub(super) fn flow(&self, source: u64) -> Result<Flow, MapError> {
        lock(&self.flows).get(&source, 0)
    }

    pub(super) fn remove_flow(&self, source: u64) -> Result<(), MapError> {
        lock(&self.flows).remove(&source)
    }

    pub(super) fn set_credit(&self, source: u64, credit: Credit) -> Result<(), MapError> {
        lock(&self.credit).insert(source, credit, 0)
    }

    pub(super) fn remove_credit(&self, source: u64) -> Result<(), MapError> {
        lock(&self.credit).remove(&source)
    }

    pub(super) fn add_target(&self, source: u64, target: &impl AsRawFd) -> Result<(), MapError> {
        lock(&self.targets).insert(source, target.as_raw_fd(), NOEXIST)
    }

    pub(super) fn remove_target(&self, source: u64) -> Result<(), MapError> {
        lock(&self.targets).remove(&source)
    }

    pub(super) fn add_source(&self, cookie: u64, socket: &impl AsRawFd) -> Result<(), MapError> {
        lock(&self.verdict).insert(cookie, socket.as_raw_fd(), NOEXIST)
    }

    pub(super) fn remove_source(&self, cookie: u64) -> Result<(), MapError> {
        lock(&self.verdict).remove(&cookie)
    }

    pub(super) fn counted(&self, counter: Counter) -> u64 {
        self.counters.get(&(counter as u32), 0).map_or(0, |values| values.iter().sum())
    }

    /// Sockets and flows in all maps.
    pub(super) fn entries(&self) -> Result<usize, MapError> {
        let mut entries = 0;
        for sockets in [&self.inject, &self.verdict, &self.targets] {
            for key in lock(sockets).keys() {
                key?;
                entries += 1;
            }
        }
        for key in lock(&self.flows).keys() {
            key?;
            entries += 1;
        }
        for key in lock(&self.anchors).keys() {
            key?;
            entries += 1;
        }
        for key in lock(&self.credit).keys() {
            key?;
            entries += 1;
        }
        Ok(entries)
    }

    /// Uses a map as a session would, under a key that no socket has: cookies start at 1.
    pub(super) fn probe(&self) -> Result<(), MapError> {
        self.add_flow(0, 0)?;
        self.remove_flow(0)
    }
}

/// `BPF_NOEXIST`: a cookie is one socket's for good, so an entry that is already there is a mistake of ours.
const NOEXIST: u64 = 1;
