//! The maps of the inline engine, behind functions; their kernel side is
//! `injector-ebpf/src/inline/maps.rs`.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::Mutex,
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData, MapError, PerCpuArray, RingBuf},
};
use injector_common::inline::{Address, ClosedFlow, Counter, Flow, Key, Listener, Template};

use crate::engine::bpf::{LoadError, lock, take_map as take};

/// The maps that this daemon's programs share with the next daemon's. Scratch maps are not shared.
pub(super) const PINNED: [&str; 8] =
    ["LISTENERS", "BACKENDS", "TEMPLATES", "SYN_CACHE", "PENDING", "FLOWS", "EVENTS", "COUNTERS"];

pub(super) struct Maps {
    listeners: Mutex<HashMap<MapData, Address, Listener>>,
    backends: Mutex<HashMap<MapData, Address, u32>>,
    templates: Mutex<Array<MapData, Template>>,
    flows: Mutex<HashMap<MapData, Key, Flow>>,
    counters: PerCpuArray<MapData, u64>,
    pub(super) events: Mutex<Option<RingBuf<MapData>>>,
}

/// The listeners and backends that the programs serve.
#[derive(Debug, Default)]
pub(super) struct Services {
    /// Listening addresses, each with its listener's id.
    pub(super) listen: Vec<(SocketAddr, u32)>,
    /// PROXY ports of backends.
    pub(super) backends: Vec<SocketAddr>,
    /// Two for each listener, by [`Template::index`].
    pub(super) templates: Vec<Template>,
}

impl Maps {
    pub(super) fn take(programs: &mut Ebpf) -> Result<Self, LoadError> {
        Ok(Self {
            listeners: Mutex::new(take::<HashMap<_, _, _>>(programs, "LISTENERS")?),
            backends: Mutex::new(take::<HashMap<_, _, _>>(programs, "BACKENDS")?),
            templates: Mutex::new(take::<Array<_, _>>(programs, "TEMPLATES")?),
            flows: Mutex::new(take::<HashMap<_, _, _>>(programs, "FLOWS")?),
            counters: take(programs, "COUNTERS")?,
            events: Mutex::new(Some(take(programs, "EVENTS")?)),
        })
    }

    /// Adds new entries before it removes old ones, so a listener that stays is served without
    /// interruption.
    pub(super) fn replace(&self, services: &Services) -> Result<(), LoadError> {
        let mut templates = lock(&self.templates);
        for (index, template) in (0..).zip(&services.templates) {
            templates.set(index, template, 0).map_err(failed("TEMPLATES"))?;
        }
        let ports = services.backends.iter().map(|backend| address(*backend));
        let hosts = services.backends.iter().map(|backend| Address::new(ip(backend.ip()), 0));
        replace(&mut lock(&self.backends), "BACKENDS", ports.chain(hosts).map(|address| (address, 1)))?;
        let listen = services.listen.iter().map(|(bound, id)| (address(*bound), Listener { id: *id }));
        replace(&mut lock(&self.listeners), "LISTENERS", listen)
    }

    pub(super) fn counted(&self, counter: Counter) -> u64 {
        self.counters.get(&(counter as u32), 0).map_or(0, |values| values.iter().sum())
    }

    /// A snapshot of all flows.
    pub(super) fn flows(&self) -> Vec<(Key, Flow)> {
        lock(&self.flows).iter().filter_map(Result::ok).collect()
    }

    /// Removes ended flows, as the program `sweep` does, with two system calls for each.
    pub(super) fn remove_flows(&self, ended: &[ClosedFlow]) {
        let mut flows = lock(&self.flows);
        for ended in ended {
            if flows.get(&ended.key, 0).is_ok_and(|flow| ended.may_remove(&flow)) {
                let _ = flows.remove(&ended.key);
            }
        }
    }
}

fn replace<V: aya::Pod>(
    map: &mut HashMap<MapData, Address, V>,
    name: &'static str,
    entries: impl Iterator<Item = (Address, V)>,
) -> Result<(), LoadError> {
    let mut wanted = HashSet::new();
    for (key, value) in entries {
        map.insert(key, value, 0).map_err(failed(name))?;
        wanted.insert(key);
    }
    let old: Vec<_> = map.keys().filter_map(Result::ok).filter(|key| !wanted.contains(key)).collect();
    for key in old {
        map.remove(&key).map_err(failed(name))?;
    }
    Ok(())
}

fn failed(map: &'static str) -> impl Fn(MapError) -> LoadError {
    move |error| LoadError::Map { map, error }
}

fn ip(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => Address::mapped(ip.octets()),
        IpAddr::V6(ip) => ip.octets(),
    }
}

fn address(address: SocketAddr) -> Address {
    Address::new(ip(address.ip()), address.port())
}

/// The address as a type of the standard library.
pub(super) fn socket_address(address: &Address) -> SocketAddr {
    SocketAddr::new(IpAddr::from(address.ip).to_canonical(), address.port)
}
