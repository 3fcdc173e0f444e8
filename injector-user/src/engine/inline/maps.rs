//! Typed access to the maps of the inline engine. The kernel half is
//! `injector-ebpf/src/inline/maps.rs`.

use std::{
    collections::{HashMap as StdHashMap, HashSet},
    hash::Hash,
    mem::offset_of,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use aya::{
    Ebpf,
    maps::{
        Array, HashMap, MapData, MapError, PerCpuArray, Queue, RingBuf,
        lpm_trie::{Key as LpmKey, LpmTrie},
    },
};
use injector_common::{
    guard,
    inline::{
        Address, Backend, BackendTable, Counter, Flag, Flow, HeaderAddresses, Listener, Phase, Settings,
        Template, Tuple, Usage,
    },
};

use super::{
    places::Found,
    plan::{InUse, Plan, trie_prefix},
    source_maps::SourceMaps,
};
use crate::{
    config::Network,
    engine::bpf::{LoadError, lock, take_data, take_map as take},
    os::mmap::MmapRecords,
};

/// The maps that this daemon's program shares with the next daemon's.
pub(super) const PINNED: [&str; 19] = [
    "FLOWS",
    "CONNECTIONS",
    "FREE_SLOTS",
    "LISTENERS",
    "TEMPLATES",
    "BACKEND_TABLES",
    "BACKENDS",
    "SOURCES",
    "PROXY_PORTS",
    "TRANSLATED_SOURCES",
    "PEERS",
    "USAGE",
    "SETTINGS",
    "COUNTERS",
    "EVENTS",
    "TIMER",
    "SOURCE_COUNTS",
    "SOURCE_SESSIONS",
    "SOURCE_RATES",
];

pub(super) struct Maps {
    listeners: Mutex<HashMap<MapData, Address, Listener>>,
    templates: Mutex<Array<MapData, Template>>,
    tables: Mutex<Array<MapData, BackendTable>>,
    backends: Mutex<Array<MapData, Backend>>,
    sources: Mutex<Array<MapData, [u32; 4]>>,
    proxy_ports: Mutex<HashMap<MapData, Address, u32>>,
    translated_sources: Mutex<LpmTrie<MapData, [u32; 5], u32>>,
    peers: Mutex<LpmTrie<MapData, [u8; 16], u32>>,
    settings: Mutex<Array<MapData, Settings>>,
    free_slots: Mutex<Queue<MapData, u32>>,
    counters: PerCpuArray<MapData, u64>,
    pub(super) by_source: SourceMaps,
    connections: MmapRecords<Flow>,
    usage: MmapRecords<Usage>,
    /// Kept open because programs that are loaded later refer to the maps by their descriptors.
    _mapped: [MapData; 2],
    pub(super) events: Mutex<Option<RingBuf<MapData>>>,
}

impl std::fmt::Debug for Maps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Maps").field("slots", &self.slots()).finish_non_exhaustive()
    }
}

