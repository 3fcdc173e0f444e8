//! `injector top`: how everything stands, second by second, on a terminal.
//!
//! What is drawn is a function of two answers of the daemon ([`View`]); the rest asks for them, and hears the keys.

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

/// Shows it until `q` is pressed, looking every `every`.
///
/// # Errors
/// When there is no terminal, or no daemon answers at first. One that goes away later is waited for.
pub fn run(socket: &Path, every: Duration) -> anyhow::Result<()> {
    if !io::stdout().is_terminal() {
        bail!("standard output is not a terminal: use --once, or `injector status`");
    }
    let mut view = View::new(sample(socket)?);
    let mut terminal = ratatui::try_init().context("the terminal")?;
    let result = follow(&mut terminal, &mut view, socket, every);
    ratatui::restore();
    result
}

fn follow(
    terminal: &mut ratatui::DefaultTerminal,
    view: &mut View,
    socket: &Path,
    every: Duration,
) -> anyhow::Result<()> {
    let mut next = Instant::now() + every;
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
        next = Instant::now() + every;
        match sample(socket) {
            Ok(sample) => view.update(sample),
            Err(error) => view.error = Some(format!("{error:#}")),
        }
    }
}

/// One page as text, with rates over `every`.
///
/// # Errors
/// When no daemon answers.
pub fn once(socket: &Path, every: Duration) -> anyhow::Result<String> {
    let mut view = View::new(sample(socket)?);
    std::thread::sleep(every);
    view.update(sample(socket)?);
    page(&view, PAGE_SIZE)
}
