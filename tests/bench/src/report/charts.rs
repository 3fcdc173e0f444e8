//! One chart for each workload, as SVG: a bar for every system's median, with a line from the
//! smallest to the largest value.

use anyhow::{Context as _, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::digits;
use super::summary::{Section, sections};
use crate::record::Record;
use crate::stats::Spread;
use crate::systems::{DIRECT, HAPROXY, NAT};

/// A chart, and the workload it shows.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Name of the workload.
    pub workload: String,
    /// The SVG.
    pub svg: String,
}

/// All workloads whose first figure was measured.
///
/// # Errors
/// When a chart cannot be drawn.
pub fn all(record: &Record) -> anyhow::Result<Vec<Chart>> {
    let mut charts = Vec::new();
    for section in sections(record) {
        let bars = bars(&section);
        if !bars.is_empty() {
            let svg = draw(&section, &bars).with_context(|| format!("cannot draw {}", section.workload))?;
            charts.push(Chart { workload: section.workload, svg });
        }
    }
    Ok(charts)
}

/// The bar of one system.
struct Bar {
    system: String,
    value: Spread,
}

fn bars(section: &Section) -> Vec<Bar> {
    let bar = |row: &super::summary::Row| {
        let value = row.cells.first().copied().flatten()?.value;
        Some(Bar { system: row.system.clone(), value })
    };
    section.rows.iter().filter_map(bar).collect()
}

/// Layout in pixels: the height depends on the number of bars.
const WIDTH: u32 = 860;
const LEFT: i32 = 190;
const RIGHT: i32 = 760;
const TOP: i32 = 52;
const ROW: i32 = 24;
const THICKNESS: i32 = 16;

/// White background, so that the chart is readable on a dark page too.
fn draw(section: &Section, bars: &[Bar]) -> anyhow::Result<String> {
    let max = bars.iter().map(|bar| bar.value.max).fold(0.0, f64::max);
    let figure = section.figures.first().context("nothing measured")?;
    let better = if figure.more_is_better { "more is better" } else { "less is better" };
    let rows = i32::try_from(bars.len())?;
    let height = u32::try_from(TOP + rows * ROW + 12)?;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        let paint = |error: DrawingAreaErrorKind<_>| anyhow!("{error}");
        area.fill(&WHITE).map_err(paint)?;
        let title = text(15, &BLACK, HPos::Left);
        area.draw(&Text::new(section.workload.clone(), (12, 18), title)).map_err(paint)?;
        let unit = format!("{}; {better}; median, line from minimum to maximum", figure.unit);
        area.draw(&Text::new(unit, (12, 36), text(12, &GREY, HPos::Left))).map_err(paint)?;
        for (row, bar) in (0..).zip(bars) {
            let middle = TOP + row * ROW + ROW / 2;
            let [min, median, largest] =
                [bar.value.min, bar.value.median, bar.value.max].map(|value| position(value, max));
            let name = Text::new(bar.system.clone(), (LEFT - 8, middle), text(12, &BLACK, HPos::Right));
            area.draw(&name).map_err(paint)?;
            let (above, below) = (middle - THICKNESS / 2, middle + THICKNESS / 2);
            let block = Rectangle::new([(LEFT, above), (median, below)], colour(&bar.system).filled());
            area.draw(&block).map_err(paint)?;
            let whisker = PathElement::new(vec![(min, middle), (largest, middle)], BLACK.stroke_width(1));
            area.draw(&whisker).map_err(paint)?;
            let value =
                Text::new(digits(bar.value.median), (largest + 8, middle), text(12, &BLACK, HPos::Left));
            area.draw(&value).map_err(paint)?;
        }
        area.present().map_err(paint)?;
    }
    Ok(svg)
}

const GREY: RGBColor = RGBColor(90, 90, 90);

fn text(size: i32, colour: &RGBColor, side: HPos) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(colour).pos(Pos::new(side, VPos::Center))
}

/// The position of a value on the axis, which begins at 0.
fn position(value: f64, max: f64) -> i32 {
    let share = if max > 0.0 { (value / max).clamp(0.0, 1.0) } else { 0.0 };
    #[expect(clippy::cast_possible_truncation, reason = "pixels of a picture")]
    let pixels = (share * f64::from(RIGHT - LEFT)).round() as i32;
    LEFT + pixels
}

/// The references are grey, others blue, the injector's engines green.
fn colour(system: &str) -> RGBColor {
    match system {
        DIRECT | NAT => RGBColor(170, 170, 170),
        other if other.starts_with(HAPROXY) || other == "nginx" => RGBColor(120, 160, 210),
        _ => RGBColor(70, 150, 90),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Figure, Measurement, SystemInfo, WorkloadInfo};

    #[test]
    fn a_chart_has_a_bar_for_each_measured_system() {
        let figure = Figure {
            key: "rate".into(),
            unit: "x < y".into(),
            more_is_better: true,
            above_direct: false,
            change: false,
        };
        let workload = WorkloadInfo { name: "bulk".into(), about: String::new(), figures: vec![figure] };
        let system = |name: &str| SystemInfo { name: name.into(), ..SystemInfo::default() };
        let measurement = |system: &str, rate: f64| Measurement {
            workload: "bulk".into(),
            system: system.into(),
            figures: [("rate".into(), rate)].into(),
            ..Measurement::default()
        };
        let mut record = Record {
            workloads: vec![workload],
            systems: ["nat", "splice", "relay"].map(system).into(),
            measurements: vec![measurement("nat", 2.0), measurement("splice", 1.0)],
            ..Record::default()
        };
        let charts = all(&record).unwrap();
        let svg = &charts[0].svg;
        assert!(svg.starts_with("<svg") && svg.contains("splice") && !svg.contains("relay"), "{svg}");
        assert!(svg.contains("x &lt; y"), "{svg}");
        record.measurements.clear();
        assert!(all(&record).unwrap().is_empty());
    }

    #[test]
    fn the_axis_begins_at_zero() {
        assert_eq!(position(0.0, 5.0), LEFT);
        assert_eq!(position(5.0, 5.0), RIGHT);
        assert_eq!(position(2.5, 5.0), i32::midpoint(LEFT, RIGHT));
        assert_eq!(position(1.0, 0.0), LEFT);
    }
}
