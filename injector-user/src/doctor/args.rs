//! The arguments of `injector doctor`.

use std::{path::PathBuf, time::Duration};

use clap::Args;

use crate::config::parse_duration;

/// Shown at the end of `injector doctor --help`.
pub const EXAMPLES: &str = "\
Examples:
  After a change of the mail server
    $ injector doctor --config injector.toml --listener smtp

  On any other host: does a mail server trust headers from there?
    $ injector doctor --config injector.toml --untrusted

  On an edge node of a cluster: who reaches the PROXY ports, and for which addresses to open them
    $ injector doctor --config injector.toml --kubernetes

Verdicts, and what the doctor sends to a server, are described in docs/doctor.md.";

/// Arguments of `injector doctor`.
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// The configuration file (TOML)
    #[arg(long, env = "INJECTOR_CONFIG", value_name = "FILE")]
    pub config: PathBuf,

    /// Only this listener
    #[arg(long, env = "INJECTOR_LISTENER", value_name = "NAME")]
    pub listener: Option<String>,

    /// Print the result as JSON
    #[arg(long, env = "INJECTOR_JSON")]
    pub json: bool,

    /// How long to wait for a server's reply; postscreen greets after up to 6s, and Postfix waits 5s for a header
    #[arg(long, env = "INJECTOR_TIMEOUT", value_name = "DURATION", value_parser = parse_duration, default_value = "10s")]
    pub timeout: Duration,

    /// Run on a host that is not the injector: report backends that trust a header from it, and
    /// whether they relay mail for it
    #[arg(long, env = "INJECTOR_UNTRUSTED")]
    pub untrusted: bool,

    /// Examine no server, but the Services of Kubernetes that the configuration names: who reaches
    /// them, and from which addresses this host connects to their endpoints
    #[arg(long, env = "INJECTOR_KUBERNETES", conflicts_with = "untrusted")]
    pub kubernetes: bool,
}
