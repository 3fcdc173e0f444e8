//! `injector man`: manual pages, generated from the definition of the command line.

use std::{
    fs,
    io::{self, Write as _},
    path::Path,
};

use anyhow::Context as _;
use clap::Command;
use clap_mangen::Man;

/// Prints the page of `command`, or writes it and those of its subcommands into a folder.
///
/// # Errors
/// When standard output or the folder cannot be written.
pub fn run(command: Command, out: Option<&Path>) -> anyhow::Result<()> {
    let command = without_help(command);
    match out {
        Some(folder) => {
            write(command, folder).with_context(|| format!("cannot write to {}", folder.display()))
        }
        None => {
            let mut page = Vec::new();
            Man::new(command).render(&mut page)?;
            io::stdout().write_all(&page).context("cannot print")
        }
    }
}

/// Writes `injector.1`, `injector-run.1`, `injector-inline-detach.1` and so on.
fn write(command: Command, folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    clap_mangen::generate_to(command, folder)
}

/// Removes the `help` subcommands, which would get pages too.
fn without_help(command: Command) -> Command {
    command.disable_help_subcommand(true).mut_subcommands(without_help)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::args::Cli;

    /// The pages of a command and of its subcommands.
    fn pages(command: &Command, name: &str) -> Vec<String> {
        let below = command
            .get_subcommands()
            .flat_map(|subcommand| pages(subcommand, &format!("{name}-{}", subcommand.get_name())));
        std::iter::once(format!("{name}.1")).chain(below).collect()
    }

    #[test]
    fn every_command_has_one_page() {
        let folder = tempfile::tempdir().unwrap();
        write(without_help(Cli::command()), folder.path()).unwrap();
        let entries = fs::read_dir(folder.path()).unwrap();
        let mut written: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        let mut expected = pages(&Cli::command(), "injector");
        written.sort();
        expected.sort();
        assert_eq!(written, expected);
        let page = fs::read_to_string(folder.path().join("injector-run.1")).unwrap();
        assert!(page.contains("INJECTOR_STOP_DEADLINE"), "{page}");
    }
}
