//! `injector check`: prints the effective configuration, and what in it is probably a mistake.

use anyhow::Context as _;

use super::args::CheckArgs;
use crate::{
    config::{self, Config},
    net::source,
};

/// Prints the configuration on standard output, and remarks on standard error.
///
/// # Errors
/// When the configuration is invalid, or this host lacks a source address.
pub fn run(args: &CheckArgs) -> anyhow::Result<()> {
    let config = Config::load(&args.config)?;
    for listener in &config.listeners {
        source::check(&listener.source_addresses).with_context(|| format!("listener {:?}", listener.name))?;
    }
    print!("{}", config::summary(&config));
    for remark in config::remarks(&config) {
        eprintln!("warning: {}: {remark}", args.config.display());
    }
    Ok(())
}
