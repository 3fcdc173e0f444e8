//! Keys of `injector top`.

use ratatui::crossterm::event::{Event, KeyCode, KeyEventKind, KeyModifiers};

/// What a key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Leave.
    Quit,
    /// Select another listener, so many rows down.
    Select(isize),
}

/// The action of a key press; `None` for every other event.
pub(super) fn action(event: &Event) -> Option<Action> {
    let Event::Key(key) = event else { return None };
    let interrupted = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        _ if key.kind != KeyEventKind::Press => None,
        _ if interrupted => Some(Action::Quit),
        KeyCode::Char('q') | KeyCode::Esc => Some(Action::Quit),
        KeyCode::Down | KeyCode::Char('j') => Some(Action::Select(1)),
        KeyCode::Up | KeyCode::Char('k') => Some(Action::Select(-1)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use ratatui::crossterm::event::KeyEvent;

    use super::*;

    #[test]
    fn keys_quit_and_select() {
        let press = |code, modifiers| action(&Event::Key(KeyEvent::new(code, modifiers)));
        let plain = KeyModifiers::NONE;
        assert_eq!(press(KeyCode::Char('q'), plain), Some(Action::Quit));
        assert_eq!(press(KeyCode::Char('c'), KeyModifiers::CONTROL), Some(Action::Quit));
        assert_eq!(press(KeyCode::Char('c'), plain), None);
        assert_eq!(press(KeyCode::Down, plain), Some(Action::Select(1)));
        assert_eq!(press(KeyCode::Up, plain), Some(Action::Select(-1)));
        assert_eq!(action(&Event::FocusGained), None);
    }
}
