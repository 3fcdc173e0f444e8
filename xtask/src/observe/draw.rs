//! Draws the dashboard as one SVG: every panel at its place in Grafana, with Prometheus' series.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow};
use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{
    answer::{PanelResult, Shown},
    panels::{Item, Kind, Page, Panel, Placed},
    prometheus::Series,
};

/// Pixels: one column of Grafana's grid, and one of its rows.
const COLUMN: u32 = 58;
const ROW: u32 = 30;

/// How many series of a panel are drawn; the rest is counted.
const MAX_SERIES: usize = 8;

/// The height of a legend's line, in pixels.
const LEGEND_LINE: i32 = 13;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The whole page.
pub(super) fn draw(page: &Page, answers: &[PanelResult<'_>]) -> Result<String> {
    let placed = page.placed();
    let rows = placed.iter().map(|item| item.y + item.height).max().unwrap_or_default();
    let mut svg = String::new();
    {
        let canvas = SVGBackend::with_string(&mut svg, (24 * COLUMN, rows * ROW)).into_drawing_area();
        canvas.fill(&WHITE).map_err(unpaintable)?;
        for item in &placed {
            let area = canvas
                .clone()
                .shrink((item.x * COLUMN, item.y * ROW), (item.width * COLUMN, item.height * ROW));
            match item.what {
                Item::Heading(title) => heading(&area, title)?,
                Item::Panel(panel) => {
                    let answer = answers.iter().find(|answer| answer.panel.title == panel.title);
                    let answer =
                        answer.ok_or_else(|| anyhow!("panel {:?} was not evaluated", panel.title))?;
                    draw_panel(&area, item, panel, &answer.shown())?;
                }
            }
        }
        canvas.present().map_err(unpaintable)?;
    }
    Ok(svg)
}

fn unpaintable(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("{error}")
}

const GREY: RGBColor = RGBColor(100, 100, 100);
const PALE: RGBColor = RGBColor(225, 225, 225);

/// Colours that are easy to distinguish.
const COLOURS: [RGBColor; MAX_SERIES] = [
    RGBColor(31, 119, 180),
    RGBColor(255, 127, 14),
    RGBColor(44, 160, 44),
    RGBColor(214, 39, 40),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
    RGBColor(227, 119, 194),
    RGBColor(23, 160, 175),
];

fn text(size: i32, colour: &RGBColor, side: HPos) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(colour).pos(Pos::new(side, VPos::Center))
}

fn write(area: &Area<'_>, words: &str, at: (i32, i32), style: TextStyle<'static>) -> Result<()> {
    area.draw(&Text::new(words.to_owned(), at, style)).map_err(unpaintable)
}

fn heading(area: &Area<'_>, title: &str) -> Result<()> {
    write(area, title, (8, 16), text(16, &BLACK, HPos::Left))
}

fn draw_panel(area: &Area<'_>, item: &Placed<'_>, panel: &Panel, shown: &Shown<'_>) -> Result<()> {
    let (width, height) = (signed(item.width * COLUMN)?, signed(item.height * ROW)?);
    let frame = Rectangle::new([(3, 3), (width - 3, height - 3)], PALE.stroke_width(1));
    area.draw(&frame).map_err(unpaintable)?;
    write(area, &panel.title, (10, 15), text(12, &BLACK, HPos::Left))?;
    // The largest first, because the legend has room for few series.
    let mut series: Vec<_> = shown.series.iter().collect();
    series.sort_by(|left, right| greatest(right.1).total_cmp(&greatest(left.1)));
    if series.is_empty() {
        let reason = shown.reason.as_deref().unwrap_or("nothing");
        return write(area, reason, (width / 2, height / 2), text(11, &GREY, HPos::Center));
    }
    match panel.kind {
        Kind::Stat | Kind::Table => list(area, panel, &series, height),
        Kind::Heatmap => heatmap(area, &series, (width, height)),
        Kind::Lines | Kind::Stacked => chart(area, panel, &series, (width, height)),
    }
}

fn signed(pixels: u32) -> Result<i32> {
    Ok(i32::try_from(pixels)?)
}

fn greatest(series: &Series) -> f64 {
    series.points.iter().map(|(_, value)| value.abs()).filter(|value| value.is_finite()).fold(0.0, f64::max)
}

