//! What the guard's service and its thread share.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::PathBuf,
    sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    time::SystemTime,
};

use tokio::sync::watch;

use super::{
    crowdsec::Feed,
    handle::Guard,
    lists::ListStatus,
    origin::Origin,
    state::{self, Now},
};
use crate::{
    config::{self, Network},
    engine::guarded_device::GuardAttachment,
    os::clock,
    telemetry::log::target,
};

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) guard: Guard,
    pub(super) max_bans: u32,
    pub(super) state: Option<PathBuf>,
    pub(super) inputs: Mutex<Inputs>,
    /// Wakes the thread before its time.
    pub(super) wake: Condvar,
    pub(super) files: Mutex<Vec<ListStatus>>,
    /// Held while the state file is written: the exit waits for that.
    pub(super) saving: Mutex<()>,
    pub(super) crowdsec: OnceLock<Feed>,
    /// `None` if bans are not in the kernel.
    pub(super) attachment: Option<watch::Receiver<GuardAttachment>>,
}

/// What the thread works from.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    pub(super) lists: Lists,
    pub(super) peers: Vec<Network>,
    pub(super) backends: BTreeSet<IpAddr>,
    /// The thread is to look at once.
    pub(super) is_new: bool,
    /// Commands have changed bans that the state file has not got.
    pub(super) is_unsaved: bool,
    pub(super) is_stopped: bool,
}

/// The lists of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lists {
    pub(super) deny: Vec<Network>,
    pub(super) deny_files: Vec<PathBuf>,
    pub(super) allow: Vec<Network>,
    pub(super) allow_files: Vec<PathBuf>,
}

impl Lists {
    pub(super) fn of(settings: &config::Guard) -> Self {
        let config::Guard { deny, deny_files, allow, allow_files, .. } = settings.clone();
        Self { deny, deny_files, allow, allow_files }
    }
}

impl Shared {
    pub(super) fn inputs(&self) -> MutexGuard<'_, Inputs> {
        self.inputs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut Inputs)) {
        let mut inputs = self.inputs();
        change(&mut inputs);
        inputs.is_new = true;
        self.wake.notify_one();
    }

    pub(super) fn load_state(&self) {
        let Some(path) = &self.state else { return };
        match state::load(path, now()) {
            Ok(Some((bans, bad))) => {
                let count = bans.len();
                self.guard.replace(Origin::Command, bans);
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

    pub(super) fn save_state(&self) {
        let Some(path) = &self.state else { return };
        let _saving = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::take(&mut self.inputs().is_unsaved) {
            return;
        }
        let bans = self.guard.snapshot(Some(Origin::Command), usize::MAX).bans;
        let bans: Vec<_> = bans.into_iter().map(|listed| listed.ban).collect();
        if let Err(error) = state::save(path, &bans, now()) {
            tracing::error!(target: target::GUARD, file = %path.display(), %error, "the state file cannot be written; bans by command are lost when the host restarts");
        }
    }
}

fn now() -> Now {
    Now { wall: SystemTime::now(), boottime_ns: clock::boottime_ns() }
}
