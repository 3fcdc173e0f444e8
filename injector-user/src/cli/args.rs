//! The arguments of every command. Every flag has an environment variable: a flag overrides the
//! variable, and both override the file.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

pub use self::{
    backend::{BackendArgs, BackendCommand, BackendWeightArgs},
    bans::{BanArgs, BansArgs, UnbanArgs},
};
use crate::config::{EngineChoice, LogFormat, LogLevel, MAX_CONNECTIONS, parse_duration, parse_flag_address};

mod backend;
mod bans;

/// Prepends a PROXY protocol header with the client's real address to mail connections and lets the kernel
/// forward the data.
#[derive(Clone, Debug, Parser)]
#[command(name = "injector", version, max_term_width = 100, after_long_help = EXAMPLES)]
pub struct Cli {
    /// The command to run.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = r#"Examples:
  Show which engines this machine can run, and why
    $ injector selftest

  Check a configuration and show the effective settings
    $ injector check --config /etc/injector/injector.toml

  Run it
    $ injector run --config /etc/injector/injector.toml

  Show the state of a running injector, then reload its configuration
    $ injector status
    $ injector reload

Example configuration:
  [metrics]
  listen = "127.0.0.1:9145"

  [[listener]]
  name = "smtp"
  bind = ["192.0.2.10:25", "[2001:db8::10]:25"]
  protocol = "smtp"
  engine = "auto"
  backends = ["mail.internal:2525"]

All options are described in docs/config.md, the metrics in docs/metrics.md."#;

/// The commands of `injector`.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Run the injector in the foreground
    ///
    /// Logs go to standard error. SIGTERM and SIGINT stop accepting and let sessions finish until the
    /// deadline.
    #[command(after_long_help = RUN_EXAMPLES)]
    Run(RunArgs),
    /// Check a configuration file and print the effective settings
    ///
    /// Prints every error with its line and exits with 1, or prints the listeners with all defaults. Opens no
    /// port and resolves no name.
    Check(CheckArgs),
    /// Test which engines can run on this machine, and why others cannot
    ///
    /// Forwards test data through each engine over private loopback sockets and cleans up.
    Selftest(SelftestArgs),
    /// Diagnose every backend with real connections, and name the setting to change
    ///
    /// Run it on the injector's host. Opens a few connections to each address of each backend, sends PROXY headers
    /// with this host's addresses, ends each dialogue with QUIT and delivers nothing. Exits with 0 if no fault was
    /// found, with 1 if there are faults, with 2 if nothing could be examined.
    #[command(after_long_help = crate::doctor::EXAMPLES)]
    Doctor(crate::doctor::DoctorArgs),
    /// Send a message through the injector, fetch it by IMAP, and compare
    ///
    /// Meant for a monitor that runs every 20 minutes: it reports which step failed and what to do, and writes
    /// metrics for Prometheus. Described in docs/observability.md.
    #[cfg(feature = "probe")]
    #[command(after_long_help = crate::probe::EXAMPLES)]
    Probe(Box<crate::probe::ProbeArgs>),
    /// Remove what engine "inline" leaves in the kernel
    #[command(subcommand)]
    Inline(InlineCommand),
    /// Remove what the guard leaves in the kernel
    #[command(subcommand)]
    Guard(GuardCommand),
    /// Show the state of a running injector: listeners, backends, configuration
    Status(ControlArgs),
    /// List the sessions of a running injector, or end some
    #[command(args_conflicts_with_subcommands = true)]
    Sessions(SessionsArgs),
    /// Reject new clients (they get a temporary failure); existing sessions may finish
    ///
    /// Without LISTENER, drains all listeners, and /readyz returns 503 `draining`. Sessions from before the drain
    /// are aborted at the deadline.
    #[command(after_long_help = DRAIN_EXAMPLES)]
    Drain(DrainArgs),
    /// Accept new clients again after `drain`
    Resume(ResumeArgs),
    /// Disable or enable a backend, or change its weight
    #[command(subcommand)]
    Backend(BackendCommand),
    /// Ban an address or a network: its packets are dropped, and its sessions end
    ///
    /// A ban outlives a restart of the injector. Without --for it does not end by itself. A ban of what is banned
    /// already gets the new end and reason. Addresses of backends, of this host and of its gateways, and networks of
    /// guard.allow cannot be banned. The configuration must have a table `guard`.
    #[command(after_long_help = bans::EXAMPLES)]
    Ban(BanArgs),
    /// Lift a ban of `injector ban`
    ///
    /// Exits with 0 also if there was none. Prints which lists or decisions of CrowdSec still ban it.
    Unban(UnbanArgs),
    /// List the bans, in the order of addresses
    Bans(BansArgs),
    /// Log at another level, until the next reload
    ///
    /// The levels replace those of an earlier command. `injector reload` returns to log.level of the file, or to
    /// INJECTOR_LOG.
    #[command(after_long_help = LOG_LEVEL_EXAMPLES)]
    LogLevel(LogLevelArgs),
    /// Reload the configuration of a running injector
    ///
    /// The file is checked first; an invalid file changes nothing. Sessions continue; sessions of removed listeners
    /// may finish within listener.timeouts.drain. SIGHUP does the same and reports only to the log.
    Reload(ReloadArgs),
    /// Show a running injector live on the terminal
    Top(TopArgs),
    /// Print completions for a shell
    Completions(CompletionsArgs),
    /// Print the manual page, or write those of all commands
    Man(ManArgs),
}

