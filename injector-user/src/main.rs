//! The command line of the daemon; everything else is in the library.

use std::process::ExitCode;

use clap::Parser as _;
use injector_user::{
    cli::{self, Cli, Command},
    completions,
    config::{self, Config},
    daemon, log, man,
    selftest::Findings,
    session::Marks,
};

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
            let mut config = Config::load(&args.config)?;
            cli::apply(&mut config, &args);
            log::init(&config.log)?;
            daemon::run(config)?;
        }
        Command::Check(args) => print!("{}", config::summary(&Config::load(&args.config)?)),
        #[cfg(feature = "bpf")]
        Command::Inline(cli::InlineCommand::Detach(args)) => detach(&args)?,
        Command::Completions(args) => completions::print(&args)?,
        Command::Man(args) => man::run(&args)?,
        Command::Selftest(args) => {
            let mut findings = Findings::untried("");
            findings.try_inline();
            findings.try_splice(16, &Marks::default());
            if args.json {
                println!("{:#}", findings.json());
            } else {
                print!("{}", findings.text());
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(feature = "bpf")]
fn detach(args: &cli::DetachArgs) -> anyhow::Result<()> {
    let settings = match &args.config {
        Some(file) => Config::load(file)?.inline,
        None => config::Inline::default(),
    };
    let removed = injector_user::inline::start::detach(&settings)?;
    if removed.is_empty() {
        println!("nothing was left of engine \"inline\"");
    }
    for what in removed {
        println!("removed {what}");
    }
    Ok(())
}
