//! `injector man`: manual pages, made of the same definition as the command line.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::{Args, Command, CommandFactory as _};
use clap_mangen::Man;

use crate::cli::Cli;

/// Arguments of `injector man`.
#[derive(Clone, Debug, Args)]
pub struct ManArgs {
    /// Write a page for every verb into this folder, instead of printing that of `injector`
    #[arg(long, env = "INJECTOR_OUT", value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Prints or writes.
///
/// # Errors
/// When standard output takes no more, or the folder cannot be written.
pub fn run(args: &ManArgs) -> anyhow::Result<()> {
    match &args.out {
        Some(folder) => write(folder).with_context(|| format!("cannot write to {}", folder.display())),
        None => {
            let mut page = Vec::new();
            Man::new(command()).render(&mut page)?;
            io::stdout().write_all(&page).context("cannot print")
        }
    }
}

/// `injector.1`, `injector-run.1`, `injector-inline-detach.1` and so on.
fn write(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    clap_mangen::generate_to(command(), folder)
}

/// Without the verbs `help`, of which there would be a page for each page.
fn command() -> Command {
    without_help(Cli::command())
}

fn without_help(command: Command) -> Command {
    command.disable_help_subcommand(true).mut_subcommands(without_help)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pages of a verb and of those below it.
    fn pages(command: &Command, name: &str) -> Vec<String> {
        let below =
            command.get_subcommands().flat_map(|verb| pages(verb, &format!("{name}-{}", verb.get_name())));
        std::iter::once(format!("{name}.1")).chain(below).collect()
    }

    #[test]
    fn every_verb_has_its_page_and_nothing_else_has() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path()).unwrap();
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
