//! The command line. Every flag of `run` has its environment variable; a flag beats the variable, and both
//! beat the file.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};

use crate::config::{
    Config, DurationError, EngineChoice, LogFormat, LogLevel, MOST_CONNECTIONS, Metrics, parse_duration,
};
use crate::{completions, man};

/// Puts a PROXY protocol header with the client's real address in front of mail connections, and lets the
/// kernel carry the rest.
#[derive(Clone, Debug, Parser)]
#[command(name = "injector", version, max_term_width = 100, after_long_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = r#"Examples:
  See which engine this machine can run, and why
    $ injector selftest

  Check a configuration and see what it means
    $ injector check --config /etc/injector/injector.toml

  Run it
    $ injector run --config /etc/injector/injector.toml

A configuration:
  [metrics]
  listen = "127.0.0.1:9145"

  [[listener]]
  name = "smtp"
  bind = ["192.0.2.10:25", "[2001:db8::10]:25"]
  protocol = "smtp"
  engine = "auto"
  backends = ["mail.internal:2525"]

The whole of it is described in docs/config.md, the metrics in docs/metrics.md."#;

/// The verbs of `injector`.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Run the injector in the foreground
    ///
    /// Logs go to standard error. SIGTERM and SIGINT stop accepting and let sessions finish until the
    /// deadline.
    #[command(after_long_help = RUN_EXAMPLES)]
    Run(RunArgs),
    /// Check a configuration file and print what it would run
    ///
    /// Prints every mistake with its line and ends with a failure, or prints the listeners with all defaults.
    /// Opens no port and resolves no name.
    Check(CheckArgs),
    /// Find out which engine would run here, and why
    ///
    /// Drives the real mechanism over loopback sockets of its own and cleans up after itself.
    Selftest(SelftestArgs),
    /// What engine "inline" has left in the kernel
    #[cfg(feature = "bpf")]
    #[command(subcommand)]
    Inline(InlineCommand),
    /// Print the completions for a shell
    Completions(completions::CompletionsArgs),
    /// Print the manual page, or write those of all verbs
    Man(man::ManArgs),
}

/// The verbs of `injector inline`.
#[cfg(feature = "bpf")]
#[derive(Clone, Debug, Subcommand)]
pub enum InlineCommand {
    /// Take the programs off all devices, and remove the maps and the NAT table
    ///
    /// Programs, maps and NAT outlive the daemon, so that connections go on while it restarts. Stop the daemon
    /// first, for it attaches them again when devices change. Connections through the engine break.
    Detach(DetachArgs),
}

/// Arguments of `injector inline detach`.
#[cfg(feature = "bpf")]
#[derive(Clone, Debug, Args)]
pub struct DetachArgs {
    /// The configuration file (TOML) that the daemon ran with [default: inline.pin and inline.table have their
    /// defaults]
    #[arg(long, env = "INJECTOR_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

const RUN_EXAMPLES: &str = "\
Examples:
  The engines side by side: the same file without the kernel's help
    $ injector run --config injector.toml --engine relay

  In a container, by environment alone
    $ INJECTOR_CONFIG=/etc/injector.toml INJECTOR_LOG_FORMAT=json injector run

  One module in detail
    $ INJECTOR_LOG=info,injector_user::session=debug injector run --config injector.toml";

/// Arguments of `injector run`. What is `None` is left to the file.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// The configuration file (TOML)
    #[arg(long, env = "INJECTOR_CONFIG", value_name = "FILE")]
    pub config: PathBuf,

    /// Shape of the log [file: log.format; default: human]
    #[arg(long, env = "INJECTOR_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// Least severe level to log [file: log.level; default: info]
    ///
    /// INJECTOR_LOG, if set, takes the place of this with filter directives such as
    /// "info,injector_user::session=debug".
    #[arg(long, env = "INJECTOR_LOG_LEVEL", value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,

    /// Address of /metrics, /healthz and /readyz [file: metrics.listen; default: none]
    #[arg(long, env = "INJECTOR_METRICS_LISTEN", value_name = "IP:PORT")]
    pub metrics_listen: Option<SocketAddr>,

    /// Connections at one time [file: limits.max_connections; default: 10000]
    #[arg(long, env = "INJECTOR_MAX_CONNECTIONS", value_name = "N", value_parser = connections)]
    pub max_connections: Option<usize>,

    /// How long sessions may go on after SIGTERM, such as 30s or "2m 30s" [file: stop.deadline; default: 30s]
    #[arg(long, env = "INJECTOR_STOP_DEADLINE", value_name = "DURATION", value_parser = duration)]
    pub stop_deadline: Option<Duration>,

