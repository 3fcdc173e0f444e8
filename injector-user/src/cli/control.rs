//! Commands to a running daemon over its control socket.

use std::{thread, time::Duration};

use anyhow::ensure;

use super::args::{
    BackendArgs, BackendCommand, BackendWeightArgs, ControlArgs, DrainArgs, EndSessionsArgs, LogLevelArgs,
    ReloadArgs, ResumeArgs, SessionsArgs, SessionsCommand, TopArgs,
};
use crate::control::{
    self, Request, client, top,
    wire::{Answer, BackendAction, ListenerStatus},
};

/// How often `drain --wait` asks whether sessions are left.
const DRAIN_POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Prints the state of the daemon.
///
/// # Errors
/// When the daemon does not answer.
pub fn status(args: &ControlArgs) -> anyhow::Result<()> {
    send(args, &Request::Status).map(drop)
}

/// Prints the sessions of the daemon, or ends some.
///
/// # Errors
/// When the daemon does not answer.
pub fn sessions(args: SessionsArgs) -> anyhow::Result<()> {
    if let Some(SessionsCommand::End(EndSessionsArgs { control, target, listener })) = args.command {
        return send(&control, &Request::EndSessions { target, listener }).map(drop);
    }
    send(&args.control, &Request::Sessions { listener: args.listener, limit: args.limit }).map(drop)
}

/// Drains listeners, and waits for the end of their sessions if asked to.
///
/// # Errors
/// When the daemon does not answer or rejects the command.
pub fn drain(args: &DrainArgs) -> anyhow::Result<()> {
    let deadline_ms = args.deadline.map(|within| u64::try_from(within.as_millis()).unwrap_or(u64::MAX));
    send(&args.control, &Request::Drain { listener: args.listener.clone(), deadline_ms })?;
    if !args.wait {
        return Ok(());
    }
    loop {
        let Answer::Status(status) = client::send(&args.control.at.socket, &Request::Status)? else {
            return Ok(());
        };
        let drained =
            |listener: &&ListenerStatus| args.listener.as_ref().is_none_or(|name| *name == listener.name);
        if status.listeners.iter().filter(drained).all(|listener| listener.active == 0) {
            return Ok(());
        }
        thread::sleep(DRAIN_POLL_INTERVAL);
    }
}

/// Accepts new clients again.
///
/// # Errors
/// When the daemon does not answer or rejects the command.
pub fn resume(args: ResumeArgs) -> anyhow::Result<()> {
    send(&args.control, &Request::Resume { listener: args.listener }).map(drop)
}

/// Disables or enables a backend, or changes its weight.
///
/// # Errors
/// When the daemon does not answer or rejects the command.
pub fn backend(command: BackendCommand) -> anyhow::Result<()> {
    let (args, action) = match command {
        BackendCommand::Up(args) => (args, BackendAction::Up),
        BackendCommand::Down(args) => (args, BackendAction::Down),
        BackendCommand::Auto(args) => (args, BackendAction::Auto),
        BackendCommand::Weight(BackendWeightArgs { of, weight }) => {
            let BackendArgs { control, listener, backend } = of;
            return send(&control, &Request::BackendWeight { weight, listener, backend }).map(drop);
        }
    };
    let BackendArgs { control, listener, backend } = args;
    send(&control, &Request::Backend { action, listener, backend }).map(drop)
}

/// Changes what is logged, until the next reload.
///
/// # Errors
/// When the daemon does not answer or rejects the command.
pub fn log_level(args: LogLevelArgs) -> anyhow::Result<()> {
    send(&args.control, &Request::LogLevel { levels: args.levels }).map(drop)
}

/// Reloads the configuration, once or whenever the file changes; or shows what a reload would do.
///
/// # Errors
/// When the daemon does not answer, or rejects or would reject the configuration.
pub fn reload(args: &ReloadArgs) -> anyhow::Result<()> {
    match &args.watch {
        Some(file) => Ok(control::watch(&args.control.at.socket, file)?),
        None if args.dry_run => {
            let answer = send(&args.control, &Request::DryRun)?;
            let rejected = matches!(&answer, Answer::DryRun(dry_run) if dry_run.is_rejected());
            ensure!(!rejected, "the reload would be rejected");
            Ok(())
        }
        None => send(&args.control, &Request::Reload).map(drop),
    }
}

/// Shows the daemon live on the terminal, or prints one page.
///
/// # Errors
/// When the daemon does not answer, or standard output is not a terminal.
pub fn top(args: &TopArgs) -> anyhow::Result<()> {
    if args.once {
        print!("{}", top::once(&args.at.socket, args.interval)?);
        return Ok(());
    }
    top::run(&args.at.socket, args.interval)
}

/// Sends a request, prints the answer and returns it.
pub(super) fn send(args: &ControlArgs, request: &Request) -> anyhow::Result<Answer> {
    let answer = client::send(&args.at.socket, request)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&answer)?);
    } else {
        print!("{}", client::show(&answer));
    }
    Ok(answer)
}
