//! `cargo xtask kernels`: boots Debian's kernels in virtual machines with this machine's root file
//! system, and runs the daemon's self-tests and chosen trials in them.
//!
//! The root file system is shared read-only, below a layer in memory: nothing that runs in a machine
//! changes this one.

mod cpio;
mod initramfs;
mod machine;
mod page;
mod selftest;
mod shell;
mod trial;

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use self::{
    machine::Accelerator,
    page::{KernelRun, TrialRun},
    selftest::{Capabilities, Engine},
    trial::Trials,
};
use crate::{
    build,
    cargo::{self, Executable},
    reported::AlreadyReported,
    setup::{self, DEFAULT_KERNELS, Group, Kernel, WantedKernel},
    test_output::Output,
};

/// The variable that names a daemon other than a new build.
const BINARY_VARIABLE: &str = "INJECTOR_BIN";

/// How long the self-tests of one kernel may take. In an emulated machine beside other work a
/// verifier that refuses a program late took three minutes.
const SELFTEST_LIMIT: Duration = Duration::from_secs(5 * 60);

/// The first kernel whose verifier must accept the programs without CAP_PERFMON. Since Linux 6.17 it
/// puts a barrier where speculation could leak, instead of refusing the program (do_check,
/// kernel/bpf/verifier.c).
const WITHOUT_PERFMON_SINCE: (u32, u32) = (6, 17);

#[derive(clap::Args)]
pub(crate) struct KernelsArgs {
    /// A series (6.12), a release (6.1.0-50-amd64) or `newest` [default: 6.1, 6.12, newest]
    #[arg(value_name = "VERSION")]
    versions: Vec<WantedKernel>,
    /// Run only the self-tests
    #[arg(long)]
    quick: bool,
    /// Run these trials of the suite after the self-tests (repeatable) [default: a selection]
    #[arg(long, value_name = "PROGRAM[:FILTER]", conflicts_with = "quick")]
    trials: Vec<Trials>,
    /// Run only this shell command, as root
    #[arg(long, value_name = "COMMAND", conflicts_with_all = ["quick", "trials", "write_docs"])]
    command: Option<String>,
    /// End a command or test program that runs longer
    #[arg(long, value_name = "MINUTES", default_value_t = 15)]
    limit: u64,
    /// Fetch the kernels again, in their newest version
    #[arg(long)]
    update: bool,
    /// Write the results into docs/kernels.md
    #[arg(long)]
    write_docs: bool,
}

impl KernelsArgs {
    fn wanted(&self) -> &[WantedKernel] {
        if self.versions.is_empty() { &DEFAULT_KERNELS } else { &self.versions }
    }

    fn trials(&self) -> Result<Vec<Trials>> {
        if self.quick || !self.trials.is_empty() {
            return Ok(self.trials.clone());
        }
        trial::DEFAULT.iter().map(|text| text.parse().map_err(anyhow::Error::msg)).collect()
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(self.limit * 60)
    }
}

pub(crate) fn run(args: &KernelsArgs) -> Result<()> {
    if let Some(why) = obstacle() {
        bail!("kernels cannot be booted here: {why}");
    }
    setup::ensure(&[Group::Kernels])?;
    let kernels: Vec<_> =
        args.wanted().iter().map(|wanted| setup::kernel(wanted, args.update)).collect::<Result<_>>()?;
    if let Some(command) = &args.command {
        return each(&kernels, command, args.limit());
    }
    let trials = args.trials()?;
    let suite = Suite::build(&trials)?;
    let mut runs = Vec::new();
    for kernel in &kernels {
        runs.push(suite.run(kernel, &trials, args.limit())?);
    }
    println!("\n{}", page::summary(&runs));
    if args.write_docs {
        let file = cargo::workspace().join("docs/kernels.md");
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        fs::write(&file, page::insert(&text, &runs)?)?;
    }
    if runs.iter().all(KernelRun::passed) { Ok(()) } else { Err(AlreadyReported.into()) }
}

/// Why no kernel can be booted here.
fn obstacle() -> Option<String> {
    if !cfg!(target_arch = "x86_64") {
        return Some("Debian's kernels of other processors have not been tried".into());
    }
    injector_testbed::netns::unavailable().map(|_| "virtiofsd shows the root file system only to root".into())
}

/// Runs a shell command in each kernel.
fn each(kernels: &[Kernel], command: &str, limit: Duration) -> Result<()> {
    let mut passed = true;
    for kernel in kernels {
        println!("-- {}", kernel.release);
        let (_, ended) = machine::run(kernel, command, limit, &mut |line| println!("{line}"))?;
        if let Some(fault) = ended.fault() {
            println!("{fault}");
        }
        println!("-- {}: exit code {:?}", kernel.release, ended.code);
        passed &= ended.code == Some(0);
    }
    if passed { Ok(()) } else { Err(AlreadyReported.into()) }
}

/// The programs that run in the kernels.
struct Suite {
    daemon: PathBuf,
    programs: Vec<Executable>,
}

impl Suite {
    fn build(trials: &[Trials]) -> Result<Self> {
        let given = env::var_os(BINARY_VARIABLE).map(PathBuf::from);
        if trials.is_empty() {
            setup::ensure(&[Group::Bpf])?;
            let daemon = given.map_or_else(|| build::daemon(false), Ok)?;
            return Ok(Self { daemon, programs: Vec::new() });
        }
        setup::ensure(&Group::USUAL)?;
        let built = build::everything()?;
        let daemon = given.map_or_else(|| build::among(&built), Ok)?;
        Ok(Self { daemon, programs: built.into_iter().filter(|it| build::is_privileged(&it)).collect() })
    }

