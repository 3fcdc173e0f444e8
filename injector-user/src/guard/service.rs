//! What keeps the table of bans up to date: list files, the addresses that are protected, the state
//! file, and the operator's commands. One thread does the slow work, off the workers and the runtime.

use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    sync::{Arc, Condvar, Mutex, OnceLock, PoisonError},
    thread,
    time::Duration,
};

use injector_common::guard::{Ban, Counter};
use tokio::sync::watch;

use super::{
    crowdsec::Feed,
    follower::Follower,
    handle::{Guard, Protection},
    lists::ListStatus,
    origin::{ListedBan, Origin, WantedBan},
    shared::{Inputs, Lists, Shared},
};
use crate::{
    config::{self, Network},
    engine::guarded_device::GuardAttachment,
    os::clock,
    telemetry::metrics::{CrowdSecMetrics, GuardSample, GuardSource, ListSample},
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
        service.0.load_state();
        let mut follower = Follower::new(Arc::clone(&service.0));
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
        self.0.update(|inputs| inputs.lists = Lists::of(settings));
        if let Some(feed) = self.0.crowdsec.get() {
            feed.configure(settings.crowdsec.clone());
        }
    }

    /// Sets the addresses of the backends, which are protected.
    pub fn set_backends(&self, addresses: BTreeSet<IpAddr>) {
        if self.0.inputs().backends != addresses {
            self.0.update(|inputs| inputs.backends = addresses);
        }
    }

    /// Where the programs are attached; `None` if bans are not in the kernel.
    #[must_use]
    pub fn attachment(&self) -> Option<GuardAttachment> {
        Some(self.0.attachment.as_ref()?.borrow().clone())
    }

    /// Sets the networks of `inline.peers`, which are protected.
    pub fn set_peers(&self, networks: Vec<Network>) {
        if self.0.inputs().peers != networks {
            self.0.update(|inputs| inputs.peers = networks);
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
        self.0.update(|inputs| inputs.is_unsaved = true);
        Ok(was_banned)
    }

    /// Lifts the ban of a network by command. May take long: not for a task.
    pub fn unban(&self, network: Network) -> Unbanned {
        let was_banned = self.guard().change(Origin::Command, Vec::new(), vec![network]).removed > 0;
        if was_banned {
            self.0.update(|inputs| inputs.is_unsaved = true);
        }
        Unbanned { was_banned, remaining: self.guard().bans_around(network) }
    }

    /// Ends the thread, and saves the bans of commands. For the daemon's exit.
    pub fn stop(&self) {
        self.0.update(|inputs| inputs.is_stopped = true);
        self.0.save_state();
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

#[cfg(test)]
#[path = "service/tests.rs"]
mod tests;
