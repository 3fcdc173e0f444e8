//! `injector run`: loads the configuration, starts the log, and runs the daemon.

use std::path::{self, PathBuf};

use anyhow::Context as _;

use super::{args::RunArgs, overrides};
use crate::{config::Config, control::ConfigSource, daemon, telemetry::log};

/// Runs the daemon until it is stopped by a signal.
///
/// # Errors
/// When the configuration is invalid, or the daemon cannot start.
pub fn run(args: RunArgs) -> anyhow::Result<()> {
    let (file, load) = config_source(args)?;
    let config = load()?;
    let logging = log::init(&config.log)?;
    daemon::run(config, file, load, &logging)
}

/// Loads the file, now and at every reload, with the overrides of the command line. Messages have its
/// absolute path: their reader is at `injector reload`, in a directory of their own.
fn config_source(mut args: RunArgs) -> anyhow::Result<(PathBuf, ConfigSource)> {
    args.config = path::absolute(&args.config)
        .with_context(|| format!("cannot find the directory of {}", args.config.display()))?;
    let file = args.config.clone();
    let load = move || {
        let mut config = Config::load(&args.config)?;
        overrides::apply(&mut config, &args);
        Ok(config)
    };
    Ok((file, Box::new(load)))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    #[test]
    fn messages_have_the_absolute_path_of_the_file() {
        let cli = Cli::parse_from(["injector", "run", "--config", "no-such.toml"]);
        let Command::Run(args) = cli.command else { panic!("{cli:?}") };
        let (file, load) = config_source(args).unwrap();
        let expected = std::env::current_dir().unwrap().join("no-such.toml");
        assert_eq!(file, expected);
        let error = load().unwrap_err().to_string();
        assert!(error.contains(&expected.display().to_string()), "{error}");
    }
}
