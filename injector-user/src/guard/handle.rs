//! The handle of the guard: who is banned, and changes of it.

use std::{
    fmt,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use injector_common::guard::{Ban, Counter};
use tokio::sync::watch;

use super::{
    origin::{ListedBan, Origin, WantedBan},
    prefix_map::PrefixMap,
    table::{Inserted, Table},
};
use crate::{
    config::Network,
    engine::bans::{BanChange, BanMaps},
    os::clock,
    telemetry::log::target,
};

/// How many changes are made in one go, while the workers that ask the table wait. Some 100 µs.
const CHANGES_AT_ONCE: usize = 128;

/// How long the table is left to the workers after that. A lock that is taken again at once is taken
/// before the threads that wait for it are awake.
const LEFT_TO_WORKERS: Duration = Duration::from_micros(50);

/// How many changes are given to the kernel in one go.
const WRITTEN_AT_ONCE: usize = 16_384;

/// The bans. Clones share one table.
#[derive(Clone, Debug)]
pub struct Guard(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    table: RwLock<Table>,
    /// Whether the table has bans: without any, no connection waits for its lock.
    has_bans: AtomicBool,
    /// Another number after each change after which other sources are banned.
    generation: AtomicU64,
    protected: RwLock<PrefixMap<(), Protection>>,
    max_bans: usize,
    /// Held during a change, and until the kernel has it.
    writer: Mutex<Writer>,
    maps: Option<Arc<dyn BanMaps>>,
    /// Counts changes after which other sources are banned.
    changed: watch::Sender<u64>,
    /// Bans that were not taken since the start.
    rejected_full: AtomicUsize,
    /// Whether the kernel has not got all changes.
    behind: AtomicBool,
}

#[derive(Debug)]
struct Writer {
    /// The earliest end of a ban, in nanoseconds of `CLOCK_BOOTTIME`.
    next_end_ns: u64,
}

/// What a change did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Bans that are new or end at another time.
    pub added: usize,
    /// Bans that are no more.
    pub removed: usize,
    /// Bans of a source that may not be banned. They are in the table, and have no effect as long as
    /// the source is protected.
    pub protected: usize,
    /// Bans that did not fit into `guard.max_bans`, and were not taken.
    pub full: usize,
}

/// Bans, as `injector bans` lists them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// How many there are, listed or not.
    pub count: usize,
    /// In the order of addresses.
    pub bans: Vec<ListedBan>,
}

/// Why a network may not be banned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protection {
    /// `guard.allow` or a file of `guard.allow_files` has it.
    Allow,
    /// It is the address of a backend.
    Backend,
    /// It is an address of this host.
    OwnAddress,
    /// It is a gateway of this host.
    Gateway,
    /// It is a peer of `inline.peers`.
    InlinePeer,
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "guard.allow or guard.allow_files contains it",
            Self::Backend => "it is the address of a backend",
            Self::OwnAddress => "it is an address of this host",
            Self::Gateway => "it is a gateway of this host",
            Self::InlinePeer => "inline.peers contains it",
        })
    }
}

impl Guard {
    /// A table for bans of up to `max_bans` networks. `maps` are the kernel's; without them, only the
    /// daemon knows the bans. Bans that an earlier daemon left in the maps continue.
    #[must_use]
    pub fn new(maps: Option<Arc<dyn BanMaps>>, max_bans: usize) -> Self {
        let guard = Self(Arc::new(Shared {
            table: RwLock::default(),
            has_bans: AtomicBool::new(false),
            // Not 0, which is that of a place where nothing is remembered.
            generation: AtomicU64::new(1),
            protected: RwLock::default(),
            max_bans,
            writer: Mutex::new(Writer { next_end_ns: Ban::FOREVER }),
            maps,
            changed: watch::Sender::new(0),
            rejected_full: AtomicUsize::new(0),
            behind: AtomicBool::new(false),
        }));
        guard.restore();
        guard
    }

