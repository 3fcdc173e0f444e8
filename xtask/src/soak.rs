//! `cargo xtask soak`: random sessions through the daemon, in network namespaces, for a given time.

use std::{
    env,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use injector_soak::{self as soak, Engine, Options};
use injector_testbed::netns;

use crate::{build, reported::AlreadyReported, setup};

/// The variable in which the testbed finds the daemon's path.
const BINARY_VARIABLE: &str = "INJECTOR_BIN";

/// Sessions per minute that a run must reach: 11,000 in ten minutes.
const PER_MINUTE: f64 = 1100.0;

#[derive(clap::Args)]
pub(crate) struct SoakArgs {
    /// How many minutes new sessions are started
    #[arg(long, value_name = "MINUTES", default_value_t = 1.0)]
    minutes: f64,
    /// Generate the sessions from this seed; equal seeds give equal sessions [default: the time]
    #[arg(long)]
    seed: Option<u64>,
    /// How many sessions run at one time
    #[arg(long, value_name = "COUNT", default_value_t = 64)]
    sessions_at_once: usize,
    /// Run with this engine only [default: splice, then relay]
    #[arg(long, value_enum)]
    engine: Option<Choice>,
    /// Run only the session with this number, to repeat a failure; needs --seed and --engine
    #[arg(long, value_name = "NUMBER", requires_all = ["seed", "engine"])]
    only: Option<u64>,
    /// Use an optimised daemon; compiles for longer
    #[arg(long, short)]
    release: bool,
}

/// What carries the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Choice {
    /// The kernel, between two sockets (sockmap)
    Splice,
    /// The daemon, by read and write
    Relay,
}

pub(crate) fn run(args: &SoakArgs) -> Result<()> {
    if let Some(reason) = netns::unavailable() {
        anyhow::bail!("the soak {reason}");
    }
    ensure!(args.minutes > 0.0 && args.minutes < 1e6, "--minutes {}: must be above 0", args.minutes);
    ensure!(args.sessions_at_once > 0, "--sessions-at-once must be above 0");
    // An operator may name a daemon, for example an older one to compare with.
    if env::var_os(BINARY_VARIABLE).is_none() {
        setup::ensure(&[setup::Group::Bpf])?;
        let daemon = build::daemon(args.release)?;
        // SAFETY: this is the only thread: those of setup and build have ended, and the soak starts
        // its own below.
        unsafe { env::set_var(BINARY_VARIABLE, daemon) };
    }
    let engines = match args.engine {
        Some(Choice::Splice) => vec![Engine::Splice],
        Some(Choice::Relay) => vec![Engine::Relay],
        None => Engine::ALL.to_vec(),
    };
    let seed = args.seed.map_or_else(of_the_time, Ok)?;
    let mut passed = true;
    for engine in engines {
        passed &= one(args, seed, engine)?;
    }
    if passed { Ok(()) } else { Err(AlreadyReported.into()) }
}

fn one(args: &SoakArgs, seed: u64, engine: Engine) -> Result<bool> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "bounded above, and positive"
    )]
    let planned = (args.minutes * PER_MINUTE) as u64;
    let options = Options {
        seed,
        duration: Duration::from_secs_f64(args.minutes * 60.0),
        at_once: args.sessions_at_once,
        engine,
        planned,
        only: args.only,
    };
    println!("soak: engine {engine}, seed {seed}, {} minutes", args.minutes);
    let report = soak::run(&options, &mut |line| println!("{line}"))?;
    println!("{report}\n");
    Ok(report.passed())
}

fn of_the_time() -> Result<u64> {
    let since =
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).context("the clock is before 1970")?;
    Ok(since.as_secs())
}
