//! The guard's maps. The kernel half is `injector-ebpf/src/bans.rs`, and `GUARDED` in
//! `injector-ebpf/src/guard/listener.rs`.

use std::{
    collections::{HashMap, HashSet},
    fmt, fs, io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::Mutex,
};

use anyhow::Context as _;
use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData, PerCpuArray},
};
use injector_common::{
    guard::{Ban, Counter, PORT_WORDS, Settings, port_bit},
    inline::Address,
};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::{
    config::Network,
    engine::{
        bans::{BanChange, BanMaps},
        bpf::{LoadError, lock, take_map},
    },
    os::bpf::{self, ByteMap},
    telemetry::log::target,
};

pub(super) const ADDRESSES: &str = "BANNED_ADDRESSES";
const NETWORKS: &str = "BANNED_NETWORKS";
const ALLOWED: &str = "GUARD_ALLOWED";
const GUARDED: &str = "GUARDED";
const PORTS: &str = "GUARDED_PORTS";
const SETTINGS: &str = "GUARD_SETTINGS";
const DEVICES: &str = "GUARD_DEVICES";

/// The only key of [`SETTINGS`].
const SETTINGS_KEY: [u8; 4] = [0; 4];

/// Those that engine inline's programs use, too.
pub(in crate::engine) const SHARED: [&str; 5] = [ADDRESSES, NETWORKS, ALLOWED, SETTINGS, "GUARD_COUNTERS"];

/// The maps whose size is configured.
const SIZED: [&str; 2] = [ADDRESSES, NETWORKS];

/// The maps of the loaded programs.
pub(super) struct Maps {
    /// One writer at a time: what it has written last is what `GUARD_SETTINGS` tells of.
    bans: Mutex<Bans>,
    allowed: Mutex<ByteMap>,
    guarded: Mutex<Guarded>,
    devices: Mutex<ByteMap>,
    counters: PerCpuArray<MapData, u64>,
}

impl fmt::Debug for Maps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Maps").field("bans", &self.bans).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Bans {
    addresses: ByteMap,
    networks: ByteMap,
    settings: ByteMap,
}

/// What is guarded.
struct Guarded {
    addresses: ByteMap,
    ports: ByteMap,
}

/// Has the programs use the maps that are pinned there, or makes and pins them. Maps of another size than
/// `max_bans` are set aside: [`Maps::take_over`] moves their bans.
pub(super) fn prepare(loader: &mut EbpfLoader<'_>, pins: &Path, max_bans: u32) -> io::Result<()> {
    for name in SIZED {
        loader.map_max_entries(name, max_bans);
        let (pin, aside) = (pins.join(name), set_aside(pins, name));
        let present = match bpf::open_pin(&pin) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            map => ByteMap::new(map?)?,
        };
        // If there is an older one, a daemon ended while it moved the bans.
        if present.info().max_entries != max_bans && !aside.exists() {
            fs::rename(&pin, &aside)?;
        }
    }
    for name in pinned() {
        loader.map_pin_path(name, pins.join(name));
    }
    Ok(())
}

/// The pins that are missing of those that [`prepare`] made.
pub(super) fn missing_pins(pins: &Path) -> Vec<PathBuf> {
    pinned().map(|name| pins.join(name)).filter(|pin| !pin.exists()).collect()
}

fn pinned() -> impl Iterator<Item = &'static str> {
    SHARED.into_iter().chain([GUARDED, PORTS])
}

fn set_aside(pins: &Path, name: &str) -> PathBuf {
    pins.join(format!("{name}-old"))
}

impl Maps {
    /// The maps of these programs.
    pub(super) fn take(programs: &mut Ebpf) -> Result<Self, LoadError> {
        let open = |map| byte_map(programs, map);
        let bans = Bans { addresses: open(ADDRESSES)?, networks: open(NETWORKS)?, settings: open(SETTINGS)? };
        let guarded = Mutex::new(Guarded { addresses: open(GUARDED)?, ports: open(PORTS)? });
        let [allowed, devices] = [open(ALLOWED)?, open(DEVICES)?].map(Mutex::new);
        let counters = take_map(programs, "GUARD_COUNTERS")?;
        Ok(Self { bans: Mutex::new(bans), allowed, guarded, devices, counters })
    }

    /// Tells the program at the driver which packets are this device's own, and not for another one behind it.
    pub(super) fn set_device(&self, index: u32, hardware_address: [u8; 6]) -> io::Result<()> {
        let [a, b, c, d, e, f] = hardware_address;
        lock(&self.devices).insert(&index.to_ne_bytes(), &[a, b, c, d, e, f, 0, 0])
    }

