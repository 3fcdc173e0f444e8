//! `cargo xtask observe`: alerts and dashboard, checked by Prometheus' own tools, and in a live run
//! by Prometheus itself.

mod answer;
mod dashboard;
mod draw;
mod feeds;
mod live;
mod panels;
mod prometheus;
mod testbed;

use std::{fs, process::Command};

use anyhow::{Context as _, Result, ensure};

use self::panels::Page;
use crate::{
    cargo,
    setup::{self, Group},
};

#[derive(clap::Args)]
pub(crate) struct ObserveArgs {
    /// Write deploy/grafana/injector.json from the panels, instead of comparing it with them
    #[arg(long)]
    write: bool,
    /// Also run Prometheus and the injector under load in network namespaces, evaluate every panel,
    /// and draw docs/observability/dashboard.svg; takes about two minutes
    #[arg(long)]
    live: bool,
}

pub(crate) fn run(args: &ObserveArgs) -> Result<()> {
    if args.live {
        if let Some(reason) = injector_testbed::netns::unavailable() {
            anyhow::bail!("--live {reason}");
        }
        setup::ensure(&[Group::Bpf, Group::Mail, Group::Observe])?;
    } else {
        setup::ensure(&[Group::Observe])?;
    }
    dashboard(args.write)?;
    let rules = cargo::workspace().join("deploy/prometheus");
    for arguments in [
        ["check", "rules", "injector.rules.yml"],
        ["check", "config", "scrape.yml"],
        ["test", "rules", "injector.rules.test.yml"],
    ] {
        cargo::run(Command::new("promtool").args(arguments).current_dir(&rules))?;
    }
    if args.live { live::run() } else { Ok(()) }
}

/// Compares the dashboard's file with the panels, or writes it.
fn dashboard(write: bool) -> Result<()> {
    let file = cargo::workspace().join("deploy/grafana/injector.json");
    let page = Page::read()?;
    let made = dashboard::json(&page);
    if write {
        return fs::write(&file, made).with_context(|| format!("cannot write {}", file.display()));
    }
    let have = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    ensure!(have == made, "{} differs from the panels: run `cargo xtask observe --write`", file.display());
    println!("the dashboard agrees with its {} panels", page.panels().count());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_lists_every_alert() {
        let workspace = cargo::workspace();
        let read = |file: &str| fs::read_to_string(workspace.join(file)).unwrap();
        let (rules, page) = (read("deploy/prometheus/injector.rules.yml"), read("docs/observability.md"));
        let named = |kind: &str| -> Vec<String> {
            let names = rules.lines().filter_map(|line| line.trim().strip_prefix("- ")?.strip_prefix(kind));
            names.map(|name| name.trim_start_matches(": ").to_owned()).collect()
        };
        let alerts = named("alert");
        for alert in &alerts {
            assert!(page.contains(&format!("| `{alert}` |")), "{alert}");
        }
        let counts = format!("{} recording rules and {} alerts", named("record").len(), alerts.len());
        assert!(page.contains(&counts), "{counts}");
    }
}
