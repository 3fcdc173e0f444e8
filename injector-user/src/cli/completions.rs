//! `injector completions`: what a shell needs to complete the verbs and flags.

use std::io::{self, Write as _};

use clap::Command;
use clap_complete::Shell;

/// Prints the completions of `command` for this shell.
///
/// # Errors
/// When standard output takes no more.
pub fn print(command: Command, shell: Shell) -> io::Result<()> {
    io::stdout().write_all(&of(command, shell))
}

fn of(mut command: Command, shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "injector", &mut script);
    script
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, ValueEnum as _};

    use super::*;
    use crate::cli::args::Cli;

    #[test]
    fn scripts_complete_every_command() {
        for shell in Shell::value_variants() {
            let script = String::from_utf8(of(Cli::command(), *shell)).unwrap();
            for verb in Cli::command().get_subcommands() {
                assert!(script.contains(verb.get_name()), "{shell}: {}", verb.get_name());
            }
        }
    }
}
