//! The command line: arguments, and the commands that are not a module of their own.

pub mod args;
pub mod bans;
pub mod check;
pub mod completions;
pub mod control;
pub mod detach;
pub mod man;
mod overrides;
pub mod run;
pub mod selftest;

pub use self::args::{Cli, Command, GuardCommand, InlineCommand};