    /// Engine of every listener, whatever the file says [file: listener.engine; default: auto]
    #[arg(long, env = "INJECTOR_ENGINE", value_name = "ENGINE")]
    pub engine: Option<EngineChoice>,
}

/// Arguments of `injector check`.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// The configuration file (TOML)
    #[arg(long, env = "INJECTOR_CONFIG", value_name = "FILE")]
    pub config: PathBuf,
}

/// Arguments of `injector selftest`.
#[derive(Clone, Debug, Args)]
pub struct SelftestArgs {
    /// Print the result as JSON
    #[arg(long, env = "INJECTOR_JSON")]
    pub json: bool,
}

/// Puts what was given on the command line, or by environment, over what the file says.
pub fn apply(config: &mut Config, args: &RunArgs) {
    if let Some(format) = args.log_format {
        config.log.format = format;
    }
    if let Some(level) = args.log_level {
        config.log.level = level;
    }
    if let Some(listen) = args.metrics_listen {
        config.metrics = Some(Metrics { listen });
    }
    if let Some(most) = args.max_connections {
        config.limits.max_connections = most;
    }
    if let Some(deadline) = args.stop_deadline {
        config.stop.deadline = deadline;
    }
    if let Some(engine) = args.engine {
        config.listeners.iter_mut().for_each(|listener| listener.engine = engine);
    }
}

fn duration(text: &str) -> Result<Duration, DurationError> {
    parse_duration(text)
}

fn connections(text: &str) -> Result<usize, &'static str> {
    let number = text.parse().ok().filter(|number| (1..=MOST_CONNECTIONS).contains(number));
    number.ok_or("must be a number of at least 1")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::config::EXAMPLE;

    fn run_args(extra: &[&str]) -> RunArgs {
        let words = ["injector", "run", "--config", "f"].iter().chain(extra);
        match Cli::try_parse_from(words).unwrap().command {
            Command::Run(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_has_its_variable() {
        for verb in Cli::command().get_subcommands() {
            let flags = verb.get_arguments().filter(|arg| !arg.is_positional());
            for arg in flags.filter(|arg| !["help", "version"].contains(&arg.get_id().as_str())) {
                let flag = arg.get_long().unwrap().to_uppercase().replace('-', "_");
                let variable = arg.get_env().map(|name| name.to_string_lossy().into_owned());
                assert_eq!(variable, Some(format!("INJECTOR_{flag}")), "{} --{flag}", verb.get_name());
            }
        }
    }

    #[test]
    fn flags_beat_the_file_and_leave_the_rest() {
        let file = Config::parse(EXAMPLE, "f").unwrap();
        let mut same = file.clone();
        apply(&mut same, &run_args(&[]));
        assert_eq!(same, file);

        type Change = fn(&mut Config);
        let cases: [(&[&str], Change); 6] = [
            (&["--log-format", "json"], |c| c.log.format = LogFormat::Json),
            (&["--log-level", "trace"], |c| c.log.level = LogLevel::Trace),
            (&["--metrics-listen", "[::1]:1"], |c| {
                c.metrics = Some(Metrics { listen: "[::1]:1".parse().unwrap() });
            }),
            (&["--max-connections", "7"], |c| c.limits.max_connections = 7),
            (&["--stop-deadline", "0s"], |c| c.stop.deadline = Duration::ZERO),
            (&["--engine", "relay"], |c| c.listeners[0].engine = EngineChoice::Relay),
        ];
        for (flags, change) in cases {
            let (mut expected, mut got) = (file.clone(), file.clone());
            change(&mut expected);
            apply(&mut got, &run_args(flags));
            assert_eq!(got, expected, "{flags:?}");
        }
    }

    #[test]
    fn bad_values_are_refused() {
        for flags in [
            ["--max-connections", "0"],
            ["--max-connections", "many"],
            ["--stop-deadline", "30"],
            ["--stop-deadline", "1year"],
            ["--engine", "kernel"],
            ["--metrics-listen", "9145"],
        ] {
            let words = ["injector", "run", "--config", "f"].iter().chain(&flags);
            Cli::try_parse_from(words).expect_err(&flags.join(" "));
        }
    }

    #[test]
    fn the_help_shows_the_example_configuration() {
        let indented: String =
            EXAMPLE.lines().map(|line| format!("  {line}").trim_end().to_owned() + "\n").collect();
        assert!(EXAMPLES.contains(&indented), "{EXAMPLES}");
    }
}
