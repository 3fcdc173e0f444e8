//! Parses the arguments and dispatches to the library.

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use injector_user::{
    cli::{self, Cli, Command, GuardCommand, InlineCommand, completions, man, selftest},
    doctor,
};
use mimalloc::MiMalloc;

/// Saves memory: a connection makes a few small allocations, to which the C library's allocator adds
/// up to a sixth of their size, and more if they are aligned to cache lines, as tokio's are
/// (`docs/benchmarks.md`).
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("injector: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Run(args) => cli::run::run(args)?,
        Command::Check(args) => cli::check::run(&args)?,
        Command::Selftest(args) => selftest::run(&args),
        Command::Doctor(args) => return Ok(doctor::run(&args)),
        #[cfg(feature = "probe")]
        Command::Probe(args) => return injector_user::probe::run(&args),
        Command::Inline(InlineCommand::Detach(args)) => cli::detach::inline(&args)?,
        Command::Guard(GuardCommand::Detach(args)) => cli::detach::guard(&args)?,
        Command::Status(args) => cli::control::status(&args)?,
        Command::Sessions(args) => cli::control::sessions(args)?,
        Command::Drain(args) => cli::control::drain(&args)?,
        Command::Resume(args) => cli::control::resume(args)?,
        Command::Backend(command) => cli::control::backend(command)?,
        Command::Ban(args) => cli::bans::ban(args)?,
        Command::Unban(args) => cli::bans::unban(&args)?,
        Command::Bans(args) => cli::bans::bans(&args)?,
        Command::LogLevel(args) => cli::control::log_level(args)?,
        Command::Reload(args) => cli::control::reload(&args)?,
        Command::Top(args) => cli::control::top(&args)?,
        Command::Completions(args) => completions::print(Cli::command(), args.shell)?,
        Command::Man(args) => man::run(Cli::command(), args.out.as_deref())?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use std::{fs, hint, thread};

    use injector_user::os::allocator;

    /// What the process has in memory, in KiB.
    fn resident() -> usize {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    fn use_64_mib() {
        let blocks: Vec<_> = (0..8192).map(|_| vec![1_u8; 8192]).collect();
        hint::black_box(&blocks);
    }

    /// What was used on this thread, and on one that has ended.
    #[test]
    fn unused_memory_is_given_back() {
        const MIB: usize = 1 << 10;
        let before = resident();
        thread::spawn(use_64_mib).join().unwrap();
        use_64_mib();
        let kept = resident() - before;
        assert!(kept > 32 * MIB, "the allocator keeps {kept} KiB, so nothing is to be given back");
        allocator::release_unused();
        let left = resident().saturating_sub(before);
        assert!(left < 8 * MIB, "{left} KiB of {kept} are left");
    }
}
