//! The thread that reads the list files, protects addresses, and removes bans that are over.

use std::{
    fmt, io, iter,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, PoisonError},
    time::Duration,
};

use injector_common::guard::Ban;

use super::{
    handle::Protection,
    lists::FollowedFile,
    network_list::NetworkList,
    origin::{Origin, WantedBan},
    shared::{Lists, Shared},
};
use crate::{config::Network, os::gateways, telemetry::log::target};

/// How often files, addresses and ends are looked at.
const INTERVAL: Duration = Duration::from_secs(2);

/// The thread's own state.
pub(super) struct Follower {
    shared: Arc<Shared>,
    deny: Vec<FollowedFile>,
    allow: Vec<FollowedFile>,
    /// The lists whose bans are in the table.
    applied: Option<Lists>,
    /// What is protected, as the guard has it.
    protected: Vec<(Network, Protection)>,
}

impl fmt::Debug for Follower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Follower").finish_non_exhaustive()
    }
}

impl Follower {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, deny: Vec::new(), allow: Vec::new(), applied: None, protected: Vec::new() }
    }

    pub(super) fn run(mut self) {
        loop {
            self.protect();
            self.apply_deny();
            self.publish();
            self.shared.guard.maintain();
            self.shared.save_state();
            let inputs = self.shared.inputs();
            let waited = self.shared.wake.wait_timeout_while(inputs, INTERVAL, |inputs| !inputs.is_new);
            let (mut inputs, _) = waited.unwrap_or_else(PoisonError::into_inner);
            inputs.is_new = false;
            if inputs.is_stopped {
                return;
            }
        }
    }

    /// Brings up to date what may not be banned.
    pub(super) fn protect(&mut self) {
        let (lists, peers, backends) = {
            let inputs = self.shared.inputs();
            (inputs.lists.clone(), inputs.peers.clone(), inputs.backends.clone())
        };
        follow(&mut self.allow, &lists.allow_files);
        for file in &mut self.allow {
            refresh(file, "guard.allow_files");
        }
        let files = self.allow.iter().filter_map(FollowedFile::networks).flat_map(NetworkList::iter);
        let own = if_addrs::get_if_addrs().map(|own| own.iter().map(|it| it.ip()).collect());
        let protected = ordered([
            (Protection::Allow, lists.allow.into_iter().chain(files).collect()),
            (Protection::Backend, hosts(backends)),
            (Protection::OwnAddress, own_addresses(own, &self.protected)),
            (Protection::Gateway, hosts(gateways::gateways())),
            (Protection::InlinePeer, peers),
        ]);
        if protected != self.protected {
            self.shared.guard.set_protected(&protected);
            self.protected = protected;
        }
    }

    /// Brings the bans of the lists up to date.
    fn apply_deny(&mut self) {
        let lists = self.shared.inputs().lists.clone();
        follow(&mut self.deny, &lists.deny_files);
        let mut changed = false;
        for file in &mut self.deny {
            changed |= refresh(file, "guard.deny_files");
        }
        if !changed && self.applied.as_ref() == Some(&lists) {
            return;
        }
        let configured: NetworkList = lists.deny.iter().copied().collect();
        let files = self.deny.iter().filter_map(|file| {
            let reason: Arc<str> = file.path().display().to_string().into();
            Some((reason, file.networks()?))
        });
        let all = NetworkList::union(iter::once(("guard.deny".into(), &configured)).chain(files));
        let bans = all.map(|(network, reason)| WantedBan { network, until_ns: Ban::FOREVER, reason });
        let guard = &self.shared.guard;
        let is_complete = self.deny.iter().all(|file| file.networks().is_some());
        let applied = if is_complete {
            guard.replace_sorted(Origin::List, bans)
        } else {
            // What an earlier daemon read from a file that cannot be read now stays.
            guard.change(Origin::List, bans, Vec::new())
        };
        self.applied = Some(lists);
        tracing::info!(target: target::GUARD, added = applied.added, removed = applied.removed, protected = applied.protected, "lists of bans applied");
        if applied.full > 0 {
            tracing::error!(target: target::GUARD, count = applied.full, max_bans = self.shared.max_bans, "networks of the lists are not banned, because guard.max_bans is reached: raise it and restart the injector");
        }
    }

    fn publish(&self) {
        let files = self.deny.iter().chain(&self.allow).map(FollowedFile::status).collect();
        *self.shared.files.lock().unwrap_or_else(PoisonError::into_inner) = files;
    }
}

