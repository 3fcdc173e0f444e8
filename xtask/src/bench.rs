//! `cargo xtask bench`: compares the engines with HAProxy, nginx, kernel NAT and the direct route,
//! in network namespaces.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use injector_bench::{
    self as bench, Comparison, Options,
    ban_costs::{self, BanCost},
    bans,
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
use serde::Serialize;

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
    /// Compare each engine with the guard with itself without, in turn, with clean traffic
    #[arg(long, conflicts_with_all = ["quick", "enrolment"])]
    guard: bool,
    /// Compare engines without and with the guard while forged SYNs flood the edge host, this many
    /// every second [default: 200000]
    #[arg(
        long,
        value_name = "SYNS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "200000",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000),
        conflicts_with_all = ["quick", "enrolment", "guard"]
    )]
    flood: Option<u32>,
    /// Measure what bans cost: time to load, memory, time per packet; for these numbers of bans
    #[arg(
        long,
        value_name = "COUNT",
        num_args = 0..,
        require_equals = true,
        value_delimiter = ',',
        default_missing_values = ban_costs::COUNTS,
        value_parser = clap::value_parser!(u32).range(..=i64::from(bans::MAX)),
        conflicts_with_all = ["quick", "enrolment", "guard", "flood", "only", "workload", "list", "charts", "from"]
    )]
    bans: Option<Vec<u32>>,
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
    /// Number of repeats [default: 5, quick: 3, flood: 3, guard: 15]
    #[arg(long, value_name = "COUNT")]
    repeats: Option<usize>,
    /// Seconds for one measurement [default: 3, quick: 1, flood: 5, guard: 4]
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

impl BenchArgs {
    fn comparison(&self) -> Comparison {
        match self.flood {
            Some(rate) => Comparison::Flood { rate: rate.into() },
            None if self.enrolment => Comparison::Enrolment,
            None if self.guard => Comparison::Guard,
            None => Comparison::Engines,
        }
    }
}

pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    if let Some(keep) = &args.instructions {
        return count(keep.as_deref());
    }
    if let Some(counts) = &args.bans {
        return cost_of_bans(args, counts);
    }
    let record = match &args.from {
        Some(file) => read(file)?,
        None => {
            let Some(record) = measure(args)? else { return Ok(()) };
            record
        }
    };
    if let Some(file) = &args.json {
        write_json(&record, file)?;
    }
    if let Some(folder) = &args.charts {
        draw(&charts::all(&record)?, folder)?;
    }
    if args.write_docs {
        write_docs(args, &record)?;
    }
    let text = if args.quick { table::ratios(&record) } else { table::full(&record) };
    println!("\n{}\n\n{text}", report::heading(&record));
    if record.failures().next().is_some() { Err(AlreadyReported.into()) } else { Ok(()) }
}

/// Measures what bans cost with the daemon in `INJECTOR_BIN`, or a new build.
fn cost_of_bans(args: &BenchArgs, counts: &[u32]) -> Result<()> {
    ensure_possible(&[setup::Group::Bpf])?;
    let mut on_cost = |cost: &BanCost| println!("{} bans: in force after {:.1} s", cost.bans, cost.seconds);
    let costs = ban_costs::run(counts, &mut on_cost)?;
    if let Some(file) = &args.json {
        write_json(&costs, file)?;
    }
    let table = ban_costs::table(&costs);
    if args.write_docs {
        write_part(docs::BANS, &table)?;
    }
    println!("\n{table}");
    Ok(())
}

/// Checks that namespaces can be made, installs what is missing, and builds the daemon unless one is
/// named: an operator may have an older one to compare with.
fn ensure_possible(groups: &[setup::Group]) -> Result<()> {
    if let Some(reason) = netns::unavailable() {
        bail!("the benchmark {reason}");
    }
    setup::ensure(groups)?;
    if env::var_os(BINARY_VARIABLE).is_none() {
        let daemon = build::daemon(true)?;
        // SAFETY: this is the only thread: those of setup and build have ended, and the benchmark
        // starts its own afterwards.
        unsafe { env::set_var(BINARY_VARIABLE, daemon) };
    }
    Ok(())
}