/// Names and last values, one in a line.
fn list(area: &Area<'_>, panel: &Panel, series: &[&(String, &Series)], height: i32) -> Result<()> {
    const LINE: i32 = 16;
    let room = usize::try_from((height - 30) / LINE)?.max(1);
    for (row, (name, series)) in (0..).zip(series.iter().take(room).copied()) {
        let value = series.last().map_or("no number".to_owned(), |last| number(last, &panel.unit));
        let words = if panel.show_name { name.clone() } else { format!("{value}   {name}") };
        write(area, &words, (10, 36 + row * LINE), text(12, &COLOURS[0], HPos::Left))?;
    }
    if series.len() > room {
        let words = format!("and {} more", series.len() - room);
        write(area, &words, (10, height - 8), text(10, &GREY, HPos::Left))?;
    }
    Ok(())
}

fn times(series: &[&(String, &Series)]) -> (f64, f64) {
    let all = series.iter().flat_map(|(_, series)| series.points.iter().map(|(time, _)| *time));
    all.fold((f64::MAX, f64::MIN), |(least, most), time| (least.min(time), most.max(time)))
}

fn chart(
    area: &Area<'_>,
    panel: &Panel,
    series: &[&(String, &Series)],
    (width, height): (i32, i32),
) -> Result<()> {
    let drawn: Vec<_> = series.iter().take(MAX_SERIES).copied().collect();
    let legend = LEGEND_LINE * i32::try_from(drawn.len().div_ceil(2))? + 6;
    let (from, to) = times(series);
    let lines = if panel.kind == Kind::Stacked { stacked(&drawn) } else { plain(&drawn) };
    let most = lines.iter().flatten().map(|(_, value)| *value).fold(0.0, f64::max);
    let most = if most > 0.0 { most * 1.05 } else { 1.0 };
    let inner =
        area.clone().shrink((6, 24), (u32::try_from(width - 14)?, u32::try_from(height - 30 - legend)?));
    let mut chart = ChartBuilder::on(&inner)
        .x_label_area_size(16)
        .y_label_area_size(58)
        .build_cartesian_2d(0.0..(to - from).max(1.0), 0.0..most)
        .map_err(unpaintable)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .bold_line_style(PALE)
        .axis_style(GREY)
        .x_labels(5)
        .y_labels(4)
        .x_label_formatter(&|seconds| format!("{seconds:.0} s"))
        .y_label_formatter(&|value| number(*value, &panel.unit))
        .label_style(("sans-serif", 10).into_font().color(&GREY))
        .draw()
        .map_err(unpaintable)?;
    for (line, colour) in lines.into_iter().zip(COLOURS) {
        let line: Vec<_> = line.into_iter().map(|(time, value)| (time - from, value)).collect();
        let line = PathElement::new(line, colour.stroke_width(1));
        chart.draw_series(std::iter::once(line)).map_err(unpaintable)?;
    }
    for (index, ((name, series), colour)) in (0..).zip(drawn.iter().copied().zip(COLOURS)) {
        let (x, y) = (12 + (index % 2) * (width - 20) / 2, height - legend + (index / 2) * LEGEND_LINE + 4);
        let mark = Rectangle::new([(x, y - 2), (x + 8, y + 2)], colour.filled());
        area.draw(&mark).map_err(unpaintable)?;
        let last = series.last().map_or("–".to_owned(), |last| number(last, &panel.unit));
        write(area, &format!("{name}  {last}"), (x + 12, y), text(10, &GREY, HPos::Left))?;
    }
    if series.len() > drawn.len() {
        let words = format!("and {} more", series.len() - drawn.len());
        write(area, &words, (width - 10, 15), text(10, &GREY, HPos::Right))?;
    }
    Ok(())
}

type Line = Vec<(f64, f64)>;

fn plain(series: &[&(String, &Series)]) -> Vec<Line> {
    let finite =
        |series: &Series| series.points.iter().copied().filter(|(_, value)| value.is_finite()).collect();
    series.iter().map(|(_, series)| finite(series)).collect()
}

/// Adds to each line the sum of those before it. Points of one query have the same times.
fn stacked(series: &[&(String, &Series)]) -> Vec<Line> {
    let mut below: BTreeMap<u64, f64> = BTreeMap::new();
    plain(series)
        .into_iter()
        .map(|line| {
            let raise = |(time, value): (f64, f64)| {
                let sum = below.entry(time.to_bits()).or_default();
                *sum += value;
                (time, *sum)
            };
            line.into_iter().map(raise).collect()
        })
        .collect()
}

