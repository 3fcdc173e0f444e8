//! `injector top`: the state of a running daemon, live on the terminal.
//!
//! The screen is a pure function of two samples of the daemon (`View`).

mod input;
mod model;
mod render;
mod sample;

use std::{
    io::{self, IsTerminal as _},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use ratatui::crossterm::event;

use self::{
    input::Action,
    model::View,
    render::{PAGE_SIZE, page},
    sample::sample,
};

/// Shows the daemon until `q` is pressed, with a new sample at each `interval`.
///
/// # Errors
/// When standard output is not a terminal, or no daemon answers the first request. Later failures
/// are shown and retried.
pub fn run(socket: &Path, interval: Duration) -> anyhow::Result<()> {
    if !io::stdout().is_terminal() {
        bail!("standard output is not a terminal: use --once, or `injector status`");
    }
    let mut view = View::new(sample(socket)?);
    let mut terminal = ratatui::try_init().context("the terminal")?;
    let result = event_loop(&mut terminal, &mut view, socket, interval);
    ratatui::restore();
    result
}

fn event_loop(
    terminal: &mut ratatui::DefaultTerminal,
    view: &mut View,
    socket: &Path,
    interval: Duration,
) -> anyhow::Result<()> {
    let mut next = Instant::now() + interval;
    loop {
        terminal.draw(|frame| view.draw(frame))?;
        if event::poll(next.saturating_duration_since(Instant::now()))? {
            match input::action(&event::read()?) {
                Some(Action::Quit) => return Ok(()),
                Some(Action::Select(step)) => view.select(step),
                None => {}
            }
            continue;
        }
        next = Instant::now() + interval;
        match sample(socket) {
            Ok(sample) => view.update(sample),
            Err(error) => view.error = Some(format!("{error:#}")),
        }
    }
}

/// One page as text, with rates over `interval`.
///
/// # Errors
/// When no daemon answers.
pub fn once(socket: &Path, interval: Duration) -> anyhow::Result<String> {
    let mut view = View::new(sample(socket)?);
    std::thread::sleep(interval);
    view.update(sample(socket)?);
    page(&view, PAGE_SIZE)
}
