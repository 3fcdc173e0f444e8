//! The engines, with their BPF programs in the binary.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use caps::Capability;
use tokio::sync::{Notify, watch};

use crate::{
    config::{Attachment, Guard as GuardSettings, Inline as InlineSettings, Listener, Network, Watermarks},
    engine::{
        Engine,
        bans::BanMaps,
        check::{Check, SelfTestReport},
        guard::{detach, runner as guard_runner, selftest as guard_selftest},
        guarded_device::GuardAttachment,
        inline::{
            runner::{self, GuardPins, InlineEngine as Runner},
            selftest as inline_selftest,
        },
        served_listener::ServedListener,
        splice::{Splice, selftest as splice_selftest},
        usage::InlineUsage,
    },
    kubernetes::Followed,
    os::poll,
    telemetry::{
        log::target,
        metrics::{BpfCounters, Metrics},
    },
};

/// What attaching programs to devices that appear later needs at run time.
const TO_ATTACH: [Capability; 2] = [Capability::CAP_BPF, Capability::CAP_NET_ADMIN];

/// Why no engine of this binary can use BPF, where none can.
pub const NOT_BUILT: Option<&str> = None;

/// Runs the self-test of the inline engine, with maps of its own.
#[must_use]
pub fn test_inline() -> SelfTestReport {
    let (checks, programs) = inline_selftest::run();
    SelfTestReport::new(checks, programs)
}

/// Why the inline engine cannot serve this listener on any host; `None` if it can. Changes nothing.
#[must_use]
pub fn inline_ineligibility(listener: &Listener) -> Option<String> {
    listener.inline_obstacle()
}

/// Loads the programs of the splice engine for so many connections, and runs its self-test. The
/// engine comes with the report unless loading failed.
#[must_use]
pub fn test_splice(connections: u32, watermarks: &Watermarks) -> (SelfTestReport, Option<LoadedSplice>) {
    let start = Instant::now();
    let loaded = match Splice::load(connections, watermarks.notify_step(), watermarks.credit()) {
        Ok(splice) => Arc::new(splice),
        Err(error) => {
            let check = Check { name: "load", result: Err(error.to_string()), took: start.elapsed() };
            return (SelfTestReport::new(vec![check], Vec::new()), None);
        }
    };
    let seen = "programs verified and attached".to_owned();
    let mut checks = vec![Check { name: "load", result: Ok(seen), took: start.elapsed() }];
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => checks.extend(runtime.block_on(splice_selftest::run(&loaded))),
        Err(error) => {
            checks.push(Check { name: "runtime", result: Err(error.to_string()), took: Duration::ZERO });
        }
    }
    (SelfTestReport::new(checks, loaded.programs()), Some(LoadedSplice(loaded)))
}

/// The splice engine with its programs loaded.
#[derive(Clone, Debug)]
pub struct LoadedSplice(Arc<Splice>);

impl LoadedSplice {
    /// The engine, for sessions.
    #[must_use]
    pub fn engine(&self) -> Arc<dyn Engine> {
        Arc::new(Arc::clone(&self.0))
    }

    /// The capabilities that it needs at run time.
    #[must_use]
    pub fn capabilities(&self) -> Vec<Capability> {
        if self.0.works_without_capabilities() { Vec::new() } else { vec![Capability::CAP_BPF] }
    }

    /// Starts the tasks that receive backlog events and the log of the programs, and exports their
    /// counters.
    pub fn spawn_tasks(&self, metrics: &Metrics) {
        let events = Arc::clone(&self.0);
        tokio::spawn(async move {
            if let Err(error) = events.forward_backlog_events().await {
                tracing::error!(target: target::ENGINE_SPLICE, %error, "BPF backlog events are not received; slow receivers are found only by the periodic check");
            }
        });
        metrics.watch_programs(Arc::clone(&self.0) as Arc<dyn BpfCounters>);
        match self.0.logger() {
            Ok(logger) => drop(tokio::spawn(forward_log(logger))),
            Err(error) => {
                tracing::warn!(target: target::ENGINE_SPLICE, %error, "cannot read the log of the BPF programs; their warnings are missing here");
            }
        }
    }
}

/// Forwards what the programs log until the daemon ends.
async fn forward_log(logger: aya_log::EbpfLogger<&'static dyn log::Log>) {
    let Ok(mut logger) = poll::register(logger, tokio::io::Interest::READABLE) else {
        return;
    };
    while let Ok(mut ready) = logger.readable_mut().await {
        ready.get_inner_mut().flush();
        ready.clear_ready();
    }
}

/// Starts the inline engine for these listeners; `None` if there are none. Then, and on an error,
/// the connections of an earlier daemon go on, and its programs open no new ones. It drops SYNs of
/// sources that the guard bans.
///
/// # Errors
/// When it cannot run here; each says what to do.
pub fn start_inline(
    settings: &InlineSettings,
    listeners: &[&Listener],
    guard: Option<&KernelGuard>,
) -> anyhow::Result<Option<InlineEngine>> {
    let pins = guard.map(|KernelGuard(guard)| GuardPins { maps: guard.map_pins(), links: guard.link_pins() });
    Ok(runner::start(settings, listeners, pins)?.map(InlineEngine))
}

