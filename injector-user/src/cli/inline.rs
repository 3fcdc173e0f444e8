//! `injector inline detach`: removes what the inline engine leaves in the kernel.

use super::args::DetachArgs;
use crate::{
    config::{Config, Inline},
    engine::kernel,
};

/// Removes it, and prints what was removed.
///
/// # Errors
/// When the configuration is invalid, or something cannot be removed.
pub fn detach(args: &DetachArgs) -> anyhow::Result<()> {
    let settings = match &args.config {
        Some(file) => Config::load(file)?.inline,
        None => Inline::default(),
    };
    let removed = kernel::detach_inline(&settings)?;
    if removed.is_empty() {
        println!("nothing was left of engine \"inline\"");
    }
    for what in removed {
        println!("removed {what}");
    }
    Ok(())
}