    /// Whether the source is banned now, and not protected.
    #[must_use]
    pub fn is_banned(&self, source: IpAddr) -> bool {
        self.0.has_bans.load(Ordering::Relaxed)
            && self.table().bans(source, clock::boottime_ns)
            && !self.is_allowed(source)
    }

    /// The number of the bans and of what may not be banned. After a change it is another one.
    #[must_use]
    pub(super) fn generation(&self) -> u64 {
        self.0.generation.load(Ordering::Acquire)
    }

    /// To be called after a change, and before the lock is released in which it was made.
    fn next_generation(&self) {
        self.0.generation.fetch_add(1, Ordering::Release);
    }

    /// Whether the source may not be banned.
    #[must_use]
    pub fn is_allowed(&self, source: IpAddr) -> bool {
        self.protected().contains(source)
    }

    /// Why no ban of this network has an effect; `None` if it has.
    #[must_use]
    pub fn protection(&self, network: Network) -> Option<Protection> {
        self.protected().around(network).map(|(.., protection)| *protection).next()
    }

    /// Replaces all bans of an origin. May take seconds: not for a worker thread or a task.
    pub fn replace(&self, origin: Origin, mut bans: Vec<WantedBan>) -> Applied {
        // Of several bans of one network, the latest end.
        bans.sort_unstable_by(|a, b| a.network.cmp(&b.network).then(b.until_ns.cmp(&a.until_ns)));
        bans.dedup_by_key(|ban| ban.network);
        self.replace_sorted(origin, bans.iter().cloned())
    }

    /// The same with bans in the order of their networks, one of each.
    pub fn replace_sorted(&self, origin: Origin, bans: impl Iterator<Item = WantedBan> + Clone) -> Applied {
        let mut writer = self.writer();
        let mut wanted = bans.clone().map(|ban| ban.network).peekable();
        let is_gone = |network: &Network| {
            while wanted.next_if(|wanted| wanted < network).is_some() {}
            wanted.peek() != Some(network)
        };
        let gone = self.table().networks_of(origin).filter(is_gone).collect();
        self.apply(&mut writer, origin, bans, gone)
    }

    /// Adds and removes bans of an origin. A ban that is there gets the new end and reason. May take
    /// seconds: not for a worker thread or a task.
    pub fn change(
        &self,
        origin: Origin,
        set: impl IntoIterator<Item = WantedBan>,
        remove: Vec<Network>,
    ) -> Applied {
        self.apply(&mut self.writer(), origin, set, remove)
    }

    /// Replaces what may not be banned. May take long: not for a worker thread or a task.
    pub fn set_protected(&self, networks: &[(Network, Protection)]) {
        let _writer = self.writer();
        let mut protected = PrefixMap::default();
        for (network, protection) in networks {
            protected.insert(*network, (), *protection);
        }
        {
            let mut present = self.0.protected.write().unwrap_or_else(PoisonError::into_inner);
            *present = protected;
            self.next_generation();
        }
        self.0.changed.send_modify(|count| *count += 1);
        if let Some(maps) = &self.0.maps {
            let networks: Vec<_> = networks.iter().map(|(network, _)| *network).collect();
            self.note(maps.set_allowed(&networks));
        }
    }

    /// Removes the bans that are over, and gives the kernel what it did not take before. To be called
    /// now and then. May take seconds: not for a worker thread or a task.
    pub fn maintain(&self) {
        let mut writer = self.writer();
        let now_ns = clock::boottime_ns();
        if writer.next_end_ns <= now_ns {
            let (expired, next_end_ns) = self.table().expired(now_ns);
            writer.next_end_ns = next_end_ns;
            for origin in Origin::ALL {
                let gone = expired.iter().filter(|(by, _)| *by == origin).map(|(_, network)| *network);
                self.apply(&mut writer, origin, [], gone.collect());
            }
        }
        if self.0.behind.load(Ordering::Relaxed) {
            self.rewrite();
        }
    }