/// Counts the instructions of the daemon in `INJECTOR_BIN`, or of a new build.
fn count(keep: Option<&Path>) -> Result<()> {
    ensure_possible(&[setup::Group::Bpf, setup::Group::Mail])?;
    let daemon = PathBuf::from(env::var_os(BINARY_VARIABLE).unwrap_or_default());
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

fn write_docs(args: &BenchArgs, record: &Record) -> Result<()> {
    match args.comparison() {
        Comparison::Engines => {
            let charts = charts::all(record)?;
            let folder = docs_folder().join(CHARTS);
            // Charts of removed workloads must not stay.
            if folder.exists() {
                fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
            }
            draw(&charts, &folder)?;
            write_part(docs::RESULTS, &docs::results(record, &charts, CHARTS))
        }
        Comparison::Enrolment => {
            bail!("--write-docs: the page's table of enrolment policies is written by hand")
        }
        Comparison::Guard => write_part(docs::GUARD, &docs::tables(record)),
        Comparison::Flood { .. } => write_part(docs::FLOOD, &docs::tables(record)),
    }
}

/// Replaces a part of docs/benchmarks.md.
fn write_part(part: docs::Part, text: &str) -> Result<()> {
    let page = docs_folder().join("benchmarks.md");
    let old = fs::read_to_string(&page).with_context(|| format!("cannot read {}", page.display()))?;
    fs::write(&page, part.insert(&old, text)?).with_context(|| format!("cannot write {}", page.display()))?;
    println!("written: {}", page.display());
    Ok(())
}

fn docs_folder() -> PathBuf {
    cargo::workspace().join("docs")
}

/// Runs as client or server of the load generator; see [`load_process`].
pub(crate) fn end(arguments: &[String]) -> Result<()> {
    load_process::run(arguments)
}

fn write_json(record: &impl Serialize, file: &Path) -> Result<()> {
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
    ensure_possible(&[setup::Group::Bpf, setup::Group::Mail, setup::Group::Bench])?;
    let mut options = options(args)?;
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
        args.json.as_deref().map_or(Ok(()), |file| write_json(record, file))
    };
    bench::run(&options, &mut on_measurement).map(Some)
}

fn options(args: &BenchArgs) -> Result<Options> {
    let programs = setup::bench_programs()?;
    let own = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    let comparison = args.comparison();
    let all_names = |systems: Vec<systems::System>| systems.into_iter().map(|system| system.name).collect();
    // The defaults of the flag.
    let (systems, workloads, repeats, seconds) = match comparison {
        Comparison::Engines if args.quick => (systems::quick(&programs), own(&workloads::QUICK), 3, 1.0),
        Comparison::Engines => (Vec::new(), Vec::new(), 5, 3.0),
        Comparison::Enrolment => (systems::for_enrolment(&programs), own(&workloads::ENROLMENT), 5, 3.0),
        Comparison::Guard => (all_names(systems::guarded()), vec![workloads::in_turn().name()], 15, 4.0),
        Comparison::Flood { rate } => {
            (all_names(systems::flooded()), vec![workloads::flood(rate).name()], 3, 5.0)
        }
    };
    let or = |given: &[String], default: Vec<String>| if given.is_empty() { default } else { given.to_vec() };
    let repeats = args.repeats.unwrap_or(repeats);
    let seconds = args.seconds.unwrap_or(seconds);
    ensure!((1..=1000).contains(&repeats), "--repeats {repeats}: must be 1 to 1000");
    ensure!((0.1..=600.0).contains(&seconds), "--seconds {seconds}: must be 0.1 to 600");
    Ok(Options {
        systems: or(&args.only, systems),
        workloads: or(&args.workload, workloads),
        repeats,
        seconds,
        noisy: args.noisy,
        spinners: args.spinners,
        comparison,
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
