//! Draws the model on a terminal, or as a page of text.

use std::collections::HashMap;

use ratatui::{
    Frame, Terminal,
    backend::TestBackend,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style, Stylize as _},
    text::{Line, Span},
    widgets::{Block, Borders, Cell, Paragraph, Row, Sparkline, Table},
};

use super::model::{Rates, View, whole};
use crate::control::{
    guard::bans_part,
    show::{inline_part, role},
    text::{age, bytes},
    wire::{BackendStatus, ListenerStatus, SessionRow, Status},
};

/// Width and height of a page of text.
pub(super) const PAGE_SIZE: (u16, u16) = (132, 40);

impl View {
    /// Draws the view.
    pub(super) fn draw(&self, frame: &mut Frame<'_>) {
        let listeners = self.now.status.listeners.len();
        let backends: usize = self.now.status.listeners.iter().map(|listener| listener.backends.len()).sum();
        let rows = |count: usize| u16::try_from(count).unwrap_or(u16::MAX).saturating_add(3);
        let [head, graph, top, middle, rest] = Layout::vertical([
            Constraint::Length(3),
            Constraint::Length(4),
            Constraint::Length(rows(listeners)),
            Constraint::Length(rows(backends)),
            Constraint::Min(3),
        ])
        .areas(frame.area());
        frame.render_widget(self.head(), head);
        self.draw_graph(frame, graph);
        frame.render_widget(self.listeners(top), top);
        frame.render_widget(self.backends(middle), middle);
        frame.render_widget(self.sessions(rest), rest);
    }

