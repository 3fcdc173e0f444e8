//! An upgrade from maps of another layout: the old programs stay attached, behind the new one, and
//! serve their own connections until these have ended. They open no new ones.
//!
//! The addresses and ports of their connections are reserved in the new `FLOWS`, so that the new
//! program leaves those packets alone, and never takes their ports.
//!
//! Layout 5 needs more: the kernel translated addresses for it, by rules in an nftables table. The
//! rules go at once, the table stays as long as connections need its translation.

use std::{
    collections::HashSet,
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use aya::maps::{HashMap, Map, MapData, MapError};
use injector_common::inline::{Entry, Key};
use thiserror::Error;
use zerocopy::FromBytes as _;

use super::{
    installation::{self, Found, Installation, Layout},
    nat_rules::{self, NatError},
    pins::{LOCK, PinPaths, warn_of_unreadable},
};
use crate::{
    engine::attach::lock::Lock,
    os::bpf::{self, ByteMap, Object},
    telemetry::log::target,
};

/// How often [`Migration::advance`] should be called.
pub const INTERVAL: Duration = Duration::from_secs(5);

/// How long a program may still run that has begun before a map was changed.
const RUNNING: Duration = Duration::from_millis(2);

/// The length of a key of `FLOWS`, in every layout.
const KEY: usize = size_of::<Key>();

/// Why an upgrade cannot begin.
#[derive(Debug, Error)]
pub enum MigrateError {
    /// The new map.
    #[error("map FLOWS: {}", crate::engine::bpf::chain(.0))]
    Flows(#[from] MapError),
    /// Too many connections of the old programs.
    #[error(
        "the connections of an earlier injector's programs do not fit into inline.flows: set it to at least the value \
         that the earlier injector had"
    )]
    Full,
    /// The old maps.
    #[error("maps of an earlier injector in {place}: {error}")]
    Old {
        /// Where they are pinned.
        place: String,
        /// The kernel's error.
        error: io::Error,
    },
    /// The rules of layout 5.
    #[error("removing the NAT rules of an earlier injector: {0}")]
    Nat(NatError),
}

/// The upgrade in progress.
#[derive(Debug)]
pub struct Migration {
    flows: HashMap<MapData, Key, Entry>,
    reserved: HashSet<Key>,
    old: Vec<Old>,
}

/// Old programs that have connections.
#[derive(Debug)]
struct Old {
    installation: Installation,
    flows: ByteMap,
    /// Layout 5: connections that are being opened.
    pending: Option<ByteMap>,
    /// Opens no new connections.
    stopped: bool,
    since: Instant,
}

/// Reserves the addresses and ports of the connections that the old programs have. To be called
/// once the maps are loaded, and before the new program has listeners.
///
/// Programs of layout 5 open no new connections from here on: they would drop those of the new
/// program. Until it has listeners, new connections go to the host's listening sockets.
///
/// # Errors
/// [`MigrateError`]. Programs of layout 5 may then have no listeners any more.
pub fn begin(pins: &mut PinPaths) -> Result<Migration, MigrateError> {
    let data = MapData::from_pin(pins.maps.join("FLOWS"))?;
    let flows = HashMap::try_from(Map::HashMap(data))?;
    // A daemon before this one may have begun the same upgrade.
    let reserved =
        flows.iter().filter_map(Result::ok).filter(|(_, entry): &(_, Entry)| entry.origin == Entry::FOREIGN);
    let reserved = reserved.map(|(key, _)| key).collect();
    let mut migration = Migration { flows, reserved, old: Vec::new() };
    for installation in std::mem::take(&mut pins.others) {
        let place = installation.place();
        let failed = |error| MigrateError::Old { place: place.clone(), error };
        match Old::new(installation).map_err(failed)? {
            Ok(old) => migration.old.push(old),
            Err(installation) => {
                remove(&installation);
                tracing::warn!(target: target::ENGINE_INLINE, place, "programs and maps of an earlier injector were removed; connections through them have ended");
            }
        }
    }
    migration.reserve()?;
    migration.stop(|old| old.installation.layout == Layout::V5)?;
    if !migration.old.is_empty() {
        let connections = migration.reserved.len();
        tracing::info!(target: target::ENGINE_INLINE, connections, "programs of an earlier injector serve their own connections until these have ended");
    }
    migration.advance();
    Ok(migration)
}