const DRAIN_EXAMPLES: &str = "\
Examples:
  Before the host is restarted: sessions have two minutes, then the rest is aborted
    $ injector drain --deadline 2m

  Drain one listener, then accept clients again
    $ injector drain smtp
    $ injector resume smtp";

const LOG_LEVEL_EXAMPLES: &str = "\
Examples:
  Each step of sessions and health checks; everything else as configured
    $ injector log-level session=debug health=debug

  Back to the configuration
    $ injector reload";

/// The control socket of a running injector.
#[derive(Clone, Debug, Args)]
pub struct SocketArgs {
    /// Control socket [file: admin.socket]
    #[arg(long, env = "INJECTOR_SOCKET", value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
}

/// The path in packages and manifests.
const DEFAULT_SOCKET: &str = "/run/injector/admin.sock";

/// Arguments of commands to a running injector.
#[derive(Clone, Debug, Args)]
pub struct ControlArgs {
    /// The control socket
    #[command(flatten)]
    pub at: SocketArgs,

    /// Print the reply as JSON
    #[arg(long, env = "INJECTOR_JSON")]
    pub json: bool,
}

/// Arguments of `injector sessions`.
#[derive(Clone, Debug, Args)]
pub struct SessionsArgs {
    /// What to do with sessions, other than to list them.
    #[command(subcommand)]
    pub command: Option<SessionsCommand>,

    /// The control socket, and the format of the reply
    #[command(flatten)]
    pub control: ControlArgs,

    /// Only this listener
    pub listener: Option<String>,

    /// Limit to the N oldest
    #[arg(long, env = "INJECTOR_LIMIT", value_name = "N")]
    pub limit: Option<usize>,
}

/// The commands of `injector sessions`.
#[derive(Clone, Debug, Subcommand)]
pub enum SessionsCommand {
    /// End one session, or all of a client's address or network
    ///
    /// In clear text the client gets a temporary failure of its protocol (421, * BYE, -ERR) where one may follow what
    /// it was sent; otherwise its connection is reset, as are those of inline. The backend's connection is reset. The
    /// client may connect again.
    #[command(after_long_help = END_EXAMPLES)]
    End(EndSessionsArgs),
}

const END_EXAMPLES: &str = "\
Examples:
  End one session that `injector sessions` lists
    $ injector sessions end 1742

  End all sessions of a client, then those of a network on one listener
    $ injector sessions end 198.51.100.7
    $ injector sessions end 2001:db8::/64 --listener smtp";