    fn head(&self) -> Paragraph<'_> {
        let Status {
            version,
            pid,
            uptime_ms,
            readiness,
            connections,
            inline_connections,
            max_connections,
            backlog_bytes,
            config,
            guard,
            services,
            ..
        } = &self.now.status;
        let color = if readiness == "ready" { Color::Green } else { Color::Yellow };
        let first = Line::from(vec![
            "injector ".bold(),
            Span::raw(format!("{version}  process {pid}  up {}  ", age(*uptime_ms))),
            Span::styled(readiness.clone(), Style::new().fg(color).bold()),
        ]);
        let second = Line::raw(format!(
            "{connections} of {max_connections} connections{}, {} queued in the kernel{}   configuration {}",
            inline_part(*inline_connections),
            bytes(*backlog_bytes),
            guard.as_ref().map(bans_part).unwrap_or_default(),
            config.file.display()
        ));
        let failing = services.iter().find_map(|it| Some((&it.service, it.error.as_ref()?)));
        let third = match (&self.error, &config.reload_error, failing) {
            (Some(error), ..) => Line::from(error.clone().red()),
            (None, Some(reason), _) => Line::from(format!("last reload failed: {reason}").yellow()),
            (None, None, Some((service, error))) => {
                Line::from(format!("service {service}: {error}").yellow())
            }
            (None, None, None) => Line::from("q quits, ↑ ↓ choose whose sessions are listed".dark_gray()),
        };
        Paragraph::new(vec![first, second, third])
    }

    fn draw_graph(&self, frame: &mut Frame<'_>, area: Rect) {
        let now = self.history.last().copied().unwrap_or_default();
        let max = self.history.iter().copied().max().unwrap_or_default();
        let title = format!("new connections: {now}/s, at most {max}/s");
        let width = usize::from(area.width);
        let shown = self.history.get(self.history.len().saturating_sub(width)..).unwrap_or_default();
        let graph = Sparkline::default().block(Block::new().borders(Borders::TOP).title(title)).data(shown);
        frame.render_widget(graph.style(Style::new().fg(Color::Cyan)), area);
    }

    fn listeners(&self, area: Rect) -> Table<'_> {
        let row = |(index, listener): (usize, &ListenerStatus)| {
            let rates = self.rates(listener);
            let rate = |of: fn(&Rates) -> f64| {
                rates.as_ref().map_or("-".to_owned(), |rates| format!("{:.0}/s", of(rates)))
            };
            let flow = |of: fn(&Rates) -> f64| {
                rates.as_ref().map_or("-".to_owned(), |rates| format!("{}/s", bytes(whole(of(rates)))))
            };
            let state = match (listener.draining, listener.abort_in_ms) {
                (true, Some(left @ 1..)) => format!("draining, {}", age(left)).yellow(),
                (true, _) => "draining".yellow(),
                (false, _) => "open".green(),
            };
            let cells = vec![
                Cell::from(listener.name.clone()),
                Cell::from(listener.engine.clone()),
                Cell::from(state),
                right(listener.active.to_string()),
                right(listener.active_inline.to_string()),
                right(rate(|rates| rates.accepted)),
                right(rate(|rates| rates.rejected)),
                right(flow(|rates| rates.to_backend)),
                right(flow(|rates| rates.to_client)),
                right(listener.accepted.to_string()),
                right(listener.rejected.to_string()),
            ];
            let selected = self.selected == Some(index);
            (cells, if selected { Style::new().add_modifier(Modifier::REVERSED) } else { Style::new() })
        };
        const COLUMNS: [Column; 11] = [
            Column::text("LISTENER", 8, 16),
            Column::text("ENGINE", 6, 13),
            Column::text("STATE", 8, 18),
            Column::number("ACTIVE", 8),
            Column::number("INLINE", 7).optional(),
            Column::number("NEW/S", 9),
            Column::number("REJ/S", 9),
            Column::number("TO BACKEND", 12),
            Column::number("TO CLIENT", 12),
            Column::number("ACCEPTED", 11).optional(),
            Column::number("REJECTED", 9).optional(),
        ];
        table(self.now.status.listeners.iter().enumerate().map(row), &COLUMNS, area, "listeners")
    }

    fn backends(&self, area: Rect) -> Table<'_> {
        let of = |listener: &'_ ListenerStatus| {
            let name = listener.name.clone();
            listener.backends.clone().into_iter().map(move |backend| (name.clone(), backend))
        };
        let row = |(listener, backend): (String, BackendStatus)| {
            let color = if backend.state.is_up() { Color::Green } else { Color::Red };
            let role = role(&backend);
            let cells = vec![
                Cell::from(listener),
                Cell::from(backend.name),
                Cell::from(Span::styled(backend.state.name(), Style::new().fg(color))),
                Cell::from(role),
                right(backend.active.to_string()),
                right(backend.sessions.to_string()),
                right(backend.checks_passed.to_string()),
                right(backend.checks_failed.to_string()),
                right(backend.ejections.to_string()),
            ];
            (cells, Style::new())
        };
        const COLUMNS: [Column; 9] = [
            Column::text("LISTENER", 6, 16),
            Column::text("BACKEND", 21, 30),
            Column::text("STATE", 7, 12),
            Column::text("ROLE", 8, 20),
            Column::number("ACTIVE", 8),
            Column::number("SESSIONS", 11),
            Column::number("PASSED", 9).optional(),
            Column::number("FAILED", 9).optional(),
            Column::number("EJECTED", 9),
        ];
        table(self.now.status.listeners.iter().flat_map(of).map(row), &COLUMNS, area, "backends")
    }

    fn sessions(&self, area: Rect) -> Table<'_> {
        let selected = self.selected.and_then(|index| self.now.status.listeners.get(index));
        let before: HashMap<_, _> = self
            .before
            .iter()
            .flat_map(|before| &before.sessions.rows)
            .map(|row| ((row.client, row.local), row.bytes_to_backend + row.bytes_to_client))
            .collect();
        let chosen = |row: &&SessionRow| selected.is_none_or(|listener| row.listener == listener.name);
        let rows: Vec<_> = self.now.sessions.rows.iter().filter(chosen).collect();
        let title = match selected {
            Some(listener) => {
                format!("sessions of {}, the oldest first: {} listed", listener.name, rows.len())
            }
            None => format!("sessions, the oldest first: {} of {}", rows.len(), self.now.sessions.count),
        };
        let shown = usize::from(area.height.saturating_sub(2));
        let row = |row: &SessionRow| {
            let total = row.bytes_to_backend + row.bytes_to_client;
            let moved = before.get(&(row.client, row.local)).is_some_and(|before| *before != total);
            let cells = vec![
                Cell::from(row.listener.clone()),
                Cell::from(row.client.to_string()),
                Cell::from(row.local.to_string()),
                Cell::from(row.backend.map_or("connecting".to_owned(), |backend| backend.to_string())),
                right(age(row.age_ms)),
                right(bytes(row.bytes_to_backend)),
                right(bytes(row.bytes_to_client)),
            ];
            (cells, if moved { Style::new().bold() } else { Style::new() })
        };
        const COLUMNS: [Column; 7] = [
            Column::text("LISTENER", 6, 16),
            Column::text("CLIENT", 21, 30),
            Column::text("TO", 21, 26).optional(),
            Column::text("BACKEND", 17, 26),
            Column::number("AGE", 9),
            Column::number("TO BACKEND", 11),
            Column::number("TO CLIENT", 11),
        ];
        table(rows.into_iter().take(shown).map(row), &COLUMNS, area, &title)
    }
}

