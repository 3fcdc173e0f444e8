//! `injector run`: loads the configuration, starts the log, and runs the daemon.

use super::{args::RunArgs, overrides};
use crate::{config::Config, daemon, telemetry::log};

/// Runs the daemon until it is stopped by a signal.
///
/// # Errors
/// When the configuration is invalid, or the daemon cannot start.
pub fn run(args: RunArgs) -> anyhow::Result<()> {
    let file = args.config.clone();
    let load = move || {
        let mut config = Config::load(&args.config)?;
        overrides::apply(&mut config, &args);
        Ok(config)
    };
    let config = load()?;
    log::init(&config.log)?;
    daemon::run(config, file, Box::new(load))
}