/// Has the programs of earlier daemons open no new connections, for a daemon that does not use the
/// engine: new connections go to its sockets. Returns where those programs are pinned; none if
/// another daemon uses them. Warns of programs that may be such ones, except those whose links are
/// pinned in the folder `others`.
///
/// # Errors
/// [`MigrateError`].
pub fn stop_opening(pin: &Path, others: Option<&Path>) -> Result<Vec<String>, MigrateError> {
    let failed = |error| MigrateError::Old { place: pin.display().to_string(), error };
    let mut stopped = Vec::new();
    let Found { installations: found, mut unreadable } = installation::find(pin).map_err(failed)?;
    if !unreadable.is_empty() {
        let known = others.map(pinned_links).transpose().map_err(failed)?.unwrap_or_default();
        unreadable.retain(|program| !known.contains(&program.link));
        warn_of_unreadable(&unreadable);
    }
    if !found.iter().any(Installation::is_attached) {
        return Ok(stopped);
    }
    let Ok(_lock) = Lock::take_existing(&LOCK, pin) else { return Ok(stopped) };
    for installation in found.into_iter().filter(Installation::is_attached) {
        let place = installation.place();
        stop(&installation, false)?;
        stopped.push(place);
    }
    Ok(stopped)
}

/// The ids of the links that are pinned in a folder.
fn pinned_links(folder: &Path) -> io::Result<HashSet<u32>> {
    let mut ids = HashSet::new();
    for entry in installation::entries(folder)? {
        let Ok(object) = bpf::open_pin(&entry.path()) else { continue };
        if bpf::object(object.as_fd())? == Some(Object::Link) {
            ids.extend(bpf::link_info(object.as_fd())?.map(|info| info.id));
        }
    }
    Ok(ids)
}

impl Migration {
    /// The old programs, by their ids.
    #[must_use]
    pub fn programs(&self) -> HashSet<u32> {
        self.old.iter().flat_map(|old| old.installation.programs()).collect()
    }

    /// The directories that have the folders of their pins, which are removed with the last
    /// connection.
    pub fn directories(&self) -> impl Iterator<Item = PathBuf> {
        let folders = self.old.iter().filter_map(|old| old.installation.folder.as_ref());
        folders.filter_map(|folder| Some(folder.parent()?.to_owned()))
    }

    /// Gives the new program its listeners by `serve`, and then takes them from the old programs,
    /// so that one of them serves every SYN. The new program runs first.
    ///
    /// # Errors
    /// Those of `serve`, and [`MigrateError`].
    pub fn serve(&mut self, serve: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        if self.old.iter().all(|old| old.stopped) {
            return serve();
        }
        // Again, so that few connections can be opened before their ports are known.
        self.reserve().map_err(|error| error.to_string())?;
        serve()?;
        self.stop(|_| true).map_err(|error| error.to_string())
    }

    /// Has old programs open nothing new.
    fn stop(&mut self, which: impl Fn(&Old) -> bool) -> Result<(), MigrateError> {
        let mut any = false;
        for old in self.old.iter_mut().filter(|old| !old.stopped && which(old)) {
            stop(&old.installation, true)?;
            (any, old.stopped) = (true, true);
        }
        if any {
            thread::sleep(RUNNING);
            self.reserve()?;
        }
        Ok(())
    }

    /// Releases the addresses and ports of connections that have ended, and removes old programs
    /// that have none left. To be called every [`INTERVAL`].
    pub fn advance(&mut self) {
        let mut open = HashSet::new();
        let all = std::mem::take(&mut self.old);
        for old in all {
            match old.keys() {
                Ok(keys) if keys.is_empty() && old.stopped => {
                    remove(&old.installation);
                    let (place, after) = (old.installation.place(), old.since.elapsed().as_secs());
                    tracing::info!(target: target::ENGINE_INLINE, place, after, "the last connection of an earlier injector's programs has ended; they were removed");
                    continue;
                }
                Ok(keys) => open.extend(keys),
                Err(error) => {
                    let place = old.installation.place();
                    tracing::warn!(target: target::ENGINE_INLINE, place, %error, "maps of an earlier injector cannot be read; its programs stay");
                    open.extend(self.reserved.iter().copied());
                }
            }
            self.old.push(old);
        }
        let ended: Vec<_> = self.reserved.difference(&open).copied().collect();
        for key in ended {
            if self.flows.get(&key, 0).is_ok_and(|entry| entry.origin == Entry::FOREIGN) {
                let _ = self.flows.remove(&key);
            }
            self.reserved.remove(&key);
        }
    }