    /// Moves the bans of maps that were set aside.
    pub(super) fn take_over(&self, pins: &Path) -> Result<(), LoadError> {
        let bans = lock(&self.bans);
        for (name, map) in [(ADDRESSES, &bans.addresses), (NETWORKS, &bans.networks)] {
            if let Err(error) = move_bans(&set_aside(pins, name), map) {
                tracing::error!(target: target::GUARD, map = name, %error, "bans of the former map were not taken over; raise guard.max_bans");
            }
        }
        bans.tell_programs(false).map_err(|error| LoadError::Pin { map: SETTINGS, error })
    }
}

fn byte_map(programs: &Ebpf, map: &'static str) -> Result<ByteMap, LoadError> {
    let (Map::Array(data) | Map::HashMap(data) | Map::LpmTrie(data)) =
        programs.map(map).ok_or(LoadError::Missing(map))?
    else {
        return Err(LoadError::Missing(map));
    };
    let opened = data.fd().as_fd().try_clone_to_owned().and_then(ByteMap::new);
    opened.map_err(|error| LoadError::Pin { map, error })
}

/// Moves what the map that was set aside contains, and removes that.
fn move_bans(aside: &Path, to: &ByteMap) -> io::Result<()> {
    let from = match bpf::open_pin(aside) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        map => ByteMap::new(map?)?,
    };
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    from.for_each(|key, value| {
        keys.extend_from_slice(key);
        values.extend_from_slice(value);
    })?;
    let moved = to.insert_all(&keys, &values);
    fs::remove_file(aside)?;
    moved
}

impl Bans {
    /// Has the programs look up what there is, and again what they have looked up before. With `soon`, has
    /// them look up what is about to be.
    fn tell_programs(&self, soon: bool) -> io::Result<()> {
        let has = |map: &ByteMap| Ok::<_, io::Error>(soon || map.has_entries()?);
        let before = self.settings.get(&SETTINGS_KEY)?;
        let before = before.and_then(|value| Settings::read_from_bytes(&value).ok()).unwrap_or_default();
        if soon && before.has_networks() && before.has_addresses() {
            return Ok(());
        }
        let after = before.after(has(&self.networks)?, has(&self.addresses)?);
        self.settings.insert(&SETTINGS_KEY, after.as_bytes())
    }

    /// Writes the bans of these networks, and removes those that have none.
    fn write(&self, bans: &HashMap<Network, Option<Ban>>) -> anyhow::Result<()> {
        // First, so that there is room.
        for network in bans.iter().filter_map(|(network, ban)| ban.is_none().then_some(*network)) {
            let map = if is_address(network) { &self.addresses } else { &self.networks };
            map.remove(&key(network)).context("removing a ban from the kernel's maps")?;
        }
        self.tell_programs(bans.values().any(Option::is_some)).context(SETTINGS)?;
        for (name, map, addresses) in [(ADDRESSES, &self.addresses, true), (NETWORKS, &self.networks, false)]
        {
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            for (network, ban) in bans.iter().filter(|(network, _)| is_address(**network) == addresses) {
                if let Some(ban) = ban {
                    keys.extend(key(*network));
                    values.extend(ban.as_bytes());
                }
            }
            map.insert_all(&keys, &values).with_context(|| {
                format!(
                    "writing bans to {name}, which has room for {} (guard.max_bans)",
                    map.info().max_entries
                )
            })?;
        }
        Ok(())
    }
}

impl BanMaps for Maps {
    fn write(&self, changes: &[BanChange]) -> anyhow::Result<()> {
        let last: HashMap<Network, Option<Ban>> = changes
            .iter()
            .map(|change| match *change {
                BanChange::Set(network, ban) => (network, Some(ban)),
                BanChange::Remove(network) => (network, None),
            })
            .collect();
        let bans = lock(&self.bans);
        let written = bans.write(&last);
        // Also of what was written before an error.
        let looked_up = bans.tell_programs(false).context(SETTINGS);
        written.and(looked_up)
    }

    fn read(&self, each: &mut dyn FnMut(Network, Ban)) -> anyhow::Result<()> {
        let bans = lock(&self.bans);
        let read = [&bans.addresses, &bans.networks].into_iter().try_for_each(|map| {
            let mut unknown = Vec::new();
            map.for_each(|key, value| match (network(key), Ban::read_from_bytes(value)) {
                (Some(network), Ok(ban)) => each(network, ban),
                _ => unknown.push(key.to_vec()),
            })?;
            // They would hide the bans of larger networks.
            unknown.iter().try_for_each(|key| map.remove(key))
        });
        // Also of what was removed before an error.
        let looked_up = bans.tell_programs(false).context(SETTINGS);
        read.context("reading the bans in the kernel's maps").and(looked_up)
    }

