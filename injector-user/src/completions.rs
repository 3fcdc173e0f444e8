//! `injector completions`: what a shell needs to complete the verbs and flags.

use std::io::{self, Write as _};

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::cli::Cli;

/// Arguments of `injector completions`.
#[derive(Clone, Debug, Args)]
pub struct CompletionsArgs {
    /// For which shell
    pub shell: Shell,
}

/// Prints them.
///
/// # Errors
/// When standard output takes no more.
pub fn print(args: &CompletionsArgs) -> io::Result<()> {
    io::stdout().write_all(&of(args.shell))
}

fn of(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "injector", &mut script);
    script
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn every_verb_is_in_the_script_of_every_shell() {
        for shell in Shell::value_variants() {
            let script = String::from_utf8(of(*shell)).unwrap();
            for verb in Cli::command().get_subcommands() {
                assert!(script.contains(verb.get_name()), "{shell}: {}", verb.get_name());
            }
        }
    }
}
