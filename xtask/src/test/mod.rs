//! `cargo xtask test`: unit, property and documentation tests, then the privileged tests with real
//! mail servers, then a count of the daemon's instructions.
//!
//! Cargo builds the test programs and this module runs them: it adds up their own counts, ends a
//! program that hangs, and reports what a program left on the machine.

mod leftovers;
mod report;

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use injector_bench::instructions::{self, Verdict};

use self::{leftovers::Before, report::Report};
use crate::{
    build,
    cargo::{self, Executable},
    kernels,
    reported::AlreadyReported,
    setup::{self, Group},
    test_output::Output,
};

#[derive(clap::Args)]
pub(crate) struct TestArgs {
    /// Run only the tests that need no root: unit, property and documentation tests
    #[arg(long)]
    unit: bool,
    /// Run only the privileged tests, in network namespaces with real mail servers
    #[arg(long)]
    integration: bool,
    /// Run only tests whose name contains this
    filter: Option<String>,
    /// End a test program that runs longer
    #[arg(long, value_name = "MINUTES", default_value_t = LIMIT)]
    limit: u64,
}

const LIMIT: u64 = 20;

impl Default for TestArgs {
    fn default() -> Self {
        Self { unit: false, integration: false, filter: None, limit: LIMIT }
    }
}

impl TestArgs {
    fn runs_unit(&self) -> bool {
        self.unit || !self.integration
    }

    fn runs_integration(&self) -> bool {
        self.integration || !self.unit
    }
}

pub(crate) fn run(args: &TestArgs) -> Result<()> {
    let start = Instant::now();
    let obstacle = if args.runs_integration() { obstacle() } else { None };
    let privileged = args.runs_integration() && obstacle.is_none();
    setup::ensure(if privileged { &Group::USUAL } else { &[Group::Bpf] })?;
    let mut built = build::everything()?;
    built.sort_by_key(title);
    let daemon = build::among(&built)?;
    let programs: Vec<_> = built.into_iter().filter(|program| program.harness).collect();
    let mut report = Report::default();
    if args.runs_unit() {
        unit(args, &programs, &mut report)?;
    }
    if privileged {
        integration(args, &programs, &daemon, &mut report)?;
        if args.filter.is_none() {
            report.add("kernels".into(), kernels::quick(&daemon));
            report.add("instructions".into(), instructions()?);
        }
    } else if let Some(why) = obstacle {
        cannot_run(args, &programs, &why, &mut report)?;
    }
    println!("\n{}", report.render(start.elapsed()));
    if report.passed() { Ok(()) } else { Err(AlreadyReported.into()) }
}

fn title(program: &Executable) -> String {
    format!("{} {} {}", program.package, program.kind, program.target)
}

fn unit(args: &TestArgs, programs: &[Executable], report: &mut Report) -> Result<()> {
    for program in programs.iter().filter(|program| !build::is_privileged(program)) {
        let title = title(program);
        let ran = watch(&title, &mut harness(program, args), args.limit)?;
        report.add(title, ran);
    }
    let mut documentation = cargo::cargo();
    documentation.arg("test").args(cargo::HOST_PACKAGES).args(["--doc", "--"]).args(&args.filter);
    report.add("documentation".into(), watch("documentation", &mut documentation, args.limit)?);
    Ok(())
}

/// Runs the privileged tests, then looks for what they left.
fn integration(args: &TestArgs, programs: &[Executable], daemon: &Path, report: &mut Report) -> Result<()> {
    let before = Before::look()?;
    for program in programs.iter().filter(build::is_privileged) {
        let title = title(program);
        let ran = watch(&title, harness(program, args).env("INJECTOR_BIN", daemon), args.limit)?;
        report.add(title, ran);
    }
    for left in before.left_behind() {
        report.fail(format!("left behind: {left}"));
    }
    if programs.iter().filter(build::is_privileged).count() == 0 {
        report.fail(format!("{} has no privileged tests", build::SUITE));
    } else if args.filter.is_none() || args.integration {
        report.demand_one_run(build::SUITE);
    }
    Ok(())
}

/// Compares the optimised daemon's instruction counts with their ceilings.
fn instructions() -> Result<Output> {
    if !cfg!(target_arch = "x86_64") {
        println!("\n-- instructions\nskipped: the ceilings are for x86-64");
        return Ok(Output::skipped(instructions::CEILINGS.len()));
    }
    let daemon = build::daemon(true)?;
    println!("\n-- instructions");
    let start = Instant::now();
    let counted = instructions::run(&daemon, None, &mut |finding| println!("{finding}"));
    let took = start.elapsed();
    Ok(match counted {
        Ok(findings) => {
            let (above, others): (Vec<_>, Vec<_>) =
                findings.into_iter().partition(|finding| finding.verdict() == Verdict::Above);
            Output::checked(others.len(), above.iter().map(ToString::to_string).collect(), took)
        }
        Err(error) => Output::checked(0, vec![format!("{error:#}")], took),
    })
}

