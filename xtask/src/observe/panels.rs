//! The panels of the dashboard, read from `panels.toml`, and their places on the page.

use anyhow::{Context as _, Result};
use serde::Deserialize;

/// Columns of Grafana's grid.
const COLUMNS: u32 = 24;

/// How a panel shows its series.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    /// Lines over time.
    Lines,
    /// Areas over time, one on another.
    Stacked,
    /// The last value of each series.
    Stat,
    /// One row for each series.
    Table,
    /// Buckets over time.
    Heatmap,
}

/// One query of a panel.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Query {
    /// PromQL. `@host` and `@listener` stand for the matchers of the dashboard's variables.
    pub(super) expr: String,
    /// The name of a series, with its labels in double braces.
    pub(super) legend: String,
}

/// One panel.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Panel {
    pub(super) title: String,
    /// What to read from it.
    #[serde(default)]
    pub(super) description: String,
    pub(super) kind: Kind,
    /// Grafana's name of the unit.
    pub(super) unit: String,
    width: u32,
    height: Option<u32>,
    #[serde(rename = "query")]
    pub(super) queries: Vec<Query>,
    /// Why it may show nothing on a healthy system.
    pub(super) empty_when: Option<String>,
    /// Shows the names of series instead of their values.
    #[serde(default)]
    pub(super) show_name: bool,
}

impl Panel {
    fn height(&self) -> u32 {
        self.height.unwrap_or(if self.kind == Kind::Stat { 4 } else { 8 })
    }
}

/// Panels under one heading.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    title: String,
    #[serde(rename = "panel")]
    panels: Vec<Panel>,
}

/// All panels, from top to bottom.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Page {
    #[serde(rename = "row")]
    rows: Vec<Row>,
}

/// A heading or panel with its place on the page, in Grafana's units.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed<'a> {
    pub(super) x: u32,
    pub(super) y: u32,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) what: Item<'a>,
}

/// A heading or a panel.
#[derive(Clone, Copy, Debug)]
pub(super) enum Item<'a> {
    Heading(&'a str),
    Panel(&'a Panel),
}

impl Page {
    /// Reads `panels.toml`.
    pub(super) fn read() -> Result<Self> {
        toml::from_str(include_str!("panels.toml")).context("panels.toml")
    }

    /// All panels, in order.
    pub(super) fn panels(&self) -> impl Iterator<Item = &Panel> {
        self.rows.iter().flat_map(|row| &row.panels)
    }

    /// Headings and panels with their places, row by row, each filled from the left.
    pub(super) fn placed(&self) -> Vec<Placed<'_>> {
        let mut placed = Vec::new();
        let mut y = 0;
        for row in &self.rows {
            placed.push(Placed { x: 0, y, width: COLUMNS, height: 1, what: Item::Heading(&row.title) });
            y += 1;
            let (mut x, mut height) = (0, 0);
            for panel in &row.panels {
                if x + panel.width > COLUMNS {
                    (x, y, height) = (0, y + height, 0);
                }
                let what = Item::Panel(panel);
                placed.push(Placed { x, y, width: panel.width, height: panel.height(), what });
                x += panel.width;
                height = height.max(panel.height());
            }
            y += height;
        }
        placed
    }
}
