//! `injector completions`: scripts that complete commands and flags in a shell.

use std::io::{self, Write as _};

use clap::Command;
use clap_complete::Shell;

/// Prints the completion script of `command` for a shell.
///
/// # Errors
/// When standard output cannot be written.
pub fn print(command: Command, shell: Shell) -> io::Result<()> {
    io::stdout().write_all(&script(command, shell))
}

fn script(mut command: Command, shell: Shell) -> Vec<u8> {
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
            let script = String::from_utf8(script(Cli::command(), *shell)).unwrap();
            for subcommand in Cli::command().get_subcommands() {
                assert!(script.contains(subcommand.get_name()), "{shell}: {}", subcommand.get_name());
            }
        }
    }
}