/// Arguments of `injector sessions end`.
#[derive(Clone, Debug, Args)]
pub struct EndSessionsArgs {
    /// The control socket, and the format of the reply
    #[command(flatten)]
    pub control: ControlArgs,

    /// An ID of `injector sessions`, a client's address with or without port, or a network
    #[arg(value_name = "ID|ADDRESS")]
    pub target: String,

    /// Only of this listener
    #[arg(long, env = "INJECTOR_LISTENER", value_name = "NAME")]
    pub listener: Option<String>,
}

/// Arguments of `injector drain`.
#[derive(Clone, Debug, Args)]
pub struct DrainArgs {
    /// The control socket, and the format of the reply
    #[command(flatten)]
    pub control: ControlArgs,

    /// Only this listener
    pub listener: Option<String>,

    /// Abort sessions after this time, such as 30s [file: listener.timeouts.drain]
    #[arg(long, env = "INJECTOR_DEADLINE", value_name = "DURATION", value_parser = parse_duration)]
    pub deadline: Option<Duration>,

    /// Wait until no connection is left
    #[arg(long, env = "INJECTOR_WAIT")]
    pub wait: bool,
}

/// Arguments of `injector resume`.
#[derive(Clone, Debug, Args)]
pub struct ResumeArgs {
    /// The control socket, and the format of the reply
    #[command(flatten)]
    pub control: ControlArgs,

    /// Only this listener
    pub listener: Option<String>,
}

/// Arguments of `injector log-level`.
#[derive(Clone, Debug, Args)]
pub struct LogLevelArgs {
    /// The control socket, and the format of the reply
    #[command(flatten)]
    pub control: ControlArgs,

    /// error, warn, info, debug or trace, of all log targets or of one, such as session=debug
    #[arg(required = true, value_name = "LEVEL|TARGET=LEVEL")]
    pub levels: Vec<String>,
}

/// Arguments of `injector reload`.
#[derive(Clone, Debug, Args)]
pub struct ReloadArgs {
    /// The control socket, and the format of the reply
    #[command(flatten)]
    pub control: ControlArgs,

    /// Watch this file, and reload now and on change
    #[arg(long, env = "INJECTOR_WATCH", value_name = "FILE", conflicts_with = "json")]
    pub watch: Option<PathBuf>,

    /// Change nothing, and print what a reload would do to each listener
    ///
    /// The running injector reads the file, selects engines, binds the new addresses, resolves the names of
    /// backends and checks the backends. Fails if the reload would be rejected.
    #[arg(long, env = "INJECTOR_DRY_RUN", conflicts_with = "watch")]
    pub dry_run: bool,
}

/// Arguments of `injector top`.
#[derive(Clone, Debug, Args)]
pub struct TopArgs {
    /// The control socket
    #[command(flatten)]
    pub at: SocketArgs,

    /// Refresh interval, such as 1s
    #[arg(long, env = "INJECTOR_INTERVAL", value_name = "DURATION", value_parser = parse_duration, default_value = "1s")]
    pub interval: Duration,

    /// Print one page as text and exit
    #[arg(long, env = "INJECTOR_ONCE")]
    pub once: bool,
}

/// The commands of `injector inline`.
#[derive(Clone, Debug, Subcommand)]
pub enum InlineCommand {
    /// Detach the programs from all devices, and remove their maps
    ///
    /// Programs and maps outlive the daemon, so that connections continue while it restarts. Stop the daemon first,
    /// because it attaches the programs again. Connections through the engine break.
    Detach(DetachArgs),
}

/// The commands of `injector guard`.
#[derive(Clone, Debug, Subcommand)]
pub enum GuardCommand {
    /// Detach the programs from all devices, and remove their maps
    ///
    /// Programs and maps outlive the daemon, so that bans hold while it restarts. Stop the daemon first, because it
    /// attaches the programs again. All bans in the kernel are lifted.
    Detach(DetachArgs),
}