/// Removes everything that the inline engine left in the kernel, and returns what that was.
///
/// # Errors
/// When a daemon uses it and `force` is not set; or what could not be removed.
pub fn detach_inline(settings: &InlineSettings, force: bool) -> anyhow::Result<Vec<String>> {
    runner::detach(settings, force)
}

/// Runs the self-test of the guard's programs, with maps of its own.
#[must_use]
pub fn test_guard() -> SelfTestReport {
    let (checks, programs) = guard_selftest::run();
    SelfTestReport::new(checks, programs)
}

/// Loads the guard's programs. Without `settings`, removes what an earlier daemon's guard left.
///
/// # Errors
/// When another daemon uses them. Where they cannot be loaded, that is logged, and there are none.
pub fn start_guard(
    settings: Option<&GuardSettings>,
    attachment: Attachment,
) -> anyhow::Result<Option<KernelGuard>> {
    Ok(guard_runner::start(settings, attachment)?.map(KernelGuard))
}

/// Removes everything that the guard left in the kernel, and returns what that was.
///
/// # Errors
/// When a daemon uses it and `force` is not set; or what could not be removed.
pub fn detach_guard(pin: &Path, force: bool) -> anyhow::Result<Vec<String>> {
    Ok(detach::detach(pin, force)?)
}

/// The guard's programs, with their maps.
#[derive(Debug)]
pub struct KernelGuard(guard_runner::Guard);

impl KernelGuard {
    /// The maps with bans.
    #[must_use]
    pub fn maps(&self) -> Arc<dyn BanMaps> {
        self.0.maps()
    }

    /// Where the programs are attached, from the first [`Self::attach`] on.
    #[must_use]
    pub fn attachment(&self) -> watch::Receiver<GuardAttachment> {
        self.0.attachment()
    }

    /// Attaches the programs to the devices. After the inline engine's, which are to be in front.
    pub fn attach(&mut self) {
        self.0.attach();
    }

    /// The capabilities that it needs at run time: to attach programs to devices that appear later.
    #[must_use]
    pub fn capabilities(&self) -> Vec<Capability> {
        TO_ATTACH.to_vec()
    }

    /// The directories in which it makes and removes files at run time: pins.
    #[must_use]
    pub fn directories(&self) -> Vec<PathBuf> {
        self.0.directories()
    }

    /// Guards these addresses, and starts the task that follows them and the devices.
    pub fn spawn_tasks(self, mut addresses: watch::Receiver<Vec<SocketAddr>>) {
        self.0.guard_addresses(&addresses.borrow_and_update());
        tokio::spawn(async move {
            if let Err(error) = self.0.run(addresses).await {
                tracing::error!(target: target::GUARD, %error, "device monitor failed; until a restart, banned sources are not dropped on new devices and for new listeners");
            }
        });
    }
}

/// The inline engine with its programs attached.
#[derive(Debug)]
pub struct InlineEngine(Runner);

impl InlineEngine {
    /// The capabilities that it needs at run time: to attach programs to devices that appear later.
    #[must_use]
    pub fn capabilities(&self) -> Vec<Capability> {
        TO_ATTACH.to_vec()
    }

    /// The directories in which it makes and removes files at run time: pins, and settings of the
    /// network.
    #[must_use]
    pub fn directories(&self) -> Vec<PathBuf> {
        self.0.directories()
    }

    /// The counts of its connections, and how to reset them.
    #[must_use]
    pub fn usage(&self) -> Arc<dyn InlineUsage> {
        self.0.usage()
    }

    /// Serves the listeners, and starts the tasks that follow its connections, the devices and
    /// routes, `listeners`, the backends' `health` and `peers`. The kernel forwards packets without them.
    pub fn spawn_tasks(
        self,
        metrics: &Metrics,
        listeners: watch::Receiver<Vec<ServedListener>>,
        health: Arc<Notify>,
        peers: Followed<Network>,
    ) {
        let Self(mut running) = self;
        metrics.set_inline_max_flows(running.inline.max_flows());
        metrics.watch_programs(Arc::clone(&running.inline) as Arc<dyn BpfCounters>);
        let flow_tracker = running.flow_tracker(&listeners.borrow(), metrics);
        let inline = Arc::clone(&running.inline);
        // Before the daemon is ready. The task tries again, and reports the failure.
        let _ = running.serve(&listeners.borrow());
        tokio::spawn(async move {
            if let Err(error) = flow_tracker.run(&inline).await {
                tracing::error!(target: target::ENGINE_INLINE, %error, "inline event reader failed; inline connections are carried but no longer logged or counted");
            }
        });
        tokio::spawn(async move {
            if let Err(error) = running.run(listeners, health, peers).await {
                tracing::error!(target: target::ENGINE_INLINE, error = format!("{error:#}"), "device monitor failed; until a restart, programs are not attached to new devices, and inline does not follow health, drains and reloads");
            }
        });
    }
}