    /// The bans of an origin, or of all, up to `limit`.
    #[must_use]
    pub fn snapshot(&self, origin: Option<Origin>, limit: usize) -> Snapshot {
        let table = self.table();
        let of_origin = |listed: &ListedBan| origin.is_none_or(|origin| listed.origin == origin);
        let bans = table.list(clock::boottime_ns()).filter(of_origin).take(limit).collect();
        let count = Origin::ALL.into_iter().filter(|it| origin.is_none_or(|origin| *it == origin));
        Snapshot { count: count.map(|origin| table.count(origin)).sum(), bans }
    }

    /// The bans of all networks that contain this one, the smallest first.
    #[must_use]
    pub fn bans_around(&self, network: Network) -> Vec<ListedBan> {
        self.table().around(network, clock::boottime_ns()).collect()
    }

    /// Whether an origin wants exactly this network banned.
    #[must_use]
    pub fn has(&self, origin: Origin, network: Network) -> bool {
        self.table().has(origin, network)
    }

    /// How many bans an origin wants.
    #[must_use]
    pub fn count(&self, origin: Origin) -> usize {
        self.table().count(origin)
    }

    /// Bans that did not fit since the start.
    #[must_use]
    pub fn rejected_full(&self) -> usize {
        self.0.rejected_full.load(Ordering::Relaxed)
    }