    fn program(&self, trials: &Trials) -> Result<&Executable> {
        let found = self.programs.iter().find(|program| program.target == trials.program);
        found.with_context(|| {
            let names: Vec<_> = self.programs.iter().map(|program| program.target.as_str()).collect();
            format!("the suite has no program `{}`: it has {}", trials.program, names.join(", "))
        })
    }

    fn run(&self, kernel: &Kernel, trials: &[Trials], limit: Duration) -> Result<KernelRun> {
        println!("\n-- {}: self-tests", kernel.release);
        let (accelerator, engines) = selftests(kernel, &self.daemon, Capabilities::All)?;
        let (_, without_perfmon) = selftests(kernel, &self.daemon, Capabilities::WithoutPerfmon)?;
        let mut run = KernelRun {
            release: kernel.release.clone(),
            accelerated: accelerator == Accelerator::Kvm,
            engines,
            without_perfmon,
            needs_perfmon: !runs_without_perfmon(kernel),
            trials: Vec::new(),
        };
        for trials in trials {
            let output = self.trials(kernel, trials, limit)?;
            run.trials.push(TrialRun { name: trials.to_string(), output });
        }
        Ok(run)
    }

    fn trials(&self, kernel: &Kernel, trials: &Trials, limit: Duration) -> Result<Output> {
        println!("\n-- {}: {trials}", kernel.release);
        let command = trials.command(self.program(trials)?, &self.daemon, limit);
        let mut output = Output::default();
        let start = Instant::now();
        let (_, ended) = machine::run(kernel, &command, limit + Duration::from_secs(10), &mut |line| {
            println!("{line}");
            output.line(line);
        })?;
        output.took = start.elapsed();
        if let Some(fault) = ended.fault() {
            output.set_fault(fault);
        } else if ended.code != Some(0) && !output.has_failures() {
            output.set_fault(format!("failed without a failed test (exit code {:?})", ended.code));
        } else if output.passed + output.failed + output.skipped == 0 {
            output.set_fault("no trial has a name like this".into());
        }
        Ok(output)
    }
}

/// Whether the kernel must accept the programs without CAP_PERFMON.
fn runs_without_perfmon(kernel: &Kernel) -> bool {
    kernel.series().is_some_and(|series| series >= WITHOUT_PERFMON_SINCE)
}

/// The daemon's self-tests in one kernel. A machine that does not boot counts as a failure.
fn selftests(
    kernel: &Kernel,
    daemon: &Path,
    capabilities: Capabilities,
) -> Result<(Accelerator, Vec<Engine>)> {
    let mut printed = String::new();
    let (accelerator, ended) =
        machine::run(kernel, &selftest::command(daemon, capabilities), SELFTEST_LIMIT, &mut |line| {
            printed.push_str(line);
            printed.push('\n');
        })?;
    let engines = match ended.fault() {
        Some(fault) => vec![Engine { failures: vec![fault], ..Engine::default() }],
        None => selftest::parse(&printed).unwrap_or_else(|error| {
            vec![Engine { failures: vec![format!("{error:#}")], ..Engine::default() }]
        }),
    };
    for engine in &engines {
        println!("{:<8} {} checks passed, {} failed", engine.name, engine.passed, engine.failures.len());
        engine.failures.iter().for_each(|failure| println!("FAILED   {failure}"));
    }
    let boot = ended.boot_seconds.unwrap_or_default();
    let processor = if accelerator == Accelerator::Kvm { "KVM" } else { "emulated" };
    println!("{capabilities}, booted in {boot:.1} s, {processor}");
    Ok((accelerator, engines))
}

/// For `cargo xtask test`: whether every program loads and passes its self-test in the default
/// kernels. Skipped where kernels cannot be booted or fetched.
pub(crate) fn quick(daemon: &Path) -> Output {
    println!("\n-- kernels");
    let start = Instant::now();
    let (mut passed, mut failures) = (0, Vec::new());
    let tested = default_kernels().and_then(|kernels| {
        for kernel in &kernels {
            println!("{}", kernel.release);
            let failed = failures_in(kernel, daemon)?;
            passed += usize::from(failed.is_empty());
            failures.extend(failed.into_iter().map(|failure| format!("{}: {failure}", kernel.release)));
        }
        Ok(())
    });
    let mut output = Output::checked(passed, failures, start.elapsed());
    if let Err(error) = tested {
        println!("skipped: {error:#}");
        output.skipped = DEFAULT_KERNELS.len();
    }
    output
}

fn default_kernels() -> Result<Vec<Kernel>> {
    if let Some(why) = obstacle() {
        bail!("{why}");
    }
    setup::ensure(&[Group::Kernels])?;
    DEFAULT_KERNELS.iter().map(|wanted| setup::kernel(wanted, false)).collect()
}

/// What has failed in one kernel, with all capabilities and, where that must pass, without
/// CAP_PERFMON.
fn failures_in(kernel: &Kernel, daemon: &Path) -> Result<Vec<String>> {
    let mut failures = Vec::new();
    for capabilities in [Capabilities::All, Capabilities::WithoutPerfmon] {
        if capabilities == Capabilities::All || runs_without_perfmon(kernel) {
            let (_, engines) = selftests(kernel, daemon, capabilities)?;
            failures.extend(engines.into_iter().flat_map(|engine| engine.failures));
        }
    }
    Ok(failures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "boots virtual machines with the daemon in INJECTOR_BIN; needs root"]
    fn the_quick_form_passes() {
        let daemon = env::var_os(BINARY_VARIABLE).unwrap();
        let output = quick(Path::new(&daemon));
        println!("took {:.0?}", output.took);
        assert_eq!((output.passed, output.failures().count()), (DEFAULT_KERNELS.len(), 0));
    }
}
