//! What keeps the table of bans up to date: list files, the addresses that are protected, the state
//! file, and the operator's commands. One thread does the slow work, off the workers and the runtime.

mod follower;

use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, SystemTime},
};

use injector_common::guard::{Ban, Counter};
use tokio::sync::watch;

use self::follower::Follower;
use super::{
    crowdsec::Feed,
    handle::{Guard, Protection},
    lists::ListStatus,
    origin::{ListedBan, Origin, WantedBan},
    state::{self, Now},
};
use crate::{
    config::{self, Network},
    engine::guarded_device::GuardAttachment,
    os::clock,
    telemetry::{
        log::target,
        metrics::{CrowdSecMetrics, GuardSample, GuardSource, ListSample},
    },
};

/// The shortest prefixes that `injector ban` takes without `--force`.
const MIN_PREFIX_IPV4: u8 = 16;
const MIN_PREFIX_IPV6: u8 = 19;

/// The longest ban with an end.
pub const MAX_BAN: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The longest reason, in bytes.
const MAX_REASON: usize = 200;

/// The guard at work. Clones share it.
#[derive(Clone, Debug)]
pub struct Service(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    guard: Guard,
    max_bans: u32,
    state: Option<PathBuf>,
    inputs: Mutex<Inputs>,
    /// Wakes the thread before its time.
    wake: Condvar,
    files: Mutex<Vec<ListStatus>>,
    /// Held while the state file is written: the exit waits for that.
    saving: Mutex<()>,
    crowdsec: OnceLock<Feed>,
    /// `None` if bans are not in the kernel.
    attachment: Option<watch::Receiver<GuardAttachment>>,
}

/// What the thread works from.
#[derive(Debug, Default)]
struct Inputs {
    lists: Lists,
    peers: Vec<Network>,
    backends: BTreeSet<IpAddr>,
    /// The thread is to look at once.
    is_new: bool,
    /// Commands have changed bans that the state file has not got.
    is_unsaved: bool,
    is_stopped: bool,
}

/// The lists of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Lists {
    deny: Vec<Network>,
    deny_files: Vec<PathBuf>,
    allow: Vec<Network>,
    allow_files: Vec<PathBuf>,
}

impl Lists {
    fn of(settings: &config::Guard) -> Self {
        let config::Guard { deny, deny_files, allow, allow_files, .. } = settings.clone();
        Self { deny, deny_files, allow, allow_files }
    }
}

/// A ban by command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BanCommand {
    /// Whom.
    pub network: Network,
    /// How long; `None` if without end.
    pub duration: Option<Duration>,
    /// Why.
    pub reason: String,
    /// Also a very large network.
    pub force: bool,
}

/// Why a ban was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BanError {
    /// It would have no effect.
    #[error("{0} cannot be banned: {1}")]
    Protected(Network, Protection),
    /// It is most likely a mistake.
    #[error("{0} has more addresses than /{1}: if it is meant, add --force")]
    TooWide(Network, u8),
    /// The table is full.
    #[error(
        "no room for another ban: guard.max_bans is {0}; raise it and restart the injector, or lift other bans"
    )]
    Full(u32),
    /// Not a time that makes sense.
    #[error("a ban lasts more than 0 and at most ten years, or has no end")]
    Duration,
    /// The log and the state file have it in one line.
    #[error("the reason must be one line of at most {MAX_REASON} bytes")]
    Reason,
}

/// What lifting a ban did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unbanned {
    /// Whether a command had banned exactly this network.
    pub was_banned: bool,
    /// What else bans the whole network still.
    pub remaining: Vec<ListedBan>,
}