    fn set_allowed(&self, networks: &[Network]) -> anyhow::Result<()> {
        let wanted = networks.iter().map(|network| trie_key(*network)).collect();
        let written = replace(&lock(&self.allowed), &wanted);
        let looked_up = lock(&self.bans).tell_programs(false).context(SETTINGS);
        written.context("writing the networks that are never dropped").and(looked_up)
    }

    fn set_guarded(&self, addresses: &[SocketAddr]) -> anyhow::Result<()> {
        // With port 0 the host alone: fragments say no port.
        let hosts = addresses.iter().map(|address| SocketAddr::new(address.ip(), 0));
        let key =
            |address: SocketAddr| Address::new(mapped(address.ip()), address.port()).as_bytes().to_vec();
        let all: Vec<_> = addresses.iter().copied().chain(hosts).collect();
        let guarded = lock(&self.guarded);
        replace(&guarded.addresses, &all.iter().copied().map(key).collect())
            .and_then(|()| write_ports(&guarded.ports, all.iter().map(SocketAddr::port)))
            .context("writing the addresses of the listeners")
    }

    fn dropped(&self, by: Counter) -> u64 {
        self.counters.get(&(by as u32), 0).map_or(0, |values| values.iter().sum())
    }
}

/// Makes these all ports of `GUARDED_PORTS`.
fn write_ports(map: &ByteMap, ports: impl Iterator<Item = u16>) -> io::Result<()> {
    let mut words = [0_u64; PORT_WORDS];
    for (word, bit) in ports.map(port_bit) {
        words[word as usize] |= bit;
    }
    let keys: Vec<u8> = (0_u32..).take(PORT_WORDS).flat_map(u32::to_ne_bytes).collect();
    map.insert_all(&keys, words.as_bytes())
}

/// Makes these all keys of a map.
fn replace(map: &ByteMap, wanted: &HashSet<Vec<u8>>) -> io::Result<()> {
    for key in wanted {
        map.insert(key, &1_u32.to_ne_bytes())?;
    }
    map.keys()?.iter().filter(|key| !wanted.contains(*key)).try_for_each(|key| map.remove(key))
}

fn is_address(network: Network) -> bool {
    network.prefix() == if network.address().is_ipv4() { 32 } else { 128 }
}

/// The key of a ban.
fn key(network: Network) -> Vec<u8> {
    if is_address(network) { mapped(network.address()).to_vec() } else { trie_key(network) }
}

/// The key in a trie: how many bits count, and the address (struct bpf_lpm_trie_key).
fn trie_key(network: Network) -> Vec<u8> {
    let prefix = u32::from(network.prefix()) + if network.address().is_ipv4() { MAPPED } else { 0 };
    [prefix.to_ne_bytes().as_slice(), &mapped(network.address())].concat()
}

/// How many bits stand before an IPv4 address that is mapped into IPv6.
const MAPPED: u32 = 96;

fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => Address::mapped(address.octets()),
        IpAddr::V6(address) => address.octets(),
    }
}

/// The network of a ban's key; `None` if this daemon would not have written it.
fn network(key: &[u8]) -> Option<Network> {
    let (prefix, address) = match key.split_first_chunk::<4>() {
        Some((prefix, address)) if address.len() == 16 => (u32::from_ne_bytes(*prefix), address),
        _ => (128, key),
    };
    let address = IpAddr::from(<[u8; 16]>::try_from(address).ok()?);
    let (address, prefix) = match address.to_canonical() {
        v4 @ IpAddr::V4(_) if prefix >= MAPPED => (v4, prefix - MAPPED),
        _ => (address, prefix),
    };
    format!("{address}/{prefix}").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_as_the_network_that_it_was_made_of() {
        for text in [
            "192.0.2.7/32",
            "192.0.2.0/24",
            "0.0.0.0/0",
            "2001:db8::1/128",
            "2001:db8::/32",
            "::/0",
            // Not one of IPv4, although its first bits are those of mapped addresses.
            "::/64",
        ] {
            let expected: Network = text.parse().unwrap();
            assert_eq!(network(&key(expected)), Some(expected), "{text}");
        }
        assert_eq!(network(&[1; 7]), None);
    }
}