/// Arguments of `injector inline detach` and `injector guard detach`.
#[derive(Clone, Debug, Args)]
pub struct DetachArgs {
    /// The configuration file (TOML) that the daemon ran with; only its directory of pins counts
    #[arg(long, env = "INJECTOR_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// The directory of the pins, in place of that in the file
    #[arg(long, env = "INJECTOR_PIN", value_name = "DIRECTORY")]
    pub pin: Option<PathBuf>,

    /// Detach although a daemon uses the programs; it may attach them again
    #[arg(long, env = "INJECTOR_FORCE")]
    pub force: bool,
}

const RUN_EXAMPLES: &str = "\
Examples:
  Use the relay engine for every listener, overriding the file
    $ injector run --config injector.toml --engine relay

  In a container, configured by environment variables
    $ INJECTOR_CONFIG=/etc/injector.toml INJECTOR_LOG_FORMAT=json injector run

  Log sessions at debug level, everything else at info
    $ INJECTOR_LOG=info,session=debug injector run --config injector.toml";

/// Arguments of `injector run`. `None` keeps the value of the file.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// The configuration file (TOML)
    #[arg(long, env = "INJECTOR_CONFIG", value_name = "FILE")]
    pub config: PathBuf,

    /// Log format [file: log.format; default: human]
    #[arg(long, env = "INJECTOR_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// Least severe level to log [file: log.level; default: info]
    ///
    /// INJECTOR_LOG, if set, overrides this with filter directives such as "info,session=debug".
    #[arg(long, env = "INJECTOR_LOG_LEVEL", value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,

    /// Address of /metrics, /healthz and /readyz [file: metrics.listen; default: none]
    #[arg(long, env = "INJECTOR_METRICS_LISTEN", value_name = "IP:PORT", value_parser = parse_flag_address)]
    pub metrics_listen: Option<SocketAddr>,

    /// Address of /healthz and /readyz alone [file: health.listen; default: none]
    #[arg(long, env = "INJECTOR_HEALTH_LISTEN", value_name = "IP:PORT", value_parser = parse_flag_address)]
    pub health_listen: Option<SocketAddr>,

    /// Maximum number of concurrent connections [file: limits.max_connections; default: 10000]
    #[arg(long, env = "INJECTOR_MAX_CONNECTIONS", value_name = "N", value_parser = connections)]
    pub max_connections: Option<usize>,

    /// How long sessions may continue after SIGTERM, such as 30s or "2m 30s" [file: stop.deadline; default: 30s]
    #[arg(long, env = "INJECTOR_STOP_DEADLINE", value_name = "DURATION", value_parser = parse_duration)]
    pub stop_deadline: Option<Duration>,

    /// Engine of every listener, overriding the file [file: listener.engine; default: auto]
    #[arg(long, env = "INJECTOR_ENGINE", value_name = "ENGINE")]
    pub engine: Option<EngineChoice>,

    /// Kubernetes node that the injector runs on [file: kubernetes.node; default: none]
    #[arg(long, env = "INJECTOR_NODE", value_name = "NAME")]
    pub node: Option<String>,

    /// Zone of that node [file: kubernetes.zone; default: from an endpoint on the node]
    #[arg(long, env = "INJECTOR_ZONE", value_name = "NAME")]
    pub zone: Option<String>,
}

/// Arguments of `injector check`.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// The configuration file (TOML)
    #[arg(long, env = "INJECTOR_CONFIG", value_name = "FILE")]
    pub config: PathBuf,
}

/// Arguments of `injector completions`.
#[derive(Clone, Debug, Args)]
pub struct CompletionsArgs {
    /// Shell to generate completions for
    pub shell: Shell,
}

