//! `cargo xtask observe --live`: evaluates every expression of the dashboard with a real
//! Prometheus, prints and draws the results.

use std::{
    env, fs, thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    answer::{PanelResult, QueryResult},
    dashboard, draw,
    panels::{Kind, Page, Panel, Query},
    prometheus::{Api, Series},
    testbed::Testbed,
};
use crate::{build, cargo, reported::AlreadyReported};

/// The variable in which the testbed finds the daemon's path.
const BINARY_VARIABLE: &str = "INJECTOR_BIN";

/// How long there is traffic.
const TRAFFIC: Duration = Duration::from_secs(60);

/// The values that Grafana inserts for a scrape interval of 1 s and a page of one minute.
const RATE_INTERVAL: &str = "10s";
const RANGE: &str = "60s";

/// Seconds between two points of a panel.
const STEP: u32 = 2;

pub(super) fn run() -> Result<()> {
    let start = Instant::now();
    if env::var_os(BINARY_VARIABLE).is_none() {
        let daemon = build::image_daemon(false)?;
        // SAFETY: this is the only thread: those of setup and build have ended, and the testbed
        // starts its own below.
        unsafe { env::set_var(BINARY_VARIABLE, daemon) };
    }
    let began = Instant::now();
    let testbed = Testbed::new()?;
    println!(
        "live: injector, Postfix, Dovecot, CrowdSec, Prometheus, node_exporter and Pushgateway run; {TRAFFIC:?} of traffic"
    );
    let from = now()?;
    testbed.with_traffic(|| watch(&testbed))?;
    // Wait for the last scrape and the last evaluation of the rules.
    thread::sleep(Duration::from_secs(3));
    let to = now()?;
    let api = testbed.api();
    let page = Page::read()?;
    let answers = evaluate(&page, &api, from, to);
    let rules = rules(&api)?;
    drop(testbed);

    println!("\n{}", table(&answers));
    println!("{rules}");
    let file = cargo::workspace().join("docs/observability/dashboard.svg");
    fs::write(&file, draw::draw(&page, &answers)?)
        .with_context(|| format!("cannot write {}", file.display()))?;
    let faults: Vec<_> = answers.iter().filter_map(PanelResult::fault).collect();
    for fault in &faults {
        eprintln!("FAILED {fault}");
    }
    let queries: usize = answers.iter().map(|answer| answer.results.len()).sum();
    println!(
        "{} panels, {queries} queries, {} failed; drawn in docs/observability/dashboard.svg; {:.0} s, {:.0} s of them after the build",
        answers.len(),
        faults.len(),
        start.elapsed().as_secs_f64(),
        began.elapsed().as_secs_f64(),
    );
    if faults.is_empty() { Ok(()) } else { Err(AlreadyReported.into()) }
}

/// Runs the probe during the traffic: with a file, with a Pushgateway, and with a wrong password.
fn watch(testbed: &Testbed) -> Result<()> {
    let end = Instant::now() + TRAFFIC;
    let textfile = testbed.textfile("mail");
    let gateway = Testbed::gateway();
    while Instant::now() < end {
        let passed = testbed.probe("mail", Testbed::password(), &["--textfile", &textfile])?;
        ensure!(passed.status.success(), "the probe failed:\n{}", String::from_utf8_lossy(&passed.stdout));
        let pushed = testbed.probe("pushed", Testbed::password(), &["--pushgateway", &gateway])?;
        ensure!(
            pushed.status.success(),
            "the probe failed:\n{}{}",
            String::from_utf8_lossy(&pushed.stdout),
            String::from_utf8_lossy(&pushed.stderr)
        );
        let failed = testbed.probe("broken", "wrong", &["--pushgateway", &gateway])?;
        let printed = String::from_utf8_lossy(&failed.stdout);
        ensure!(
            !failed.status.success() && printed.contains("failed at imap_login"),
            "the probe passed with a wrong password:\n{printed}"
        );
        thread::sleep(Duration::from_secs(5));
    }
    Ok(())
}

fn now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64())
}