fn right<'a>(text: String) -> Cell<'a> {
    Cell::from(Line::raw(text).right_aligned())
}

/// A column of a table.
#[derive(Clone, Copy)]
struct Column {
    title: &'static str,
    /// Text is cut down to this width on a narrow terminal; a number never is.
    min: u16,
    width: u16,
    number: bool,
    /// Left out on a terminal that is too narrow for all columns.
    optional: bool,
}

impl Column {
    const fn text(title: &'static str, min: u16, width: u16) -> Self {
        Self { title, min, width, number: false, optional: false }
    }

    const fn number(title: &'static str, width: u16) -> Self {
        Self { title, min: width, width, number: true, optional: false }
    }

    const fn optional(self) -> Self {
        Self { optional: true, ..self }
    }

    fn header<'a>(self) -> Cell<'a> {
        if self.number { right(self.title.to_owned()) } else { Cell::from(self.title) }
    }
}

/// The width of each column; 0 hides it. Optional columns are hidden, the last first, until the others
/// have their least width. What is left is given out from left to right.
fn widths(columns: &[Column], available: u16) -> Vec<u16> {
    let mut widths: Vec<u16> = columns.iter().map(|column| column.min).collect();
    // One between each two columns.
    let used = |widths: &[u16]| {
        widths.iter().filter(|width| **width > 0).map(|width| width + 1).sum::<u16>().saturating_sub(1)
    };
    for (index, _) in columns.iter().enumerate().rev().filter(|(_, column)| column.optional) {
        if used(&widths) > available
            && let Some(width) = widths.get_mut(index)
        {
            *width = 0;
        }
    }
    let mut left = available.saturating_sub(used(&widths));
    for (column, width) in columns.iter().zip(&mut widths).filter(|(_, width)| **width > 0) {
        let more = left.min(column.width - column.min);
        *width += more;
        left -= more;
    }
    widths
}

fn table<'a>(
    rows: impl IntoIterator<Item = (Vec<Cell<'a>>, Style)>,
    columns: &[Column],
    area: Rect,
    title: &str,
) -> Table<'a> {
    let widths = widths(columns, area.width);
    let shown = |cells: Vec<Cell<'a>>| {
        cells
            .into_iter()
            .zip(&widths)
            .filter(|(_, width)| **width > 0)
            .map(|(cell, _)| cell)
            .collect::<Vec<_>>()
    };
    let header = shown(columns.iter().map(|column| column.header()).collect());
    let row = |(cells, style): (Vec<Cell<'a>>, Style)| Row::new(shown(cells)).style(style);
    let constraints = widths.iter().filter(|width| **width > 0).map(|width| Constraint::Length(*width));
    Table::new(rows.into_iter().map(row), constraints)
        .header(Row::new(header).style(Style::new().add_modifier(Modifier::BOLD)))
        .block(Block::new().borders(Borders::TOP).title(title.to_owned()))
        .column_spacing(1)
}

