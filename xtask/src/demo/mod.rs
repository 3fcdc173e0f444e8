//! `cargo xtask demo`: mail through the injector, for people to watch and for machines to check.
//!
//! As root the demo has three hosts, each a network namespace. Without root they are three sockets
//! on loopback, and the engine is relay. In reading order: [`testbed`] has the hosts, [`injector`]
//! the daemon between them, [`scenario`] sends and fetches one message, [`inline`] sends one through
//! the inline engine and takes the backend down, [`terminal`] and [`narration`] print it, and
//! [`assertions`] decides whether the demo passes.
//!
//! Everything that outlives a function call belongs to a value whose `Drop` removes it, and the
//! whole demo is one future. A signal drops that future, so Ctrl-C, an error and the normal end
//! clean up in the same way.

mod assertions;
mod engine;
mod header;
mod injector;
mod inline;
mod narration;
mod scenario;
mod service;
mod terminal;
mod testbed;

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use injector_testbed::bpffs::BpfFs;
use injector_testbed::demo_backend::{Backend, Config};
use injector_testbed::netns;
use tokio::signal::unix::{SignalKind, signal};

use self::engine::Engine;
use self::injector::Injector;
use self::inline::Inline;
use self::scenario::Run;
use self::testbed::Testbed;
use crate::{build, cargo, reported::AlreadyReported, setup};

#[derive(clap::Args)]
pub(crate) struct DemoArgs {
    /// Which engine carries the payload [default: splice, or relay without root]
    #[arg(long, value_enum)]
    engine: Option<Engine>,

    /// Use an optimised daemon; compiles for longer
    #[arg(long, short)]
    release: bool,

    /// Print the daemon's whole log
    #[arg(long, short)]
    verbose: bool,

    /// Keep the daemon's configuration and log, and print their folder
    #[arg(long)]
    keep_logs: bool,
}

pub(crate) fn run(args: &DemoArgs) -> Result<()> {
    let no_root = netns::unavailable();
    let engine = args.engine.unwrap_or(if no_root.is_some() { Engine::Relay } else { Engine::Splice });
    ensure!(
        engine == Engine::Relay || no_root.is_none(),
        "the splice engine loads BPF programs, which needs root: run `sudo --preserve-env=PATH cargo xtask demo`, or ask for --engine relay"
    );
    let binary = daemon(engine, args.release)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let passed = runtime.block_on(async {
        // Before anything is created: from here on a signal ends the future instead of the process.
        let interrupted = interruption()?;
        tokio::select! {
            passed = run_demo(args, engine, binary) => passed,
            name = interrupted => Err(anyhow::anyhow!("{name}: stopped, and everything that was created is removed")),
        }
    })?;
    if passed { Ok(()) } else { Err(AlreadyReported.into()) }
}

/// Builds the daemon. Without root no engine can load BPF programs, so their toolchain is not
/// needed.
fn daemon(engine: Engine, release: bool) -> Result<PathBuf> {
    if netns::unavailable().is_none() {
        setup::ensure(&[setup::Group::Bpf, setup::Group::Demo])?;
        return build::daemon(release);
    }
    debug_assert_eq!(engine, Engine::Relay);
    build_relay_only(release)
}

/// Builds the daemon with stable Rust alone. It replaces a daemon with BPF, which the next `build`
/// links again; another target folder would mean compiling every dependency again.
fn build_relay_only(release: bool) -> Result<PathBuf> {
    let mut command = cargo::cargo();
    command.arg("build").args(cargo::HOST_PACKAGES).args(["--bin", "injector", "--no-default-features"]);
    command.args(release.then_some("--release"));
    let made = cargo::executables(&mut command)?;
    let daemon = made.into_iter().find(|made| made.target == "injector" && made.kind == "bin");
    daemon.map(|daemon| daemon.path).context("cargo built no program `injector`")
}

/// Waits for SIGINT, SIGTERM or SIGHUP; returns the name of the first.
fn interruption() -> Result<impl Future<Output = &'static str>> {
    let mut int = signal(SignalKind::interrupt())?;
    let mut term = signal(SignalKind::terminate())?;
    let mut hup = signal(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = int.recv() => "interrupted",
            _ = term.recv() => "terminated",
            _ = hup.recv() => "terminal closed",
        }
    })
}

/// The whole demo; true if every assertion holds.
async fn run_demo(args: &DemoArgs, engine: Engine, binary: PathBuf) -> Result<bool> {
    // Dropped from last to first: the daemon ends before the hosts that it runs on.
    let testbed = Testbed::new()?;
    let config = Config {
        smtp: testbed.backends(service::SMTP),
        imap: testbed.backends(service::IMAP),
        ..Config::default()
    };
    let backend = testbed.mail.run(Backend::start(config.clone())).await??;
    // Beside the relay engine there is nothing to compare it with.
    let bpffs = (engine == Engine::Splice).then(BpfFs::mount).transpose()?;
    let inline = bpffs.as_ref().map(|bpffs| inline::configuration(&testbed, bpffs)).unwrap_or_default();
    let mut injector = Injector::start(&testbed, &backend, engine, &inline, &binary).await?;
    narration::introduction(&testbed, &injector, engine, bpffs.is_some());

    let outcome = run_scenarios(&testbed, backend, config, &mut injector, bpffs.is_some()).await;
    if outcome.is_err() || args.verbose {
        narration::log(&injector);
    }
    if args.keep_logs {
        narration::kept(&injector.keep_files());
    }
    let (run, inline) = outcome?;
    narration::summary(&run);
    let mut assertions = assertions::of(&run, engine);
    if let Some(inline) = &inline {
        inline.print(&run.scenarios, &testbed);
        assertions.extend(inline.assertions(&run.scenarios));
    }
    let beside = inline.map(|inline| inline.totals());
    Ok(narration::verdict(&assertions, &testbed, &run, beside.as_deref()))
}

/// Runs the scenarios, and prints each as soon as it is over.
async fn run_scenarios(
    testbed: &Testbed,
    backend: Backend,
    config: Config,
    injector: &mut Injector,
    with_inline: bool,
) -> Result<(Run, Option<Inline>)> {
    let without_header = scenario::connect_without_header(testbed, &backend).await?;
    narration::without_header(&without_header);
    let before = injector.metrics(testbed).await?;
    let mut scenarios = Vec::new();
    for &family in testbed.families {
        let scenario = scenario::run(testbed, &backend, injector, family, &config.account).await?;
        narration::scenario(&scenario, testbed);
        scenarios.push(scenario);
    }
    let after = injector.metrics(testbed).await?;
    let inline =
        if with_inline { Some(Inline::run(testbed, backend, config, injector).await?) } else { None };
    let stopped = injector.stop().await?;
    Ok((Run { without_header, scenarios, before, after, stopped }, inline))
}
