//! `injector inline detach` and `injector guard detach`: remove what a daemon leaves in the kernel.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::args::DetachArgs;
use crate::{
    config::{Config, ConfigError, Guard, Inline},
    engine::kernel,
};

/// Removes what the inline engine left, and prints it.
///
/// # Errors
/// When the configuration is invalid, a daemon runs, or something cannot be removed.
pub fn inline(args: &DetachArgs) -> anyhow::Result<()> {
    let pin = pin(args.pin.as_deref(), args.config.as_deref(), &INLINE)?;
    let settings = Inline { pin, ..Inline::default() };
    let removed = kernel::detach_inline(&settings, args.force)?;
    print(&removed, &INLINE, &settings.pin);
    Ok(())
}

/// The same of the guard.
///
/// # Errors
/// As [`inline`].
pub fn guard(args: &DetachArgs) -> anyhow::Result<()> {
    let pin = pin(args.pin.as_deref(), args.config.as_deref(), &GUARD)?;
    let removed = kernel::detach_guard(&pin, args.force)?;
    print(&removed, &GUARD, &pin);
    Ok(())
}

/// What leaves pins.
struct Part {
    name: &'static str,
    setting: &'static str,
    /// Its folder for pins by this configuration.
    pin: fn(Config) -> PathBuf,
    built_in: fn() -> PathBuf,
}

const INLINE: Part = Part {
    name: "engine \"inline\"",
    setting: "inline.pin",
    pin: |config| config.inline.pin,
    built_in: || Inline::default().pin,
};

const GUARD: Part = Part {
    name: "the guard",
    setting: "guard.pin",
    pin: |config| config.guard.unwrap_or_default().pin,
    built_in: || Guard::default().pin,
};

fn print(removed: &[String], part: &Part, pin: &Path) {
    if removed.is_empty() {
        println!("nothing was left of {} in {}", part.name, pin.display());
    }
    for what in removed {
        println!("removed {what}");
    }
}

/// The folder for pins of the daemon. An uninstalled daemon may have taken its file with it: then the
/// built-in value is what is left to try.
fn pin(pin: Option<&Path>, file: Option<&Path>, part: &Part) -> Result<PathBuf, ConfigError> {
    if let Some(pin) = pin {
        return Ok(pin.to_owned());
    }
    let Some(file) = file else { return Ok((part.built_in)()) };
    match Config::load(file) {
        Ok(config) => Ok((part.pin)(config)),
        Err(ConfigError::Read { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
            let pin = (part.built_in)();
            eprintln!(
                "{} does not exist; trying the built-in value of {}, {} (--pin names another)",
                file.display(),
                part.setting,
                pin.display()
            );
            Ok(pin)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_found_without_the_file() {
        for part in [INLINE, GUARD] {
            let find = |given: Option<&str>, file: Option<&str>| {
                pin(given.map(Path::new), file.map(Path::new), &part).unwrap()
            };
            let built_in = (part.built_in)();
            assert_eq!(find(None, None), built_in);
            assert_eq!(find(None, Some("/nonexistent/injector.toml")), built_in);
            assert_eq!(
                find(Some("/sys/fs/bpf/other"), Some("/nonexistent/i.toml")),
                Path::new("/sys/fs/bpf/other")
            );
        }
    }
}
