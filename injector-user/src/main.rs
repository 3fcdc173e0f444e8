//! The command line of the daemon; everything else is in the library.

use std::{process::ExitCode, thread, time::Duration};

use clap::{CommandFactory as _, Parser as _};
use injector_user::{
    cli::{self, Cli, Command, ControlArgs, completions, man},
    config::{self, Config, Watermarks},
    control::{
        self, Request, client,
        wire::{Answer, ListenerStatus},
    },
    daemon, doctor,
    engine::{kernel, registry::EngineProbes},
    telemetry::log,
};
use mimalloc::MiMalloc;

/// For memory: a connection is a few small allocations, which the C library's allocator surrounds with as much as a sixth of
/// their size, and more where they are aligned to cache lines, as tokio's are (`docs/benchmarks.md`).
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
        Command::Run(args) => {
            let file = args.config.clone();
            let source = move || {
                let mut config = Config::load(&args.config)?;
                cli::apply(&mut config, &args);
                Ok(config)
            };
            let config = source()?;
            log::init(&config.log)?;
            daemon::run(config, file, Box::new(source))?;
        }
        Command::Check(args) => print!("{}", config::summary(&Config::load(&args.config)?)),
        Command::Inline(cli::InlineCommand::Detach(args)) => detach(&args)?,
        Command::Status(args) => send(&args, &Request::Status)?,
        Command::Sessions(args) => {
            send(&args.control, &Request::Sessions { listener: args.listener, limit: args.limit })?;
        }
        Command::Drain(args) => drain(&args)?,
        Command::Resume(args) => send(&args.control, &Request::Resume { listener: args.listener })?,
        Command::Backend(args) => {
            let (action, listener, backend) = (args.action, args.listener, args.backend);
            send(&args.control, &Request::Backend { action, listener, backend })?;
        }
        Command::Reload(args) => match args.watch {
            Some(file) => control::watch(&args.control.at.socket, &file)?,
            None => send(&args.control, &Request::Reload)?,
        },
        Command::Top(args) if args.once => print!("{}", control::top::once(&args.at.socket, args.interval)?),
        Command::Top(args) => control::top::run(&args.at.socket, args.interval)?,
        Command::Doctor(args) => return Ok(doctor::run(&args)),
        #[cfg(feature = "probe")]
        Command::Probe(args) => return injector_user::probe::run(&args),
        Command::Completions(args) => completions::print(Cli::command(), args.shell)?,
        Command::Man(args) => man::run(Cli::command(), args.out.as_deref())?,
        Command::Selftest(args) => {
            let mut probes = EngineProbes::not_run("");
            probes.probe_inline();
            probes.probe_splice(16, &Watermarks::default());
            if args.json {
                println!("{:#}", probes.json());
            } else {
                print!("{}", probes.text());
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks a running daemon, and prints what it says.
fn send(args: &ControlArgs, request: &Request) -> anyhow::Result<()> {
    let answer = client::send(&args.at.socket, request)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&answer)?);
    } else {
        print!("{}", client::show(&answer));
    }
    Ok(())
}

fn drain(args: &cli::DrainArgs) -> anyhow::Result<()> {
    const LOOK_EVERY: Duration = Duration::from_millis(500);
    let deadline_ms = args.deadline.map(|within| u64::try_from(within.as_millis()).unwrap_or(u64::MAX));
    send(&args.control, &Request::Drain { listener: args.listener.clone(), deadline_ms })?;
    if !args.wait {
        return Ok(());
    }
    loop {
        let Answer::Status(status) = client::send(&args.control.at.socket, &Request::Status)? else {
            return Ok(());
        };
        let of =
            |listener: &&ListenerStatus| args.listener.as_ref().is_none_or(|name| *name == listener.name);
        // Packets have no deadline: they are waited for as long as there are any.
        if status.listeners.iter().filter(of).all(|listener| listener.active == 0) {
            return Ok(());
        }
        thread::sleep(LOOK_EVERY);
    }
}

fn detach(args: &cli::DetachArgs) -> anyhow::Result<()> {
    let settings = match &args.config {
        Some(file) => Config::load(file)?.inline,
        None => config::Inline::default(),
    };
    let removed = kernel::detach_inline(&settings)?;
    if removed.is_empty() {
        println!("nothing was left of engine \"inline\"");
    }
    for what in removed {
        println!("removed {what}");
    }
    Ok(())
}