fn hosts(addresses: impl IntoIterator<Item = IpAddr>) -> Vec<Network> {
    addresses.into_iter().map(Network::host).collect()
}

/// Each network once, with the first of its reasons.
pub(super) fn ordered(
    reasons: impl IntoIterator<Item = (Protection, Vec<Network>)>,
) -> Vec<(Network, Protection)> {
    let all = reasons.into_iter().flat_map(|(why, networks)| networks.into_iter().map(move |it| (it, why)));
    let mut all: Vec<_> = all.collect();
    all.sort_unstable();
    all.dedup_by_key(|(network, _)| *network);
    all
}

/// The addresses of this host, as found, or as they were protected before if they cannot be listed now.
pub(super) fn own_addresses(
    found: io::Result<Vec<IpAddr>>,
    before: &[(Network, Protection)],
) -> Vec<Network> {
    let was_own =
        |(network, why): &(Network, Protection)| (*why == Protection::OwnAddress).then_some(*network);
    found.map_or_else(|_| before.iter().filter_map(was_own).collect(), hosts)
}

/// Makes `files` those of the configuration. Files that stay keep what is known of them.
fn follow(files: &mut Vec<FollowedFile>, paths: &[PathBuf]) {
    let mut before = std::mem::take(files);
    for path in paths {
        let known = before.iter().position(|file| file.path() == path);
        files.push(known.map_or_else(|| FollowedFile::new(path.clone()), |at| before.swap_remove(at)));
    }
}

/// Reads a file if it has changed, and logs what became of it. Whether other networks are in effect.
fn refresh(file: &mut FollowedFile, list: &str) -> bool {
    let (networks, error) = (file.networks().map(NetworkList::len), file.error().map(str::to_owned));
    if !file.refresh() {
        return false;
    }
    let path = file.path().display();
    match file.error() {
        Some(error) => {
            tracing::error!(target: target::GUARD, list, file = %path, error, in_effect = networks.unwrap_or(0), "a list cannot be read; what it said before stays in effect");
        }
        None => {
            let networks = file.networks().map_or(0, NetworkList::len);
            tracing::info!(target: target::GUARD, list, file = %path, networks, was_unreadable = error.is_some(), "list read");
        }
    }
    file.error().is_none()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    const FILES: usize = 5;

    /// Files of a configuration, by their numbers.
    fn files() -> impl Strategy<Value = Vec<usize>> {
        prop::sample::subsequence((0..FILES).collect::<Vec<_>>(), 0..=FILES).prop_shuffle()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Also in another order, and while they are broken. Files that were not followed before have none.
        #[test]
        fn files_that_stay_keep_their_networks(before in files(), after in files()) {
            let dir = tempfile::tempdir().unwrap();
            let path = |file: &usize| dir.path().join(file.to_string());
            let network = |file: &usize| format!("192.0.2.{file}").parse::<Network>().unwrap();
            for file in 0..FILES {
                fs::write(path(&file), network(&file).to_string()).unwrap();
            }
            let mut followed = Vec::new();
            for numbers in [&before, &after] {
                follow(&mut followed, &numbers.iter().map(path).collect::<Vec<_>>());
                for file in &mut followed {
                    file.refresh();
                }
                (0..FILES).for_each(|file| fs::write(path(&file), "nonsense").unwrap());
            }
            prop_assert!(followed.iter().map(FollowedFile::path).eq(after.iter().map(path)));
            for (file, number) in followed.iter().zip(&after) {
                let networks = file.networks().map(|networks| networks.iter().collect::<Vec<_>>());
                prop_assert_eq!(networks, before.contains(number).then(|| vec![network(number)]));
                prop_assert!(file.error().is_some());
            }
        }
    }
}