    /// Whether the kernel lacks changes, because it refused them.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.0.behind.load(Ordering::Relaxed)
    }

    /// Packets that a program dropped so far; `None` if bans are not in the kernel.
    #[must_use]
    pub fn dropped(&self, by: Counter) -> Option<u64> {
        self.0.maps.as_ref().map(|maps| maps.dropped(by))
    }

    /// Changes after which other sources may be banned than before, except by command.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    /// Makes a change in parts: no part of a long list is more than once in memory.
    fn apply(
        &self,
        writer: &mut Writer,
        origin: Origin,
        set: impl IntoIterator<Item = WantedBan>,
        remove: Vec<Network>,
    ) -> Applied {
        let (mut applied, mut written) = (Applied::default(), Ok(()));
        let mut write = |changed: Vec<Network>| {
            if written.is_ok() {
                written = self.write_affected(changed);
            }
        };
        // First, because it makes room.
        for networks in remove.chunks(WRITTEN_AT_ONCE) {
            let mut changed = Vec::with_capacity(networks.len());
            for networks in networks.chunks(CHANGES_AT_ONCE) {
                self.edit(|table| {
                    let removed = networks.iter().copied().filter(|network| table.remove(origin, *network));
                    changed.extend(removed);
                });
            }
            applied.removed += changed.len();
            write(changed);
        }
        let mut set = set.into_iter().peekable();
        while set.peek().is_some() {
            let mut changed = Vec::new();
            while set.peek().is_some() && changed.len() < WRITTEN_AT_ONCE {
                let bans: Vec<_> = set.by_ref().take(CHANGES_AT_ONCE).collect();
                applied.protected += self.count_protected(&bans);
                self.edit(|table| {
                    for ban in bans {
                        let (network, until_ns) = (ban.network, ban.until_ns);
                        match table.insert(origin, ban, self.0.max_bans) {
                            Inserted::Unchanged => {}
                            Inserted::Full => applied.full += 1,
                            Inserted::Added | Inserted::Renewed => {
                                changed.push(network);
                                writer.next_end_ns = writer.next_end_ns.min(until_ns);
                            }
                        }
                    }
                });
            }
            applied.added += changed.len();
            write(changed);
        }
        self.0.has_bans.store(!self.table().is_empty(), Ordering::Relaxed);
        self.0.rejected_full.fetch_add(applied.full, Ordering::Relaxed);
        self.note(written);
        // Who gives a command ends the sessions.
        if applied.added > 0 && origin != Origin::Command {
            self.0.changed.send_modify(|count| *count += 1);
        }
        applied
    }

    fn count_protected(&self, bans: &[WantedBan]) -> usize {
        let protected = self.protected();
        bans.iter().filter(|ban| protected.around(ban.network).next().is_some()).count()
    }

    /// Changes the table a little; `change` makes [`CHANGES_AT_ONCE`] at most.
    fn edit(&self, change: impl FnOnce(&mut Table)) {
        let mut table = self.table_mut();
        // From the first of them on, workers ask.
        self.0.has_bans.store(true, Ordering::Relaxed);
        change(&mut table);
        self.next_generation();
        drop(table);
        thread::sleep(LEFT_TO_WORKERS);
    }

    /// Gives the kernel what has changed with these networks.
    fn write_affected(&self, changed: Vec<Network>) -> anyhow::Result<()> {
        let Some(maps) = &self.0.maps else { return Ok(()) };
        let affected = self.table().affected(changed);
        self.write(maps.as_ref(), &affected)
    }

    fn write(&self, maps: &dyn BanMaps, networks: &[Network]) -> anyhow::Result<()> {
        for networks in networks.chunks(WRITTEN_AT_ONCE) {
            let change = |table: &Table, network| match table.effective(network) {
                Some(ban) => BanChange::Set(network, ban),
                None => BanChange::Remove(network),
            };
            let changes: Vec<_> = {
                let table = self.table();
                networks.iter().map(|network| change(&table, *network)).collect()
            };
            maps.write(&changes)?;
        }
        Ok(())
    }

    /// Makes the maps what they must be, after a write that failed.
    fn rewrite(&self) {
        let Some(maps) = &self.0.maps else { return };
        let written = || -> anyhow::Result<()> {
            let mut unwanted = Vec::new();
            maps.read(&mut |network, _| {
                if !self.table().has_any(network) {
                    unwanted.push(network);
                }
            })?;
            // First, because it makes room.
            self.write(maps.as_ref(), &unwanted)?;
            let wanted = self.table().networks();
            self.write(maps.as_ref(), &wanted)?;
            let allowed: Vec<_> = self.protected().iter().map(|(network, ..)| network).collect();
            maps.set_allowed(&allowed)
        }();
        if written.is_ok() {
            self.0.behind.store(false, Ordering::Relaxed);
            tracing::info!(target: target::GUARD, "the kernel has all bans again");
        }
    }

    fn note(&self, written: anyhow::Result<()>) {
        if let Err(error) = written
            && !self.0.behind.swap(true, Ordering::Relaxed)
        {
            tracing::error!(target: target::GUARD, error = format!("{error:#}"), "the kernel did not take a change of the bans, which is tried again; meanwhile some banned sources reach the daemon, which resets their connections, and some that are not banned any more may be dropped");
        }
    }

    /// Takes over what an earlier daemon has left in the kernel, by the origins that wanted it.
    fn restore(&self) {
        let Some(maps) = &self.0.maps else { return };
        let reason: Arc<str> = "from before the restart".into();
        let now_ns = clock::boottime_ns();
        let mut writer = self.writer();
        let mut unwanted = Vec::new();
        let read = {
            let mut table = self.table_mut();
            maps.read(&mut |network, ban| {
                let wanted = WantedBan { network, until_ns: ban.until_ns, reason: Arc::clone(&reason) };
                let wants_it = |origin: &Origin| ban.holds(now_ns) && ban.origins & origin.bit() != 0;
                for origin in Origin::ALL.into_iter().filter(wants_it) {
                    table.insert(origin, wanted.clone(), self.0.max_bans);
                }
                // It is over, or ended before the ban of a network around it, which stays.
                if !table.has_any(network) {
                    unwanted.push(network);
                }
                writer.next_end_ns = writer.next_end_ns.min(ban.until_ns);
            })
        };
        self.0.has_bans.store(!self.table().is_empty(), Ordering::Relaxed);
        self.note(read.and_then(|()| self.write(maps.as_ref(), &unwanted)));
    }

    fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.0.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn table_mut(&self) -> RwLockWriteGuard<'_, Table> {
        self.0.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn protected(&self) -> RwLockReadGuard<'_, PrefixMap<(), Protection>> {
        self.0.protected.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn writer(&self) -> std::sync::MutexGuard<'_, Writer> {
        self.0.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[path = "handle/tests.rs"]
mod tests;
