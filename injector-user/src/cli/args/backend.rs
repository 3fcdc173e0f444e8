//! The arguments of `injector backend`.

use clap::{Args, Subcommand, value_parser};

use super::ControlArgs;
use crate::config::Backend;

/// The commands of `injector backend`.
#[derive(Clone, Debug, Subcommand)]
pub enum BackendCommand {
    /// Enable a backend regardless of its health checks
    Up(BackendArgs),
    /// Disable a backend: no new connections, established ones continue
    Down(BackendArgs),
    /// Let the health checks of a backend decide again
    Auto(BackendArgs),
    /// Change a backend's share of new connections, until the next reload
    ///
    /// Established connections continue. With 0 it gets no new ones, but a listener keeps at least one backend that
    /// is no backup and has a weight above 0, as in the configuration.
    #[command(after_long_help = WEIGHT_EXAMPLES)]
    Weight(BackendWeightArgs),
}

const WEIGHT_EXAMPLES: &str = "\
Examples:
  A new server gets few connections at first
    $ injector backend weight mail-2.internal:2525 1

  Back to the configuration
    $ injector reload";

/// Arguments of `injector backend up`, `down` and `auto`.
#[derive(Clone, Debug, Args)]
pub struct BackendArgs {
    /// The control socket, and the format of the reply
    #[command(flatten)]
    pub control: ControlArgs,

    /// The backend as in the configuration, such as mail.internal:2525
    pub backend: String,

    /// Only for this listener
    #[arg(long, env = "INJECTOR_LISTENER", value_name = "NAME")]
    pub listener: Option<String>,
}

/// Arguments of `injector backend weight`.
#[derive(Clone, Debug, Args)]
pub struct BackendWeightArgs {
    /// Which backend
    #[command(flatten)]
    pub of: BackendArgs,

    /// Its share relative to the other backends, 0 to 1000
    #[arg(value_parser = value_parser!(u32).range(..=i64::from(Backend::MAX_WEIGHT)))]
    pub weight: u32,
}