/// A test program in its package's folder, as cargo would start it.
fn harness(program: &Executable, args: &TestArgs) -> Command {
    let mut command = Command::new(&program.path);
    cargo::forget_this_package(&mut command);
    command.current_dir(&program.folder).env("CARGO_MANIFEST_DIR", &program.folder).args(&args.filter);
    command
}

/// Why the privileged tests can't run here; it tries their first steps.
fn obstacle() -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let is_root =
        status.lines().any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0"));
    if !is_root {
        return Some("they create network namespaces and load BPF programs, which needs root".into());
    }
    match Command::new("unshare").args(["--net", "--mount", "true"]).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let printed = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Some(format!(
                "root may not create network namespaces here ({printed}); a container needs --privileged"
            ))
        }
        Err(error) => Some(format!("cannot start unshare, of util-linux: {error}")),
    }
}

/// Counts the privileged tests as skipped and prints the reason: a run without them has not passed.
fn cannot_run(args: &TestArgs, programs: &[Executable], why: &str, report: &mut Report) -> Result<()> {
    println!("\n-- the privileged tests cannot run: {why}");
    for program in programs.iter().filter(build::is_privileged) {
        let mut command = harness(program, args);
        let output = command
            .arg("--list")
            .output()
            .with_context(|| format!("cannot start {}", program.path.display()))?;
        let list = String::from_utf8_lossy(&output.stdout).into_owned();
        let names: Vec<_> = list.lines().filter_map(|line| line.strip_suffix(": test")).collect();
        for name in &names {
            println!("   skipped: {name}");
        }
        report.add(title(program), Output::skipped(names.len()));
    }
    report.reject(format!("the privileged tests did not run: {why} (--unit runs only the others)"));
    Ok(())
}

/// Runs a test program, prints its output and collects its results.
fn watch(title: &str, command: &mut Command, limit_minutes: u64) -> Result<Output> {
    println!("\n-- {title}");
    let start = Instant::now();
    let limit = Duration::from_secs(limit_minutes.saturating_mul(60));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", Path::new(command.get_program()).display()))?;
    let mut output = Output::default();
    let in_time = read_until(&mut child, &mut output, start + limit);
    if !in_time {
        child.kill().with_context(|| format!("cannot end {title}"))?;
    }
    let status = child.wait().with_context(|| format!("waiting for {title}"))?;
    output.took = start.elapsed();
    if !in_time {
        output.set_fault(format!("ended after {limit_minutes} minutes (--limit)"));
    } else if !status.success() && !output.has_failures() {
        output.set_fault(how_it_ended(status));
    } else if !output.is_complete() {
        output.set_fault("printed no result".into());
    }
    Ok(output)
}

fn how_it_ended(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("killed by signal {signal}"),
        None => format!("failed without a failed test ({status})"),
    }
}

/// Prints the program's lines until it closes its output; false if the deadline passes first.
///
/// A server that the program started may hold the output open forever, so the end of the program
/// counts too.
fn read_until(child: &mut Child, output: &mut Output, deadline: Instant) -> bool {
    const GRACE: Duration = Duration::from_millis(300);
    let Some(stdout) = child.stdout.take() else { return true };
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
            line.clear();
        }
    });
    loop {
        match lines.recv_timeout(GRACE) {
            Ok(line) => {
                println!("{line}");
                output.line(&line);
            }
            Err(RecvTimeoutError::Disconnected) => return true,
            Err(RecvTimeoutError::Timeout) if matches!(child.try_wait(), Ok(Some(_))) => return true,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if Instant::now() > deadline {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, limit_minutes: u64) -> Output {
        watch("test", Command::new("sh").args(["-c", script]), limit_minutes).unwrap()
    }

    const RESULT: &str = "echo 'test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out'";

    #[test]
    fn the_counts_are_the_programs_own() {
        let output = sh(RESULT, 1);
        assert_eq!((output.passed, output.failed, output.skipped), (2, 0, 1));
        assert!(!output.has_failures());
    }

    #[test]
    fn a_program_that_dies_or_prints_no_result_has_failed() {
        for script in ["kill -SEGV $$", "exit 3", "true", &format!("{RESULT}; exit 1")] {
            assert!(sh(script, 1).has_failures(), "{script}");
        }
    }

    #[test]
    fn a_hung_program_is_ended() {
        let output = sh("exec sleep 60", 0);
        assert!(output.has_failures() && output.took < Duration::from_secs(30));
    }

    #[test]
    fn an_output_held_open_by_a_server_does_not_block_the_run() {
        let output = sh(&format!("{RESULT}; sleep 3 &"), 1);
        assert!(!output.has_failures() && output.took < Duration::from_millis(2500));
    }

    #[test]
    fn both_parts_run_unless_one_is_selected() {
        let parts = |unit, integration| {
            let args = TestArgs { unit, integration, ..TestArgs::default() };
            (args.runs_unit(), args.runs_integration())
        };
        assert_eq!(parts(false, false), (true, true));
        assert_eq!(parts(true, true), (true, true));
        assert_eq!(parts(true, false), (true, false));
        assert_eq!(parts(false, true), (false, true));
    }
}
