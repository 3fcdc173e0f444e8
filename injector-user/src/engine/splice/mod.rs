//! The user half of the splice engine. The engine terminates TCP on both sides; the program
//! `inject` sends the header and the program `verdict` forwards the payload. The programs are in
//! `injector-ebpf/src/splice/`, under the same names.

mod backlog_events;
mod engine;
pub mod inject;
mod maps;
mod peer_isn;
pub mod selftest;
pub mod verdict;

use std::{
    fmt, io,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use aya::{
    Ebpf, EbpfLoader,
    maps::MapError,
    programs::{SkMsg, SkSkb, SocketFilter},
};
use aya_log::EbpfLogger;
use injector_common::splice::Counter;

use self::{backlog_events::BacklogNotifiers, maps::Maps};
use crate::{
    engine::{
        bpf::{LoadError, lock, program, reports},
        check::ProgramReport,
    },
    telemetry::{log::target, metrics::BpfCounters},
};

/// The loaded and attached programs with their maps. Dropping it detaches them: end all sessions
/// first.
pub struct Splice {
    maps: Maps,
    /// The program `peer_isn`.
    peer_isn: OwnedFd,
    credit: u64,
    notifiers: BacklogNotifiers,
    // Holds the attachments.
    programs: Mutex<Ebpf>,
}

impl Splice {
    /// Loads the programs, with maps for `connections` connections, and attaches them. `verdict`
    /// notifies the daemon after every `notify_step` bytes of a direction, and more often at its
    /// start, to check the backlog. Without a check the kernel stops forwarding when `credit` bytes
    /// may wait.
    ///
    /// # Errors
    /// [`LoadError`]: typically missing CAP_BPF or CAP_NET_ADMIN.
    pub fn load(connections: u32, notify_step: u64, credit: u64) -> Result<Self, LoadError> {
        let directions = connections.saturating_mul(2);
        let mut programs = EbpfLoader::new()
            .map_max_entries("INJECT", connections)
            .map_max_entries("TARGETS", directions)
            .map_max_entries("VERDICT", directions)
            .map_max_entries("FLOWS", directions)
            .map_max_entries("CREDIT", directions)
            .override_global("NOTIFY_STEP", &notify_step, true)
            .load(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/splice")))?;
        let maps = Maps::take(&mut programs)?;

        let failed = |program| move |error| LoadError::Program { program, error };
        let inject: &mut SkMsg = program(&mut programs, "inject")?;
        inject.load().map_err(failed("inject"))?;
        inject.attach(maps.inject.get().fd()).map_err(failed("inject"))?;
        let verdict: &mut SkSkb = program(&mut programs, "verdict")?;
        verdict.load().map_err(failed("verdict"))?;
        verdict.attach(maps.verdict.get().fd()).map_err(failed("verdict"))?;
        let peer_isn: &mut SocketFilter = program(&mut programs, "peer_isn")?;
        peer_isn.load().map_err(failed("peer_isn"))?;
        let peer_isn =
            peer_isn.fd().and_then(|fd| Ok(fd.as_fd().try_clone_to_owned()?)).map_err(failed("peer_isn"))?;
        Ok(Self {
            maps,
            peer_isn,
            credit,
            notifiers: BacklogNotifiers::default(),
            programs: Mutex::new(programs),
        })
    }

    /// The log lines that the programs write from now on, as `log` records; can be taken once.
    /// Earlier lines are discarded: the self-test provokes errors that would worry an operator.
    ///
    /// # Errors
    /// When it was already taken.
    pub fn logger(&self) -> Result<EbpfLogger<&'static dyn log::Log>, aya_log::Error> {
        let mut logger =
            EbpfLogger::init_with_logger(&mut lock(&self.programs), &PROGRAM_LOG as &dyn log::Log)?;
        logger.flush();
        PROGRAM_LOG.enabled.store(true, Ordering::Relaxed);
        Ok(logger)
    }

    /// Forwards the programs' backlog events to their sessions, until the runtime ends. Without it
    /// a slow reader is found only by the periodic check.
    ///
    /// # Errors
    /// When it was called already, or the runtime cannot poll the ring buffer.
    pub async fn forward_backlog_events(&self) -> io::Result<()> {
        let ring = lock(&self.maps.backlog_events).take();
        let ring = ring.ok_or_else(|| io::Error::other("the backlog ring buffer already has a reader"))?;
        self.notifiers.run(ring).await
    }

    /// The loaded programs and what they cost the verifier.
    #[must_use]
    pub fn programs(&self) -> Vec<ProgramReport> {
        reports(&lock(&self.programs))
    }

    /// How many sockets and flows the maps hold now; all zero when no connection is spliced.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn entries(&self) -> Result<usize, MapError> {
        self.maps.entries()
    }

    /// Whether a thread without capabilities can still use the maps. Since Linux 6.4 only creating
    /// and loading need rights (bpf_prog_load, map_create, kernel/bpf/syscall.c); before that every
    /// bpf(2) call did, unless unprivileged BPF was allowed.
    #[must_use]
    pub fn works_without_capabilities(&self) -> bool {
        let tried = std::thread::scope(|scope| {
            let without_capabilities = scope.spawn(|| {
                caps::clear(None, caps::CapSet::Effective).ok()?;
                self.maps.probe().ok()
            });
            without_capabilities.join()
        });
        matches!(tried, Ok(Some(())))
    }
}

static PROGRAM_LOG: ProgramLog = ProgramLog { enabled: AtomicBool::new(false) };

/// Forwards the programs' log lines once it is enabled.
struct ProgramLog {
    enabled: AtomicBool,
}

impl log::Log for ProgramLog {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        let metadata = log::Metadata::builder().level(metadata.level()).target(target::ENGINE_SPLICE).build();
        self.enabled.load(Ordering::Relaxed) && log::logger().enabled(&metadata)
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled.load(Ordering::Relaxed) {
            log::logger().log(
                &log::Record::builder()
                    .args(*record.args())
                    .level(record.level())
                    .target(target::ENGINE_SPLICE)
                    .build(),
            );
        }
    }

    fn flush(&self) {
        log::logger().flush();
    }
}

impl fmt::Debug for Splice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Splice").field("programs", &self.programs()).finish_non_exhaustive()
    }
}

impl BpfCounters for Splice {
    fn read(&self) -> Vec<(&'static str, &'static str, u64)> {
        let counter = |counter: Counter| {
            let (program, event) = counter.labels();
            (program, event, self.maps.counter(counter))
        };
        Counter::ALL.into_iter().map(counter).collect()
    }
}