fn evaluate<'a>(page: &'a Page, api: &Api, from: f64, to: f64) -> Vec<PanelResult<'a>> {
    let answer = |panel: &'a Panel| {
        let outcome = |query: &'a Query| {
            let expr = for_this_run(&query.expr);
            let result = match panel.kind {
                Kind::Stat | Kind::Table => api.instant(&expr, to),
                Kind::Lines | Kind::Stacked | Kind::Heatmap => api.range(&expr, from, to, STEP),
            };
            let result = result.map_err(|error| format!("{error:#}"));
            let reason = panel.empty_when.clone();
            QueryResult { query, result, reason }
        };
        PanelResult { panel, results: panel.queries.iter().map(outcome).collect() }
    };
    page.panels().map(answer).collect()
}

/// An expression as Grafana would send it, with all values selected.
fn for_this_run(expr: &str) -> String {
    let chosen =
        dashboard::for_grafana(expr).replace("$__rate_interval", RATE_INTERVAL).replace("$__range", RANGE);
    chosen.replace("$job", "injector").replace("$instance", ".*").replace("$listener", ".*")
}

/// Checks that Prometheus evaluates every rule, and lists the active alerts.
fn rules(api: &Api) -> Result<String> {
    let data = api.ask("/api/v1/rules", &[])?;
    let groups = data["groups"].as_array().context("the answer has no rule groups")?;
    let rules: Vec<_> = groups.iter().filter_map(|group| group["rules"].as_array()).flatten().collect();
    ensure!(!rules.is_empty(), "Prometheus has no rules");
    let mut on = Vec::new();
    for rule in &rules {
        let name = rule["name"].as_str().unwrap_or_default();
        ensure!(rule["health"] == "ok", "rule {name}: {}", rule["lastError"]);
        for alert in rule["alerts"].as_array().into_iter().flatten() {
            let annotations = alert["annotations"].to_string();
            ensure!(!annotations.contains("error expanding"), "alert {name}: {annotations}");
            let state = alert["state"].as_str().unwrap_or_default();
            on.push(format!("  {state:<8} {}", alert["annotations"]["summary"].as_str().unwrap_or(name)));
        }
    }
    // The testbed has a listener without a backend.
    ensure!(
        on.iter().any(|line| line.contains("dead")),
        "no alert about the listener without a backend: {on:#?}"
    );
    Ok(format!("{} rules, all healthy; alerts that fire or are pending:\n{}\n", rules.len(), on.join("\n")))
}

/// Panel, query, series, last value.
fn table(answers: &[PanelResult<'_>]) -> String {
    /// How many series of one query are listed.
    const MAX_SERIES: usize = 6;
    let mut lines = Vec::new();
    for answer in answers {
        // A heatmap's unit is that of its buckets, and its values are counts.
        let unit = if answer.panel.kind == Kind::Heatmap { "none" } else { &answer.panel.unit };
        lines.push(answer.panel.title.clone());
        for outcome in &answer.results {
            match &outcome.result {
                Err(error) => lines.push(format!("    FAILED: {error}")),
                Ok(series) if series.is_empty() => {
                    let reason = outcome.reason.as_deref().unwrap_or("NO REASON GIVEN");
                    lines.push(format!("    no series: {reason}"));
                }
                Ok(series) => {
                    let mut listed: Vec<_> = series.iter().collect();
                    // The largest first.
                    listed.sort_by(|left, right| {
                        let size = |series: &Series| series.last().unwrap_or_default().abs();
                        size(right).total_cmp(&size(left))
                    });
                    for series in listed.iter().take(MAX_SERIES) {
                        let value =
                            series.last().map_or("no number".to_owned(), |last| draw::number(last, unit));
                        lines.push(format!("    {:<48} {value:>14}", series.name(&outcome.query.legend)));
                    }
                    if listed.len() > MAX_SERIES {
                        lines.push(format!("    and {} more", listed.len() - MAX_SERIES));
                    }
                }
            }
        }
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_variable_is_left_in_an_expression() {
        let page = Page::read().unwrap();
        for query in page.panels().flat_map(|panel| &panel.queries) {
            let expr = for_this_run(&query.expr);
            assert!(!expr.contains(['$', '@']), "{expr}");
        }
    }
}