/// Time by bucket; darker means more observations. A bucket of Prometheus includes those below it.
fn heatmap(area: &Area<'_>, series: &[&(String, &Series)], (width, height): (i32, i32)) -> Result<()> {
    let mut buckets: Vec<_> = series
        .iter()
        .filter_map(|(_, series)| Some((series.labels.get("le")?.parse::<f64>().ok()?, &series.points)))
        .collect();
    buckets.sort_by(|left, right| left.0.total_cmp(&right.0));
    let (from, to) = times(series);
    let mut cells = Vec::new();
    let mut below: BTreeMap<u64, f64> = BTreeMap::new();
    for (row, (_, points)) in (0..).zip(&buckets) {
        for (time, value) in points.iter().filter(|(_, value)| value.is_finite()) {
            let own = value - below.insert(time.to_bits(), *value).unwrap_or_default();
            cells.push((row, time - from, own.max(0.0)));
        }
    }
    let most = cells.iter().map(|(.., count)| *count).fold(0.0, f64::max);
    let (left, top, right, bottom) = (60, 26, width - 10, height - 20);
    let rows = i32::try_from(buckets.len())?.max(1);
    let across = f64::from(right - left) / (to - from + 2.0).max(1.0);
    let y = |row: i32| bottom - (bottom - top) * row / rows;
    for (row, time, count) in cells.into_iter().filter(|(.., count)| *count > 0.0) {
        let (start, end) = (left + pixels(time * across), left + pixels((time + 2.0) * across));
        let shade = RGBColor(31, 119, 180).mix(0.15 + 0.85 * count / most);
        area.draw(&Rectangle::new([(start, y(row + 1)), (end, y(row))], shade.filled()))
            .map_err(unpaintable)?;
    }
    for (row, (bound, _)) in (0..).zip(&buckets).step_by(3) {
        let words = if bound.is_finite() { number(*bound, "s") } else { "more".to_owned() };
        write(area, &words, (left - 6, y(row) - 4), text(10, &GREY, HPos::Right))?;
    }
    write(area, &format!("0 to {:.0} s", to - from), (left, height - 10), text(10, &GREY, HPos::Left))
}

fn pixels(length: f64) -> i32 {
    #[expect(clippy::cast_possible_truncation, reason = "pixels of a picture")]
    let whole = length.round() as i32;
    whole
}

/// A value in a panel's unit, short.
pub(super) fn number(value: f64, unit: &str) -> String {
    match unit {
        "bool_yes_no" => (if value == 0.0 { "no" } else { "yes" }).to_owned(),
        "percentunit" if value != 0.0 && value.abs() < 0.01 => format!("{:.2} %", value * 100.0),
        "percentunit" => format!("{:.1} %", value * 100.0),
        "s" if value != 0.0 && value.abs() < 1.0 => format!("{:.3} ms", value * 1000.0),
        "s" if value.abs() >= 600.0 => format!("{:.0} min", value / 60.0),
        "s" => format!("{value:.2} s"),
        "bytes" | "Bps" => {
            let rate = if unit == "Bps" { "/s" } else { "" };
            let (scaled, prefix) = scaled(value, 1024.0, &["", "Ki", "Mi", "Gi", "Ti"]);
            format!("{scaled:.1} {prefix}B{rate}")
        }
        "cps" | "ops" => {
            let (scaled, prefix) = scaled(value, 1000.0, &["", "k", "M", "G"]);
            format!("{scaled:.2}{prefix}/s")
        }
        _ if value.fract() == 0.0 => format!("{value:.0}"),
        _ => format!("{value:.2}"),
    }
}

fn scaled(mut value: f64, by: f64, prefixes: &[&'static str]) -> (f64, &'static str) {
    let mut prefixes = prefixes.iter().copied();
    let mut prefix = prefixes.next().unwrap_or_default();
    while value.abs() >= by {
        let Some(next) = prefixes.next() else { break };
        (value, prefix) = (value / by, next);
    }
    (value, prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_have_their_unit() {
        for (value, unit, text) in [
            (1.0, "bool_yes_no", "yes"),
            (0.123, "percentunit", "12.3 %"),
            (0.00042, "s", "0.420 ms"),
            (0.0, "s", "0.00 s"),
            (7200.0, "s", "120 min"),
            (3_145_728.0, "Bps", "3.0 MiB/s"),
            (12_500.0, "cps", "12.50k/s"),
            (7.0, "none", "7"),
        ] {
            assert_eq!(number(value, unit), text);
        }
    }

    #[test]
    fn stacked_lines_stand_on_each_other() {
        let series = |values: [f64; 2]| Series {
            labels: BTreeMap::new(),
            points: vec![(1.0, values[0]), (2.0, values[1])],
        };
        let (first, second) = (series([1.0, 2.0]), series([10.0, f64::NAN]));
        let lines = stacked(&[&("a".to_owned(), &first), &("b".to_owned(), &second)]);
        assert_eq!(lines, [vec![(1.0, 1.0), (2.0, 2.0)], vec![(1.0, 11.0)]]);
    }
}