    fn reserve(&mut self) -> Result<(), MigrateError> {
        /// `BPF_NOEXIST`.
        const ONLY_NEW: u64 = 1;

        for old in &self.old {
            let failed = |error| MigrateError::Old { place: old.installation.place(), error };
            for key in old.keys().map_err(failed)? {
                if self.reserved.contains(&key) {
                    continue;
                }
                let entry = Entry { origin: Entry::FOREIGN, established: 0, pending: 0 };
                match self.flows.insert(key, entry, ONLY_NEW) {
                    Ok(()) => drop(self.reserved.insert(key)),
                    // The new program has it: a daemon before this one had already begun.
                    Err(error) if is(&error, libc::EEXIST) => {}
                    Err(error) if is(&error, libc::E2BIG) => return Err(MigrateError::Full),
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }
}

fn is(error: &MapError, number: i32) -> bool {
    matches!(error, MapError::SyscallError(error) if error.io_error.raw_os_error() == Some(number))
}

/// Has the programs open nothing new. If they are `replaced`, another program protects the
/// backends' PROXY ports, and sends to them.
fn stop(installation: &Installation, replaced: bool) -> Result<(), MigrateError> {
    let clear = |name: &str| match installation.maps.get(name) {
        Some(map) => ByteMap::new(map.as_fd().try_clone_to_owned()?)?.clear(),
        None => Ok(()),
    };
    let failed = |error| MigrateError::Old { place: installation.place(), error };
    if installation.layout == Layout::V5 {
        // The rules first: these programs drop a connection that the rules lead to a backend past
        // the listeners.
        nat_rules::flush().map_err(MigrateError::Nat)?;
    }
    clear("LISTENERS").map_err(failed)?;
    if installation.layout == Layout::V5 && replaced {
        // Last: they drop what goes to a backend outside of their own connections, as those of the
        // new program are.
        thread::sleep(RUNNING);
        clear("BACKENDS").map_err(failed)?;
    }
    Ok(())
}

/// Removes what the old programs have left.
fn remove(installation: &Installation) {
    let place = installation.place();
    let removed = installation.detach().and_then(|()| Ok(installation.remove_pins()?));
    if let Err(error) = removed {
        let error = crate::engine::bpf::chain(&*error);
        tracing::warn!(target: target::ENGINE_INLINE, place, error, "programs of an earlier injector could not be removed; `injector inline detach` removes them");
    }
    if installation.layout == Layout::V5
        && let Err(error) = nat_rules::delete()
    {
        tracing::warn!(target: target::ENGINE_INLINE, %error, "the NAT table of an earlier injector could not be deleted; it has no rules any more");
    }
}

impl Old {
    /// The connections of an installation; the installation itself if it can have none.
    fn new(mut installation: Installation) -> io::Result<Result<Self, Installation>> {
        let Some(flows) = installation.maps.get("FLOWS") else { return Ok(Err(installation)) };
        let flows = ByteMap::new(flows.as_fd().try_clone_to_owned()?)?;
        let v5 = installation.layout == Layout::V5;
        let known = if v5 { flows.info().value_size == v5::FLOW_SIZE } else { flows.info().value_size >= 4 };
        if !installation.is_attached() || flows.info().key_size != KEY || !known {
            return Ok(Err(installation));
        }
        let pending =
            if v5 { installation.maps.remove("PENDING").map(ByteMap::new).transpose()? } else { None };
        Ok(Ok(Self { installation, flows, pending, stopped: false, since: Instant::now() }))
    }

    /// The addresses of what backends send to its connections. What clients send belongs to no
    /// entry of the new program, unless the client begins anew.
    fn keys(&self) -> io::Result<HashSet<Key>> {
        let v5 = self.installation.layout == Layout::V5;
        let now = crate::os::clock::monotonic_ns();
        let mut keys = HashSet::new();
        for map in std::iter::once(&self.flows).chain(&self.pending) {
            for key in map.keys()? {
                let Some(value) = map.get(&key)? else { continue };
                let is_pending = !std::ptr::eq(map, &self.flows);
                let own = if v5 { v5::is_open(&value, is_pending, now) } else { is_from_backend(&value) };
                if own && let Ok(key) = Key::read_from_bytes(&key) {
                    keys.insert(if v5 { v5::from_backend(&key) } else { key });
                }
            }
        }
        Ok(keys)
    }
}

/// Whether an entry of another layout's `FLOWS` is that of a backend's packets, and not itself
/// reserved.
fn is_from_backend(entry: &[u8]) -> bool {
    entry.first_chunk().is_some_and(|origin| u32::from_ne_bytes(*origin) == Entry::FROM_BACKEND)
}

/// Layout 5.
mod v5 {
    use super::Key;

    /// The length of a value of `FLOWS` and `PENDING`, and what is read of it.
    pub(super) const FLOW_SIZE: usize = 192;
    const STATE: usize = 20;
    const LAST_NS: usize = 88;
    const CLIENT_FIN: usize = STATE + 3;
    const BACKEND_FIN: usize = STATE + 4;
    const CLIENT_RST: usize = STATE + 6;
    const BACKEND_RST: usize = STATE + 7;

    const SECOND: u64 = 1_000_000_000;
    /// How long a handshake may take.
    const OPENING_NS: u64 = 60 * SECOND;
    /// How long segments of an ended connection may be sent again.
    const ENDED_NS: u64 = 60 * SECOND;
    /// How long an open connection may be silent: as long as TCP's own keepalive waits.
    const SILENT_NS: u64 = 7200 * SECOND;

    /// Whether packets of a connection may still come. This layout has no sweep without its daemon.
    pub(super) fn is_open(flow: &[u8], pending: bool, now_ns: u64) -> bool {
        let is = |at: usize| flow.get(at).is_some_and(|flag| *flag != 0);
        let last = flow.get(LAST_NS..).and_then(|rest| rest.first_chunk());
        let silent = now_ns.saturating_sub(last.map_or(0, |last| u64::from_ne_bytes(*last)));
        let closed = (is(CLIENT_FIN) && is(BACKEND_FIN)) || is(CLIENT_RST) || is(BACKEND_RST);
        let limit = match (pending, closed) {
            (true, _) => OPENING_NS,
            (false, true) => ENDED_NS,
            (false, false) => SILENT_NS,
        };
        silent <= limit
    }

    /// The addresses of what the backend sends, of a key that has those of what it is sent.
    pub(super) fn from_backend(key: &Key) -> Key {
        Key { source: key.destination, destination: key.source }
    }
}

#[cfg(test)]
mod tests {
    use injector_common::inline::Address;

    use super::*;

    #[test]
    fn a_key_of_layout_5_becomes_that_of_the_answers() {
        let address = |last, port| Address::new(Address::mapped([10, 0, 0, last]), port);
        let key = Key { source: address(1, 40_000), destination: address(2, 2525) };
        let answers = Key { source: address(2, 2525), destination: address(1, 40_000) };
        assert_eq!(v5::from_backend(&key), answers);
    }

    #[test]
    fn what_backends_send_is_reserved() {
        use zerocopy::IntoBytes as _;
        for (origin, expected) in
            [(Entry::FROM_CLIENT, false), (Entry::FROM_BACKEND, true), (Entry::FOREIGN, false)]
        {
            let entry = Entry { origin, established: 1, pending: 0 };
            assert_eq!(is_from_backend(entry.as_bytes()), expected);
        }
        assert!(!is_from_backend(&[2]));
    }

    #[test]
    fn connections_of_layout_5_end_by_their_state_or_by_silence() {
        const SECOND: u64 = 1_000_000_000;
        let flow = |flags: &[usize]| {
            let mut flow = [0; v5::FLOW_SIZE];
            flags.iter().for_each(|flag| flow[20 + flag] = 1);
            flow[88..96].copy_from_slice(&(10 * SECOND).to_ne_bytes());
            flow
        };
        for (flags, pending, seconds) in [
            (&[][..], false, 7200),
            (&[], true, 60),
            (&[3], false, 7200),
            (&[4], false, 7200),
            (&[3, 4], false, 60),
            (&[6], false, 60),
            (&[7], false, 60),
        ] {
            let open = |after| v5::is_open(&flow(flags), pending, (10_u64 + after) * SECOND);
            assert!(open(seconds) && !open(seconds + 1), "{flags:?}");
        }
    }
}
