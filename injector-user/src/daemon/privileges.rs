//! Gives up what only startup needs. What follows (reloads, new connections, new devices, the exit)
//! works with the rest.

use std::{
    fs::File,
    iter,
    path::{Path, PathBuf},
};

use caps::Capability;

use crate::{
    config::{Admin, Guard, Kubernetes},
    engine::{
        kernel::{InlineEngine, KernelGuard, LoadedSplice},
        registry::EngineProbes,
    },
    kubernetes::Watcher,
    os::{
        capabilities,
        landlock::{self, Directories, Enforced},
    },
    telemetry::log::target,
};

/// Keeps the capabilities that the kernel engines need at run time, the one to bind ports below
/// 1024, which a reload may add, and the files that are used later. No later program gets more. What
/// the kernel refuses is logged: the daemon runs without it.
pub(super) fn drop_privileges(
    probes: &EngineProbes,
    inline: Option<&InlineEngine>,
    kernel_guard: Option<&KernelGuard>,
    config: &Path,
    kubernetes: &Kubernetes,
    admin: Option<&Admin>,
    guard: Option<&Guard>,
) {
    // First, because Landlock needs it.
    if let Err(error) = capabilities::set_no_new_privs() {
        tracing::warn!(target: target::DAEMON, %error, "no_new_privs cannot be set; a program that an attacker started could gain privileges");
    }
    let mut write = inline.map(InlineEngine::directories).unwrap_or_default();
    write.extend(kernel_guard.map(KernelGuard::directories).unwrap_or_default());
    restrict_files(write, (config, Watcher::directories(kubernetes)), admin, guard);
    drop_capabilities(probes, inline, kernel_guard);
    if let Err(error) = File::open(config) {
        tracing::warn!(target: target::DAEMON, file = %config.display(), %error, "the configuration cannot be read any more without the capabilities of root, so reloads will fail: make the file and its directory readable for the user that the injector runs as");
    }
}

fn drop_capabilities(probes: &EngineProbes, inline: Option<&InlineEngine>, guard: Option<&KernelGuard>) {
    let mut keep = vec![Capability::CAP_NET_BIND_SERVICE];
    keep.extend(inline.map(InlineEngine::capabilities).unwrap_or_default());
    keep.extend(guard.map(KernelGuard::capabilities).unwrap_or_default());
    keep.extend(probes.splice_engine().map(LoadedSplice::capabilities).unwrap_or_default());
    match capabilities::drop_all_except(&keep) {
        Ok(kept) => tracing::info!(target: target::DAEMON, ?kept, "capabilities dropped"),
        Err(error) => {
            tracing::warn!(target: target::DAEMON, %error, "dropping capabilities failed; the daemon may keep more than it needs");
        }
    }
}

fn restrict_files(
    mut write: Vec<PathBuf>,
    (config, credentials): (&Path, Vec<PathBuf>),
    admin: Option<&Admin>,
    guard: Option<&Guard>,
) {
    let lists = guard.into_iter().flat_map(|guard| guard.deny_files.iter().chain(&guard.allow_files));
    let crowdsec = guard.and_then(|guard| guard.crowdsec.as_ref()).into_iter();
    let lists = lists.chain(crowdsec.flat_map(|it| iter::once(&it.api_key_file).chain(&it.ca_file)));
    let mut read = landlock::directories_of(config);
    read.extend(credentials);
    read.extend(lists.flat_map(|file| landlock::directories_of(file)));
    read.sort_unstable();
    read.dedup();
    write.extend(guard.and_then(|guard| guard.state.as_ref()?.parent()).map(Path::to_owned));
    let directories = Directories {
        read,
        write,
        // The control socket, at the exit.
        remove: admin.and_then(|admin| admin.socket.parent()).map(Path::to_owned).into_iter().collect(),
    };
    let Directories { read, write, remove } = &directories;
    match landlock::restrict(&directories) {
        Ok(Enforced::No) => {
            tracing::info!(target: target::DAEMON, "files are not restricted: the kernel, or a filter of system calls, does not allow Landlock");
        }
        Ok(enforced) => {
            let partly = enforced == Enforced::Partly;
            tracing::info!(target: target::DAEMON, ?read, ?write, ?remove, partly, "files restricted by Landlock to these directories and to reading the system's settings");
        }
        Err(error) => {
            tracing::warn!(target: target::DAEMON, %error, "files are not restricted: Landlock failed");
        }
    }
}