pub(super) fn page(view: &View, (width, height): (u16, u16)) -> anyhow::Result<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height))?;
    terminal.draw(|frame| view.draw(frame))?;
    let buffer = terminal.backend().buffer();
    let line = |y| -> String { (0..width).filter_map(|x| Some(buffer.cell((x, y))?.symbol())).collect() };
    let lines: Vec<String> = (0..height).map(line).collect();
    let last = lines.iter().rposition(|line| !line.trim().is_empty()).unwrap_or_default();
    Ok(lines.into_iter().take(last + 1).map(|line| line.trim_end().to_owned() + "\n").collect())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::control::{
        fixtures::{sessions, status},
        top::model::Sample,
    };

    /// Two samples, a second apart, with 30 connections between them.
    fn view() -> View {
        let at = Instant::now();
        let before = Sample { at, status: status(), sessions: sessions() };
        let mut after = Sample { at: at + Duration::from_secs(1), ..before.clone() };
        after.status.listeners[1].accepted += 30;
        after.status.listeners[1].bytes_to_client += 5 << 20;
        let mut view = View::new(before);
        view.update(after);
        view
    }

    #[test]
    fn wide_frame() {
        insta::assert_snapshot!(page(&view(), PAGE_SIZE).unwrap());
    }

    #[test]
    fn narrow_frame() {
        insta::assert_snapshot!(page(&view(), (80, 24)).unwrap());
    }

    #[test]
    fn frame_with_a_selected_listener_while_the_daemon_does_not_answer() {
        let mut view = view();
        view.select(2);
        view.error = Some("/run/injector/admin.sock: Connection refused".to_owned());
        insta::assert_snapshot!(page(&view, PAGE_SIZE).unwrap());
    }

    #[test]
    fn rates_are_differences_over_time() {
        let text = page(&view(), PAGE_SIZE).unwrap();
        assert!(text.contains("new connections: 30/s"), "{text}");
        let smtp = text.lines().find(|line| line.starts_with("smtp") && line.contains("open")).unwrap();
        for part in ["splice", "30/s", "5.0 MiB/s", "105"] {
            assert!(smtp.contains(part), "no {part} in {smtp}");
        }
        let imap = text.lines().find(|line| line.starts_with("imap") && line.contains("draining")).unwrap();
        assert!(imap.contains("1m 30s") && imap.contains("0/s"), "{imap}");
    }

    #[test]
    fn backends_and_sessions_are_listed() {
        let text = page(&view(), PAGE_SIZE).unwrap();
        for part in ["192.0.2.21:2525", "down", "backup", "198.51.100.7:40000", "1m 5s", "2.0 KiB"] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
    }

    #[test]
    fn selected_listener_filters_the_sessions() {
        let mut view = view();
        assert!(page(&view, PAGE_SIZE).unwrap().contains("2 of 2"));
        view.select(1);
        assert!(page(&view, PAGE_SIZE).unwrap().contains("sessions of imap, the oldest first: 1 listed"));
        view.select(-1);
        view.select(-1);
        assert!(page(&view, PAGE_SIZE).unwrap().contains("sessions of smtp"));
        view.select(1);
        assert!(page(&view, PAGE_SIZE).unwrap().contains("2 of 2"));
    }

    #[test]
    fn small_terminal_does_not_panic() {
        for size in [(1, 1), (20, 5), (80, 24)] {
            page(&view(), size).unwrap();
        }
    }

    #[test]
    fn first_sample_has_no_rates() {
        let first = Sample { at: Instant::now(), status: status(), sessions: sessions() };
        let text = page(&View::new(first), PAGE_SIZE).unwrap();
        assert!(text.lines().any(|line| line.starts_with("smtp") && line.contains(" - ")), "{text}");
    }
}