/// Maps the memory of an array.
fn map_memory<T>(programs: &mut Ebpf, map: &'static str) -> Result<(MmapRecords<T>, MapData), LoadError>
where
    T: zerocopy::FromBytes + zerocopy::IntoBytes,
{
    let data = take_data(programs, map)?;
    let info = data.info().map_err(failed(map))?;
    let (size, expected) = (usize::try_from(info.value_size()).unwrap_or(0), size_of::<T>());
    if size != expected {
        return Err(failed(map)(MapError::InvalidValueSize { size, expected }));
    }
    let entries = info.max_entries();
    let records = MmapRecords::map(data.fd().as_fd(), usize::try_from(entries).unwrap_or(0));
    Ok((records.map_err(|error| LoadError::Memory { map, error })?, data))
}

impl Maps {
    pub(super) fn take(programs: &mut Ebpf) -> Result<Self, LoadError> {
        let (connections, connections_map) = map_memory(programs, "CONNECTIONS")?;
        let (usage, usage_map) = map_memory(programs, "USAGE")?;
        Ok(Self {
            listeners: Mutex::new(take::<HashMap<_, _, _>>(programs, "LISTENERS")?),
            templates: Mutex::new(take::<Array<_, _>>(programs, "TEMPLATES")?),
            tables: Mutex::new(take::<Array<_, _>>(programs, "BACKEND_TABLES")?),
            backends: Mutex::new(take::<Array<_, _>>(programs, "BACKENDS")?),
            sources: Mutex::new(take::<Array<_, _>>(programs, "SOURCES")?),
            proxy_ports: Mutex::new(take::<HashMap<_, _, _>>(programs, "PROXY_PORTS")?),
            translated_sources: Mutex::new(take::<LpmTrie<_, _, _>>(programs, "TRANSLATED_SOURCES")?),
            peers: Mutex::new(take::<LpmTrie<_, _, _>>(programs, "PEERS")?),
            settings: Mutex::new(take::<Array<_, _>>(programs, "SETTINGS")?),
            free_slots: Mutex::new(take::<Queue<_, _>>(programs, "FREE_SLOTS")?),
            counters: take(programs, "COUNTERS")?,
            by_source: SourceMaps::take(programs)?,
            connections,
            usage,
            _mapped: [connections_map, usage_map],
            events: Mutex::new(Some(take(programs, "EVENTS")?)),
        })
    }

    /// Writes the settings. The first time, also fills the queue of free slots: an earlier daemon
    /// may have ended while it did that.
    pub(super) fn set_settings(&self, settings: &Settings) -> Result<(), LoadError> {
        let mut map = lock(&self.settings);
        if map.get(&0, 0).map_err(failed("SETTINGS"))?.slots == 0 {
            let mut free = lock(&self.free_slots);
            while free.pop(0).is_ok() {}
            for slot in 1..settings.slots {
                free.push(slot, 0).map_err(failed("FREE_SLOTS"))?;
            }
        }
        map.set(0, settings, 0).map_err(failed("SETTINGS"))
    }

    /// The entries of `CONNECTIONS`, the unused first one included.
    pub(super) fn slots(&self) -> u32 {
        u32::try_from(self.connections.count()).unwrap_or(u32::MAX)
    }

    /// Adds networks that may connect to PROXY ports through this host. If they are `complete`, all
    /// others may not.
    pub(super) fn set_peers(&self, networks: &[Network], complete: bool) -> Result<(), LoadError> {
        let mut peers = lock(&self.peers);
        let wanted = networks.iter().map(|network| trie_prefix(*network)).collect();
        extend_trie(&mut peers, "PEERS", &wanted)?;
        if complete { keep_in_trie(&mut peers, "PEERS", &wanted) } else { Ok(()) }
    }

    /// Writes the headers of a place, which no connection has.
    pub(super) fn set_templates(&self, id: u32, templates: &[Template; 2]) -> Result<(), LoadError> {
        let mut map = lock(&self.templates);
        for (ipv6, template) in [false, true].into_iter().zip(templates) {
            map.set(Template::index(id, ipv6), template, 0).map_err(failed("TEMPLATES"))?;
        }
        Ok(())
    }

    /// Writes a plan: what is new first, then the listeners that lead there.
    pub(super) fn write(&self, plan: &Plan) -> Result<(), LoadError> {
        let mut sources = lock(&self.sources);
        for (index, source) in &plan.sources {
            sources.set(*index, source, 0).map_err(failed("SOURCES"))?;
        }
        let mut backends = lock(&self.backends);
        for (index, backend) in &plan.backends {
            backends.set(*index, backend, 0).map_err(failed("BACKENDS"))?;
        }
        let mut tables = lock(&self.tables);
        for (index, table) in &plan.tables {
            tables.set(*index, table, 0).map_err(failed("BACKEND_TABLES"))?;
        }
        // PROXY ports are closed to others before a connection leads there, and opened after.
        let ports = || plan.proxy_ports.iter().map(|address| (*address, 1));
        insert(&mut lock(&self.proxy_ports), "PROXY_PORTS", ports())?;
        // A listener takes no connection before its program knows whose it must not take.
        let mut translated = lock(&self.translated_sources);
        extend_trie(&mut translated, "TRANSLATED_SOURCES", &plan.translated_sources)?;
        self.set_listeners(&plan.listeners)?;
        keep_in_trie(&mut translated, "TRANSLATED_SOURCES", &plan.translated_sources)?;
        keep(&mut lock(&self.proxy_ports), "PROXY_PORTS", |address| plan.proxy_ports.contains(address))
    }

    /// Makes these all listeners. One that stays is served without interruption.
    pub(super) fn set_listeners(&self, listeners: &StdHashMap<Address, Listener>) -> Result<(), LoadError> {
        let mut map = lock(&self.listeners);
        keep(&mut map, "LISTENERS", |address| listeners.contains_key(address))?;
        insert(&mut map, "LISTENERS", listeners.iter().map(|(address, listener)| (*address, *listener)))
    }

    /// What the listeners of an earlier daemon lead to.
    pub(super) fn in_use(&self) -> InUse {
        let listeners: Vec<Listener> =
            lock(&self.listeners).iter().filter_map(Result::ok).map(|(_, listener)| listener).collect();
        let tables: HashSet<u32> =
            listeners.iter().flat_map(|listener| listener.tables).filter(|table| *table != 0).collect();
        let map = lock(&self.tables);
        let entries = tables.iter().filter_map(|table| map.get(table, 0).ok());
        let backends: HashSet<u32> = entries.flat_map(|table| table.backends).map(u32::from).collect();
        let map = lock(&self.backends);
        let sources = backends.iter().filter_map(|index| map.get(index, 0).ok()).map(|backend| {
            backend.first_source..backend.first_source.saturating_add(u32::from(backend.sources))
        });
        let sources: HashSet<_> = sources.filter(|range| !range.is_empty()).collect();
        InUse {
            tables: tables.into_iter().collect(),
            backends: backends.iter().copied().collect(),
            sources: sources.into_iter().collect(),
        }
    }

    /// The places that an earlier daemon has given to listeners.
    pub(super) fn places(&self) -> Vec<Found> {
        let listeners = lock(&self.listeners);
        let current: HashSet<u32> =
            listeners.iter().filter_map(Result::ok).map(|(_, listener)| listener.id).collect();
        let templates = lock(&self.templates);
        let found = (1..Usage::COUNT).filter_map(|id| {
            let usage = self.usage.read(usize::try_from(id).ok()?)?;
            let name = usage.name.split(|byte| *byte == 0).next().filter(|name| !name.is_empty())?;
            let template = |ipv6| templates.get(&Template::index(id, ipv6), 0).ok();
            Some(Found {
                id,
                name: String::from_utf8_lossy(name).into_owned(),
                templates: [template(false)?, template(true)?],
                current: current.contains(&id),
            })
        });
        found.collect()
    }

    /// Writes the name of a place; an empty one makes it free.
    pub(super) fn set_name(&self, id: u32, name: &str) {
        let mut bytes = [0; Usage::NAME_LEN];
        // The last byte stays zero. The configuration allows no longer names.
        for (byte, of_name) in bytes.iter_mut().take(Usage::NAME_LEN - 1).zip(name.bytes()) {
            *byte = of_name;
        }
        for (at, byte) in (offset_of!(Usage, name)..).zip(bytes) {
            if let Some(place) = usize::try_from(id).ok().and_then(|id| self.usage.byte(id, at)) {
                place.store(byte, Ordering::Relaxed);
            }
        }
    }

    /// A count of a listener, or of all, by its offset in [`Usage`].
    pub(super) fn usage_field(&self, id: u32, offset: usize) -> Option<&AtomicU32> {
        self.usage.field(usize::try_from(id).ok()?, offset)
    }

    /// Writes a word of a listener, or of all, by its offset in [`Usage`].
    pub(super) fn set_usage_word(&self, id: u32, offset: usize, value: u64) {
        if let Some(word) = usize::try_from(id).ok().and_then(|id| self.usage.word(id, offset)) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Writes how many bits of an IPv4 and of an IPv6 address are one source.
    pub(super) fn set_source_prefixes(&self, [ipv4, ipv6]: [u8; 2]) {
        let [.., mask_ipv4] = guard::mask([u32::MAX; 4], 96 + ipv4.min(32));
        let masks = [mask_ipv4].into_iter().chain(guard::mask([u32::MAX; 4], ipv6));
        let offsets = (offset_of!(Usage, source_mask_ipv4)..).step_by(size_of::<u32>());
        for (at, mask) in offsets.zip(masks) {
            if let Some(word) = self.usage_field(Usage::ALL, at) {
                word.store(mask, Ordering::Relaxed);
            }
        }
    }

    /// The counts of a listener, or of all.
    pub(super) fn usage(&self, id: u32) -> Usage {
        usize::try_from(id).ok().and_then(|id| self.usage.read(id)).unwrap_or_default()
    }

    /// The connection that has this slot now.
    pub(super) fn flow(&self, slot: u32) -> Option<Flow> {
        self.connections.read(usize::try_from(slot).ok()?)
    }

    /// The slots in this phase, with what is there a moment later.
    pub(super) fn flows_in(&self, phase: Phase) -> impl Iterator<Item = (u32, Flow)> {
        (1..self.slots()).filter_map(move |slot| {
            let index = usize::try_from(slot).ok()?;
            let now = self.connections.word(index, offset_of!(Flow, phase))?.load(Ordering::Acquire);
            let flow = (now == phase as u64).then(|| self.connections.read(index)).flatten()?;
            (flow.phase == phase as u64).then_some((slot, flow))
        })
    }

    /// Has the sweep remove the established connection with this slot, without waiting for its end.
    pub(super) fn abandon(&self, slot: u32) {
        let offset = offset_of!(Flow, state) + Flag::Superseded as usize;
        if let Some(flag) = usize::try_from(slot).ok().and_then(|slot| self.connections.byte(slot, offset)) {
            flag.store(1, Ordering::Release);
        }
    }

    /// Has the sweep remove the connection with this slot, whose handshake is not finished, as one
    /// that has been silent for long. If it is finished meanwhile, it expires.
    pub(super) fn abandon_handshake(&self, slot: u32) {
        let index = usize::try_from(slot).ok();
        if let Some(last) = index.and_then(|index| self.connections.word(index, offset_of!(Flow, last_ns))) {
            last.store(0, Ordering::Release);
        }
    }

    pub(super) fn counted(&self, counter: Counter) -> u64 {
        self.counters.get(&(counter as u32), 0).map_or(0, |values| values.iter().sum())
    }
}

/// Writes what differs. An update, also by an equal value, takes another element, and the former
/// one is free at once (htab_map_update_elem, kernel/bpf/hashtab.c): a program that still reads it
/// may read the value of another key.
fn insert<V: aya::Pod + PartialEq>(
    map: &mut HashMap<MapData, Address, V>,
    name: &'static str,
    entries: impl Iterator<Item = (Address, V)>,
) -> Result<(), LoadError> {
    for (key, value) in entries {
        if map.get(&key, 0).ok() != Some(value) {
            map.insert(key, value, 0).map_err(failed(name))?;
        }
    }
    Ok(())
}

/// Removes all other entries.
fn keep<V: aya::Pod>(
    map: &mut HashMap<MapData, Address, V>,
    name: &'static str,
    wanted: impl Fn(&Address) -> bool,
) -> Result<(), LoadError> {
    let old: Vec<_> = map.keys().filter_map(Result::ok).filter(|key| !wanted(key)).collect();
    for key in old {
        map.remove(&key).map_err(failed(name))?;
    }
    Ok(())
}

/// Adds networks: how many bits count, and the address. Those that are there stay.
fn extend_trie<K: aya::Pod + Eq + Hash>(
    map: &mut LpmTrie<MapData, K, u32>,
    name: &'static str,
    networks: &HashSet<(u32, K)>,
) -> Result<(), LoadError> {
    let mut keys = networks.iter().map(|(prefix, address)| LpmKey::new(*prefix, *address));
    keys.try_for_each(|key| map.insert(&key, 1, 0)).map_err(failed(name))
}

/// Removes all other networks.
fn keep_in_trie<K: aya::Pod + Eq + Hash>(
    map: &mut LpmTrie<MapData, K, u32>,
    name: &'static str,
    wanted: &HashSet<(u32, K)>,
) -> Result<(), LoadError> {
    let is_wanted = |key: &LpmKey<K>| wanted.contains(&(key.prefix_len(), key.data()));
    let old: Vec<_> = map.keys().filter_map(Result::ok).filter(|key| !is_wanted(key)).collect();
    old.iter().try_for_each(|key| map.remove(key)).map_err(failed(name))
}

fn failed(map: &'static str) -> impl Fn(MapError) -> LoadError {
    move |error| LoadError::Map { map, error }
}

/// The address as a type of the standard library.
pub(super) fn socket_address(address: &Address) -> SocketAddr {
    SocketAddr::new(IpAddr::from(address.ip).to_canonical(), address.port)
}

/// The source and the destination, as types of the standard library.
pub(super) fn endpoints(addresses: &HeaderAddresses) -> Option<(SocketAddr, SocketAddr)> {
    let (source, destination) = addresses.read()?;
    Some((socket_address(&source), socket_address(&destination)))
}

/// The source and the destination of packets that leave.
pub(super) fn tuple(tuple: &Tuple) -> (SocketAddr, SocketAddr) {
    let (source, destination) = tuple.read();
    (socket_address(&source), socket_address(&destination))
}

/// Whether it has neither ended nor been given up.
pub(super) fn is_open(flow: &Flow) -> bool {
    !flow.closed() && !flow.is(Flag::Superseded)
}

/// The backend of a connection.
pub(super) fn backend_of(flow: &Flow) -> SocketAddr {
    tuple(&flow.backend_side.tuple).1
}
