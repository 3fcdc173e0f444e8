//! `injector check`: prints the effective configuration, and what in it is probably a mistake.

use super::args::CheckArgs;
use crate::config::{self, Config};

/// Prints the configuration on standard output, and remarks on standard error.
///
/// # Errors
/// When the configuration is invalid.
pub fn run(args: &CheckArgs) -> anyhow::Result<()> {
    let config = Config::load(&args.config)?;
    print!("{}", config::summary(&config));
    for remark in config::remarks(&config) {
        eprintln!("warning: {}: {remark}", args.config.display());
    }
    Ok(())
}