impl Service {
    /// Begins to follow the lists of `settings`. `peers` are the networks of `inline.peers`, and
    /// `attachment` is where the programs are attached, if there are any.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(
        guard: Guard,
        settings: &config::Guard,
        peers: &[Network],
        attachment: Option<watch::Receiver<GuardAttachment>>,
    ) -> io::Result<Self> {
        let inputs = Inputs { lists: Lists::of(settings), peers: peers.to_vec(), ..Inputs::default() };
        let service = Self(Arc::new(Shared {
            guard,
            max_bans: settings.max_bans,
            state: settings.state.clone(),
            inputs: Mutex::new(inputs),
            wake: Condvar::new(),
            files: Mutex::default(),
            saving: Mutex::default(),
            crowdsec: OnceLock::new(),
            attachment,
        }));
        service.load_state();
        let mut follower = Follower::new(service.clone());
        // Before the first connection, because bans of an earlier daemon are in effect.
        follower.protect();
        thread::Builder::new().name("guard".to_owned()).spawn(move || follower.run())?;
        Ok(service)
    }

    /// The table of bans.
    #[must_use]
    pub fn guard(&self) -> &Guard {
        &self.0.guard
    }

    /// The capacity of the table.
    #[must_use]
    pub fn max_bans(&self) -> u32 {
        self.0.max_bans
    }

    /// Begins to follow the decisions of CrowdSec, if the settings have it; decisions of an earlier
    /// daemon are no longer bans if they do not.
    ///
    /// # Errors
    /// When the system has no thread left, or this build has no CrowdSec.
    pub fn start_crowdsec(&self, settings: &config::Guard, metrics: CrowdSecMetrics) -> io::Result<()> {
        let max_bans = usize::try_from(self.0.max_bans).unwrap_or(usize::MAX);
        let feed = Feed::start(settings.crowdsec.clone(), self.guard().clone(), max_bans, metrics)?;
        // There is one service, which is started once.
        let _ = self.0.crowdsec.set(feed);
        Ok(())
    }

    /// Follows the lists and the LAPI of a new configuration from now on.
    pub fn set_lists(&self, settings: &config::Guard) {
        self.update(|inputs| inputs.lists = Lists::of(settings));
        if let Some(feed) = self.0.crowdsec.get() {
            feed.configure(settings.crowdsec.clone());
        }
    }

    /// Sets the addresses of the backends, which are protected.
    pub fn set_backends(&self, addresses: BTreeSet<IpAddr>) {
        if self.inputs().backends != addresses {
            self.update(|inputs| inputs.backends = addresses);
        }
    }

    /// Where the programs are attached; `None` if bans are not in the kernel.
    #[must_use]
    pub fn attachment(&self) -> Option<GuardAttachment> {
        Some(self.0.attachment.as_ref()?.borrow().clone())
    }

    /// Sets the networks of `inline.peers`, which are protected.
    pub fn set_peers(&self, networks: Vec<Network>) {
        if self.inputs().peers != networks {
            self.update(|inputs| inputs.peers = networks);
        }
    }

    /// The state of the list files.
    #[must_use]
    pub fn lists(&self) -> Vec<ListStatus> {
        self.0.files.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Bans a network by command. Returns whether it was banned by command before. May take long: not
    /// for a task.
    ///
    /// # Errors
    /// [`BanError`].
    pub fn ban(&self, command: BanCommand) -> Result<bool, BanError> {
        let BanCommand { network, duration, reason, force } = command;
        if duration.is_some_and(|time| time.is_zero() || time > MAX_BAN) {
            return Err(BanError::Duration);
        }
        if reason.len() > MAX_REASON || reason.chars().any(char::is_control) {
            return Err(BanError::Reason);
        }
        let least = if network.address().is_ipv4() { MIN_PREFIX_IPV4 } else { MIN_PREFIX_IPV6 };
        if network.prefix() < least && !force {
            return Err(BanError::TooWide(network, least));
        }
        let guard = self.guard();
        if let Some(protection) = guard.protection(network) {
            return Err(BanError::Protected(network, protection));
        }
        let end = |time: Duration| clock::boottime_ns() + u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let until_ns = duration.map_or(Ban::FOREVER, end);
        let was_banned = guard.has(Origin::Command, network);
        let ban = WantedBan { network, until_ns, reason: reason.into() };
        if guard.change(Origin::Command, vec![ban], Vec::new()).full > 0 {
            return Err(BanError::Full(self.0.max_bans));
        }
        self.update(|inputs| inputs.is_unsaved = true);
        Ok(was_banned)
    }

    /// Lifts the ban of a network by command. May take long: not for a task.
    pub fn unban(&self, network: Network) -> Unbanned {
        let was_banned = self.guard().change(Origin::Command, Vec::new(), vec![network]).removed > 0;
        if was_banned {
            self.update(|inputs| inputs.is_unsaved = true);
        }
        Unbanned { was_banned, remaining: self.guard().bans_around(network) }
    }

    /// Ends the thread, and saves the bans of commands. For the daemon's exit.
    pub fn stop(&self) {
        self.update(|inputs| inputs.is_stopped = true);
        self.save_state();
    }

    fn inputs(&self) -> MutexGuard<'_, Inputs> {
        self.0.inputs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, change: impl FnOnce(&mut Inputs)) {
        let mut inputs = self.inputs();
        change(&mut inputs);
        inputs.is_new = true;
        self.0.wake.notify_one();
    }

    fn load_state(&self) {
        let Some(path) = &self.0.state else { return };
        match state::load(path, now()) {
            Ok(Some((bans, bad))) => {
                let count = bans.len();
                self.guard().replace(Origin::Command, bans);
                tracing::info!(target: target::GUARD, file = %path.display(), count, "bans of commands continue");
                if bad > 0 {
                    tracing::warn!(target: target::GUARD, file = %path.display(), bad, "lines of the state file are not bans, and are dropped");
                }
            }
            Ok(None) => self.inputs().is_unsaved = true,
            Err(error) => {
                tracing::error!(target: target::GUARD, file = %path.display(), %error, "the state file cannot be read; of the bans by command, those that are still in the kernel continue");
            }
        }
    }

    fn save_state(&self) {
        let Some(path) = &self.0.state else { return };
        let _saving = self.0.saving.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::take(&mut self.inputs().is_unsaved) {
            return;
        }
        let bans = self.guard().snapshot(Some(Origin::Command), usize::MAX).bans;
        let bans: Vec<_> = bans.into_iter().map(|listed| listed.ban).collect();
        if let Err(error) = state::save(path, &bans, now()) {
            tracing::error!(target: target::GUARD, file = %path.display(), %error, "the state file cannot be written; bans by command are lost when the host restarts");
        }
    }
}

impl GuardSource for Service {
    fn sample(&self) -> GuardSample {
        let guard = self.guard();
        let list = |status: ListStatus| ListSample {
            file: status.file.display().to_string(),
            networks: status.networks,
            failed: status.error.is_some(),
            read_at: status.read_at,
        };
        GuardSample {
            bans: Origin::ALL.map(|origin| (origin.name(), guard.count(origin))).to_vec(),
            max_bans: self.0.max_bans,
            dropped: dropped(guard),
            rejected_full: guard.rejected_full(),
            is_behind: guard.is_behind(),
            lists: self.lists().into_iter().map(list).collect(),
        }
    }
}

/// Packets dropped in the kernel, by hook; empty if bans are not in the kernel.
#[must_use]
pub fn dropped(guard: &Guard) -> Vec<(&'static str, u64)> {
    Counter::ALL.into_iter().filter_map(|by| Some((by.label(), guard.dropped(by)?))).collect()
}

fn now() -> Now {
    Now { wall: SystemTime::now(), boottime_ns: clock::boottime_ns() }
}

#[cfg(test)]
#[path = "service/tests.rs"]
mod tests;
