//! `injector inline detach`: removes what the inline engine leaves in the kernel.

use std::{io, path::Path};

use super::args::DetachArgs;
use crate::{
    config::{Config, ConfigError, Inline},
    engine::kernel,
};

/// Removes it, and prints what was removed.
///
/// # Errors
/// When the configuration is invalid, a daemon runs, or something cannot be removed.
pub fn detach(args: &DetachArgs) -> anyhow::Result<()> {
    let settings = settings(args.pin.as_deref(), args.config.as_deref())?;
    let removed = kernel::detach_inline(&settings, args.force)?;
    if removed.is_empty() {
        println!("nothing was left of engine \"inline\" in {}", settings.pin.display());
    }
    for what in removed {
        println!("removed {what}");
    }
    Ok(())
}

/// The settings of the daemon. An uninstalled daemon may have taken its file with it: then the
/// built-in values are what is left to try.
fn settings(pin: Option<&Path>, file: Option<&Path>) -> Result<Inline, ConfigError> {
    if let Some(pin) = pin {
        return Ok(Inline { pin: pin.to_owned(), ..Inline::default() });
    }
    let Some(file) = file else { return Ok(Inline::default()) };
    match Config::load(file) {
        Ok(config) => Ok(config.inline),
        Err(ConfigError::Read { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
            let inline = Inline::default();
            eprintln!(
                "{} does not exist; trying the built-in value of inline.pin, {} (--pin names another)",
                file.display(),
                inline.pin.display()
            );
            Ok(inline)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_found_without_the_file() {
        let pin = |pin: Option<&str>, file: Option<&str>| {
            settings(pin.map(Path::new), file.map(Path::new)).unwrap().pin
        };
        let built_in = Inline::default().pin;
        assert_eq!(pin(None, None), built_in);
        assert_eq!(pin(None, Some("/nonexistent/injector.toml")), built_in);
        assert_eq!(
            pin(Some("/sys/fs/bpf/other"), Some("/nonexistent/i.toml")),
            Path::new("/sys/fs/bpf/other")
        );
    }
}
