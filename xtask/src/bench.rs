//! `cargo xtask bench`: compares the engines with HAProxy, nginx, kernel NAT and the direct route,
//! in network namespaces.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use injector_bench::{
    self as bench, Options,
    instructions::{self, Verdict},
    load_process,
    record::{Machine, Record, first_line},
    report::{
        self,
        charts::{self, Chart},
        docs, table,
    },
    systems, workloads,
};
use injector_testbed::netns;

use crate::{build, cargo, reported::AlreadyReported, setup};

/// The variable in which the testbed finds the daemon's path.
const BINARY_VARIABLE: &str = "INJECTOR_BIN";

/// The folder of the charts in docs/benchmarks.md.
const CHARTS: &str = "benchmarks";

#[derive(clap::Args)]
pub(crate) struct BenchArgs {
    /// Measure the most important workloads and print only ratios; under three minutes
    #[arg(long)]
    quick: bool,
    /// Compare enrolment policies of the splice engine instead of engines
    #[arg(long, conflicts_with = "quick")]
    enrolment: bool,
    /// Count the daemon's instructions per session and message, and compare them with their
    /// ceilings; keep callgrind's files in FOLDER
    #[arg(long, value_name = "FOLDER", num_args = 0..=1, require_equals = true, exclusive = true)]
    instructions: Option<Option<PathBuf>>,
    /// Measure only these systems: names or their prefixes, see --list
    #[arg(long, value_name = "SYSTEM", value_delimiter = ',')]
    only: Vec<String>,
    /// Measure only these workloads: names or their prefixes, see --list
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    workload: Vec<String>,
    /// List systems and workloads, and measure nothing
    #[arg(long)]
    list: bool,
    /// Number of repeats [default: 5, quick: 3]
    #[arg(long, value_name = "COUNT")]
    repeats: Option<usize>,
    /// Seconds for one measurement [default: 3, quick: 1]
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// Keep the processors out of idle states with a spinner of lowest priority on each
    #[arg(long)]
    spinners: bool,
    /// Measure on a busy machine; the report marks the results as unreliable
    #[arg(long)]
    noisy: bool,
    /// Write all measurements to this file as JSON, after each measurement
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw one SVG for each workload into this folder
    #[arg(long, value_name = "FOLDER")]
    charts: Option<PathBuf>,
    /// Write the results into docs/benchmarks.md, and the charts beside it
    #[arg(long)]
    write_docs: bool,
    /// Report the measurements in this file, and measure nothing
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "enrolment", "only", "workload", "json"])]
    from: Option<PathBuf>,
}

pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    if let Some(keep) = &args.instructions {
        return count(keep.as_deref());
    }
    let record = match &args.from {
        Some(file) => read(file)?,
        None => {
            let Some(record) = measure(args)? else { return Ok(()) };
            record
        }
    };
    if let Some(file) = &args.json {
        write(&record, file)?;
    }
    if let Some(folder) = &args.charts {
        draw(&charts::all(&record)?, folder)?;
    }
    if args.write_docs {
        write_docs(&record)?;
    }
    let text = if args.quick { table::ratios(&record) } else { table::full(&record) };
    println!("\n{}\n\n{text}", report::heading(&record));
    if record.failures().next().is_some() { Err(AlreadyReported.into()) } else { Ok(()) }
}

/// Counts the instructions of the daemon in `INJECTOR_BIN`, or of a new build.
fn count(keep: Option<&Path>) -> Result<()> {
    if let Some(reason) = netns::unavailable() {
        bail!("the benchmark {reason}");
    }
    setup::ensure(&[setup::Group::Bpf, setup::Group::Mail])?;
    let daemon =
        env::var_os(BINARY_VARIABLE).map_or_else(|| build::daemon(true), |given| Ok(given.into()))?;
    let findings = instructions::run(&daemon, keep, &mut |finding| println!("{finding}"))?;
    let above = findings.iter().filter(|finding| finding.verdict() == Verdict::Above).count();
    ensure!(above == 0, "{above} of {} counts are above their ceiling", findings.len());
    Ok(())
}