/// Arguments of `injector man`.
#[derive(Clone, Debug, Args)]
pub struct ManArgs {
    /// Write a page for each command into this folder instead of printing that of `injector`
    #[arg(long, env = "INJECTOR_OUT", value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Arguments of `injector selftest`.
#[derive(Clone, Debug, Args)]
pub struct SelftestArgs {
    /// Print the result as JSON
    #[arg(long, env = "INJECTOR_JSON")]
    pub json: bool,
}

fn connections(text: &str) -> Result<usize, &'static str> {
    let number = text.parse().ok().filter(|number| (1..=MAX_CONNECTIONS).contains(number));
    number.ok_or("must be a number of at least 1")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::config::EXAMPLE;

    #[test]
    fn clap_accepts_the_definition() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_has_an_environment_variable() {
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
    fn invalid_values_are_rejected() {
        for flags in [
            ["--max-connections", "0"],
            ["--max-connections", "many"],
            ["--stop-deadline", "30"],
            ["--stop-deadline", "1year"],
            ["--engine", "kernel"],
            ["--metrics-listen", "9145"],
            ["--health-listen", "9146"],
        ] {
            let words = ["injector", "run", "--config", "f"].iter().chain(&flags);
            Cli::try_parse_from(words).expect_err(&flags.join(" "));
        }
    }

    /// The manifests put a node's address, of either family, in front of the ports.
    #[test]
    fn metrics_and_health_listen_on_the_address_that_kubernetes_substitutes() {
        for manifest in [
            include_str!("../../../deploy/kubernetes/base/daemonset.yaml"),
            include_str!("../../../deploy/helm/injector/templates/daemonset.yaml"),
        ] {
            let value_of = |variable: &str| {
                let mut lines = manifest.lines().skip_while(|line| !line.ends_with(variable));
                let value = lines.nth(1).unwrap().trim().strip_prefix("value: ").unwrap();
                value
                    .replace("{{ .Values.metrics.port }}", "9145")
                    .replace("{{ .Values.health.port }}", "9146")
            };
            let [metrics, health] = ["INJECTOR_METRICS_LISTEN", "INJECTOR_HEALTH_LISTEN"].map(value_of);
            for address in ["192.0.2.1", "fd24::1", "2001:db8:1:2:3:4:5:6"] {
                let [metrics, health] = [&metrics, &health].map(|it| it.replace("$(NODE_ADDRESS)", address));
                let flags = ["--metrics-listen", &metrics, "--health-listen", &health];
                let words = ["injector", "run", "--config", "f"].iter().copied().chain(flags);
                let Command::Run(args) = Cli::try_parse_from(words).unwrap().command else { panic!() };
                let expected = |port| Some(SocketAddr::new(address.parse().unwrap(), port));
                assert_eq!(args.metrics_listen, expected(9145), "{metrics}");
                assert_eq!(args.health_listen, expected(9146), "{health}");
            }
        }
    }

    /// Adds the help of a command and of its subcommands to the snapshots.
    #[cfg(feature = "probe")]
    fn snapshot_help(command: &mut clap::Command, name: &str) {
        insta::assert_snapshot!(format!("help_{name}"), command.render_long_help().to_string());
        for subcommand in command.get_subcommands_mut() {
            let name = format!("{name}_{}", subcommand.get_name());
            snapshot_help(subcommand, &name);
        }
    }

    /// Without the values of the environment in which the test runs.
    #[cfg(feature = "probe")]
    fn hide_values(command: clap::Command) -> clap::Command {
        command.mut_args(|arg| arg.hide_env_values(true)).mut_subcommands(hide_values)
    }

    #[cfg(feature = "probe")]
    #[test]
    fn help_of_every_command() {
        let mut command = Cli::command().term_width(100).disable_help_subcommand(true);
        command = hide_values(command);
        command.build();
        snapshot_help(&mut command, "injector");
    }

    #[test]
    fn help_shows_the_example_configuration() {
        let indented: String =
            EXAMPLE.lines().map(|line| format!("  {line}").trim_end().to_owned() + "\n").collect();
        assert!(EXAMPLES.contains(&indented), "{EXAMPLES}");
    }
}