fn draw(charts: &[Chart], folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    for Chart { workload, svg } in charts {
        let path = folder.join(format!("{workload}.svg"));
        fs::write(&path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn write_docs(record: &Record) -> Result<()> {
    let docs = cargo::workspace().join("docs");
    let page = docs.join("benchmarks.md");
    let text = fs::read_to_string(&page).with_context(|| format!("cannot read {}", page.display()))?;
    let charts = charts::all(record)?;
    let folder = docs.join(CHARTS);
    // Charts of removed workloads must not stay.
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    draw(&charts, &folder)?;
    let text = docs::insert(&text, record, &charts, CHARTS)?;
    fs::write(&page, text).with_context(|| format!("cannot write {}", page.display()))?;
    println!("written: {}", page.display());
    Ok(())
}

/// Runs as client or server of the load generator; see [`load_process`].
pub(crate) fn end(arguments: &[String]) -> Result<()> {
    load_process::run(arguments)
}

fn write(record: &Record, file: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(record)?;
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

fn read(file: &Path) -> Result<Record> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not a benchmark record", file.display()))
}

/// `None` if nothing had to be measured.
fn measure(args: &BenchArgs) -> Result<Option<Record>> {
    if args.list {
        list(&options(args)?)?;
        return Ok(None);
    }
    if let Some(reason) = netns::unavailable() {
        bail!("the benchmark {reason}");
    }
    setup::ensure(&[setup::Group::Bpf, setup::Group::Mail, setup::Group::Bench])?;
    let mut options = options(args)?;
    // An operator may name a daemon, for example an older one to compare with.
    if env::var_os(BINARY_VARIABLE).is_none() {
        let daemon = build::daemon(true)?;
        // SAFETY: this is the only thread: those of setup and build have ended, and the benchmark
        // starts its own below.
        unsafe { env::set_var(BINARY_VARIABLE, daemon) };
    }
    options.machine = machine();
    let (systems, workloads) = bench::select(&options)?;
    let count = systems.len() * workloads.len() * options.repeats;
    println!(
        "bench: {} systems, {} workloads, {} repeats: {count} measurements",
        systems.len(),
        workloads.len(),
        options.repeats
    );
    let mut on_measurement = |record: &Record, line: &str| {
        println!("{line}");
        // An interrupted run leaves what it has measured.
        args.json.as_deref().map_or(Ok(()), |file| write(record, file))
    };
    bench::run(&options, &mut on_measurement).map(Some)
}

fn options(args: &BenchArgs) -> Result<Options> {
    let programs = setup::bench_programs()?;
    let own = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    // Explicit values, or the defaults of these flags.
    let or = |given: &[String], quick: Vec<String>, enrolment: Vec<String>| match given {
        [] if args.quick => quick,
        [] if args.enrolment => enrolment,
        given => given.to_vec(),
    };
    let repeats = args.repeats.unwrap_or(if args.quick { 3 } else { 5 });
    let seconds = args.seconds.unwrap_or(if args.quick { 1.0 } else { 3.0 });
    ensure!((1..=1000).contains(&repeats), "--repeats {repeats}: must be 1 to 1000");
    ensure!((0.1..=600.0).contains(&seconds), "--seconds {seconds}: must be 0.1 to 600");
    Ok(Options {
        systems: or(&args.only, systems::quick(&programs), systems::for_enrolment(&programs)),
        workloads: or(&args.workload, own(&workloads::QUICK), own(&workloads::ENROLMENT)),
        repeats,
        seconds,
        noisy: args.noisy,
        spinners: args.spinners,
        enrolment: args.enrolment,
        programs,
        machine: Machine::default(),
    })
}

fn list(options: &Options) -> Result<()> {
    let (systems, workloads) = bench::select(options)?;
    for system in systems {
        println!("{:<24} {}", system.name, system.about);
    }
    println!();
    for workload in workloads {
        println!("{:<24} {}", workload.name(), workload.about());
    }
    Ok(())
}

fn machine() -> Machine {
    let daemon = env::var_os(BINARY_VARIABLE).unwrap_or_default();
    let output_of = |command: &mut Command| first_line(command).unwrap_or_default();
    let version = output_of(Command::new(daemon).arg("--version"));
    let commit = output_of(
        Command::new("git")
            .current_dir(cargo::workspace())
            .args(["describe", "--always", "--dirty", "--tags"]),
    );
    let rustc =
        output_of(Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())).arg("--version"));
    Machine { injector: format!("{version} ({commit})"), rustc, ..Machine::here() }
}
