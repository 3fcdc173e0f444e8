//! The dashboard: one table of panels, of which `deploy/grafana/injector.json` is made, and which the live run evaluates.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// Grafana's schema of dashboards (Grafana 10 and later read it).
const SCHEMA: u32 = 39;

/// Columns of Grafana's grid.
const COLUMNS: u32 = 24;

/// How a panel shows its series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
#[derive(Clone, Copy, Debug)]
pub(super) struct Query {
    /// PromQL. `@host` and `@listener` stand for the matchers of the dashboard's variables.
    pub(super) expr: &'static str,
    /// What a series is called, with its labels in double braces.
    pub(super) legend: &'static str,
}

/// One panel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Panel {
    pub(super) title: &'static str,
    /// What to read out of it.
    about: &'static str,
    pub(super) kind: Kind,
    /// Grafana's name of the unit.
    pub(super) unit: &'static str,
    width: u32,
    height: u32,
    pub(super) queries: &'static [Query],
    /// Why it may show nothing though all is well.
    pub(super) may_be_empty: Option<&'static str>,
}

/// Panels under one heading.
#[derive(Clone, Copy, Debug)]
struct Row {
    title: &'static str,
    panels: &'static [Panel],
}

const fn q(expr: &'static str, legend: &'static str) -> Query {
    Query { expr, legend }
}

const fn panel(
    title: &'static str,
    kind: Kind,
    unit: &'static str,
    width: u32,
    queries: &'static [Query],
) -> Panel {
    let height = match kind {
        Kind::Stat => 4,
        _ => 8,
    };
    Panel { title, about: "", kind, unit, width, height, queries, may_be_empty: None }
}

impl Panel {
    const fn about(mut self, about: &'static str) -> Self {
        self.about = about;
        self
    }

    const fn high(mut self, rows: u32) -> Self {
        self.height = rows;
        self
    }

    const fn may_be_empty(mut self, why: &'static str) -> Self {
        self.may_be_empty = Some(why);
        self
    }
}

/// The whole dashboard, from top to bottom.
const ROWS: &[Row] = &[
    Row {
        title: "At a glance",
        panels: &[
            panel("Scraped", Kind::Stat, "bool_yes_no", 4, &[q("up{@host}", "{{instance}}")])
                .about("Whether Prometheus reaches each daemon."),
            panel("Version", Kind::Stat, "none", 4, &[q("injector_build_info{@host}", "{{instance}} {{version}}")]),
            panel(
                "Running for",
                Kind::Stat,
                "s",
                4,
                &[q("time() - process_start_time_seconds{@host}", "{{instance}}")],
            ),
            panel(
                "Connections now",
                Kind::Stat,
                "none",
                4,
                &[q("sum by (engine) (injector_connections_active{@listener})", "{{engine}}")],
            ),
            panel(
                "Engines that can run",
                Kind::Stat,
                "bool_yes_no",
                4,
                &[q("min by (engine) (injector_engine_available{@host})", "{{engine}}")],
            ),
            panel(
                "Last roundtrip passed",
                Kind::Stat,
                "bool_yes_no",
                4,
                &[q("injector_probe_success", "{{probe}}")],
            )
            .about("Whether the probe's last message made the roundtrip."),
            panel(
                "Alerts",
                Kind::Table,
                "none",
                COLUMNS,
                &[q(
                    r#"sum by (alertname, alertstate, severity, instance, listener) (ALERTS{alertname=~"Injector.+"})"#,
                    "{{alertname}} {{alertstate}} {{listener}}",
                )],
            )
            .high(5)
            .may_be_empty("nothing is wrong"),
        ],
    },
    Row {
        title: "Connections",
        panels: &[
            panel(
                "Accepted",
                Kind::Lines,
                "cps",
                8,
                &[q(
                    "sum by (listener) (rate(injector_connections_accepted_total{@listener}[$__rate_interval]))",
                    "{{listener}}",
                )],
            ),
            panel(
                "Being served",
                Kind::Stacked,
                "none",
                8,
                &[q(
                    "sum by (listener, engine) (injector_connections_active{@listener})",
                    "{{listener}} {{engine}}",
                )],
            ),
            panel(
                "Room used",
                Kind::Lines,
                "percentunit",
                8,
                &[
                    q("injector:connections:ratio{@host}", "{{instance}} connections"),
                    q("injector:inline_flows:ratio{@host}", "{{instance}} inline flows"),
                ],
            )
            .about("At 1 clients are turned away (connections) or dropped (inline flows)."),
            panel(
                "Turned away",
                Kind::Lines,
                "cps",
                12,
                &[q(
                    "sum by (reason) (rate(injector_connections_rejected_total{@listener}[$__rate_interval]))",
                    "{{reason}}",
                )],
            )
            .about("backend_*: no backend. no_banner: the backend hung up on the header. The reasons are in docs/metrics.md."),
            panel(
                "Ends",
                Kind::Stacked,
                "cps",
                12,
                &[q(
                    "sum by (reason) (rate(injector_connections_closed_total{@listener}[$__rate_interval]))",
                    "{{reason}}",
                )],
            ),
        ],
    },
    Row {
        title: "Headers",
        panels: &[
            panel(
                "Header to first byte, all",
                Kind::Heatmap,
                "s",
                8,
                &[q(
                    "sum by (le) (increase(injector_header_to_first_byte_seconds_bucket{@listener}[$__rate_interval]))",
                    "{{le}}",
                )],
            )
            .about("How long the mail servers take to speak after their header."),
            panel(
                "Header to first byte",
                Kind::Lines,
                "s",
                8,
                &[
                    q(
                        "histogram_quantile(0.5, sum by (listener, le) \
                         (rate(injector_header_to_first_byte_seconds_bucket{@listener}[$__rate_interval])))",
                        "{{listener}} half",
                    ),
                    q(
                        "histogram_quantile(0.99, sum by (listener, le) \
                         (rate(injector_header_to_first_byte_seconds_bucket{@listener}[$__rate_interval])))",
                        "{{listener}} 99 %",
                    ),
                ],
            ),
            panel(
                "Headers sent and failed",
                Kind::Lines,
                "cps",
                4,
                &[
                    q(
                        "sum by (engine) (rate(injector_headers_sent_total{@listener}[$__rate_interval]))",
                        "{{engine}} sent",
                    ),
                    q(
                        "sum by (engine) (rate(injector_headers_failed_total{@listener}[$__rate_interval]))",
                        "{{engine}} failed",
                    ),
                ],
            ),
            panel(
                "Hung up on the header",
                Kind::Lines,
                "percentunit",
                4,
                &[q("max by (listener) (injector:no_banner:ratio_rate10m{@listener})", "{{listener}}")],
            )
            .about("Share of connections whose backend closed before its first byte: it does not take the header."),
        ],
    },
    Row {
        title: "Payload",
        panels: &[
            panel(
                "Bytes by plane",
                Kind::Stacked,
                "Bps",
                8,
                &[q(
                    "sum by (plane) (rate(injector_bytes_total{@listener}[$__rate_interval]))",
                    "{{plane}}",
                )],
            )
            .about("relayed: copied by user space. piped: moved by user space without a copy. spliced: by the kernel."),
            panel(
                "Bytes by direction",
                Kind::Lines,
                "Bps",
                8,
                &[q(
                    "sum by (direction, plane) (rate(injector_bytes_total{@listener}[$__rate_interval]))",
                    "{{direction}} {{plane}}",
                )],
            ),
            panel(
                "Copied by user space",
                Kind::Lines,
                "percentunit",
                8,
                &[q("injector:relayed_bytes:ratio_rate30m{@listener}", "{{instance}} {{listener}}")],
            ),
            panel(
                "Enrolments",
                Kind::Lines,
                "ops",
                8,
                &[
                    q("sum(rate(injector_enrolments_total{@listener}[$__rate_interval]))", "handed to the kernel"),
                    q(
                        "sum by (reason) (rate(injector_enrolment_failures_total{@listener}[$__rate_interval]))",
                        "rejected: {{reason}}",
                    ),
                ],
            ),
            panel(
                "Changes of plane",
                Kind::Lines,
                "ops",
                8,
                &[q(
                    "sum by (change) (rate(injector_plane_changes_total{@listener}[$__rate_interval]))",
                    "{{change}}",
                )],
            )
            .about("Readers that do not keep up are held, taken back to user space, and resumed."),
            panel(
                "Backlog in the kernel",
                Kind::Lines,
                "bytes",
                8,
                &[q("injector_backlog_bytes{@host}", "{{instance}}")],
            ),
        ],
    },
    Row {
        title: "Backends and configuration",
        panels: &[
            panel(
                "Backends up",
                Kind::Lines,
                "bool_yes_no",
                6,
                &[q("min by (listener, backend) (injector_backend_up{@listener})", "{{listener}} {{backend}}")],
            ),
            panel(
                "Checks",
                Kind::Lines,
                "ops",
                6,
                &[q(
                    "sum by (listener, backend, result) (rate(injector_backend_checks_total{@listener}[$__rate_interval]))",
                    "{{listener}} {{backend}} {{result}}",
                )],
            ),
            panel(
                "Sessions by backend",
                Kind::Lines,
                "cps",
                6,
                &[q(
                    "sum by (listener, backend) (rate(injector_backend_sessions_total{@listener}[$__rate_interval]))",
                    "{{listener}} {{backend}}",
                )],
            ),
            panel(
                "Ejections",
                Kind::Lines,
                "none",
                6,
                &[q(
                    "sum by (listener, backend) (increase(injector_backend_ejections_total{@listener}[$__rate_interval]))",
                    "{{listener}} {{backend}}",
                )],
            ),
            panel(
                "Draining",
                Kind::Stat,
                "bool_yes_no",
                6,
                &[q("max by (listener) (injector_listener_draining{@listener})", "{{listener}}")],
            ),
            panel(
                "Reloads in this time",
                Kind::Stat,
                "none",
                6,
                &[q("sum by (result) (increase(injector_config_reloads_total{@host}[$__range]))", "{{result}}")],
            ),
            panel(
                "Age of the configuration",
                Kind::Stat,
                "s",
                6,
                &[q("time() - injector_config_loaded_timestamp_seconds{@host}", "{{instance}}")],
            ),
            panel(
                "Checks of the self-test that failed",
                Kind::Stat,
                "none",
                6,
                &[q("count by (instance) (injector_selftest_check{@host} == 0)", "{{instance}}")],
            )
            .may_be_empty("every check passed"),
        ],
    },
    Row {
        title: "Programs in the kernel",
        panels: &[
            panel(
                "Inline",
                Kind::Lines,
                "ops",
                8,
                &[q(
                    "sum by (program, event) (rate(injector_bpf_events_total{@host,\
                     program=~\"client_in|backend_out|backend_in|inline\"}[$__rate_interval]))",
                    "{{program}} {{event}}",
                )],
            ),
            panel(
                "Splice",
                Kind::Lines,
                "ops",
                8,
                &[q(
                    "sum by (program, event) (rate(injector_bpf_events_total{@host,\
                     program=~\"inject|verdict\"}[$__rate_interval]))",
                    "{{program}} {{event}}",
                )],
            ),
            panel(
                "Self-test at the last start",
                Kind::Table,
                "s",
                8,
                &[q(
                    "max by (instance, engine, check) (injector_selftest_check_seconds{@host})",
                    "{{engine}} {{check}}",
                )],
            ),
        ],
    },
    Row {
        title: "Probe",
        panels: &[
            panel(
                "Steps of the last roundtrip",
                Kind::Stacked,
                "s",
                12,
                &[q("max by (probe, step) (injector_probe_step_seconds)", "{{probe}} {{step}}")],
            ),
            panel(
                "Failed at",
                Kind::Table,
                "none",
                6,
                &[q("max by (probe, step) (injector_probe_step_failed) == 1", "{{probe}} {{step}}")],
            )
            .may_be_empty("the last roundtrip of every probe passed"),
            panel(
                "Since a roundtrip passed",
                Kind::Lines,
                "s",
                6,
                &[q("time() - max by (probe) (injector_probe_last_success_timestamp_seconds)", "{{probe}}")],
            ),
        ],
    },
];

/// All panels, in order.
pub(super) fn panels() -> impl Iterator<Item = &'static Panel> {
    ROWS.iter().flat_map(|row| row.panels)
}

/// What stands where on the page, in Grafana's units.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    pub(super) x: u32,
    pub(super) y: u32,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) what: Item,
}

/// A heading or a panel.
#[derive(Clone, Copy, Debug)]
pub(super) enum Item {
    Heading(&'static str),
    Panel(&'static Panel),
}

/// The page from top to bottom, row by row, each filled from the left.
pub(super) fn placed() -> Vec<Placed> {
    let mut placed = Vec::new();
    let mut y = 0;
    for row in ROWS {
        placed.push(Placed { x: 0, y, width: COLUMNS, height: 1, what: Item::Heading(row.title) });
        y += 1;
        let (mut x, mut height) = (0, 0);
        for panel in row.panels {
            if x + panel.width > COLUMNS {
                (x, y, height) = (0, y + height, 0);
            }
            placed.push(Placed { x, y, width: panel.width, height: panel.height, what: Item::Panel(panel) });
            x += panel.width;
            height = height.max(panel.height);
        }
        y += height;
    }
    placed
}

/// An expression as Grafana gets it, with its own variables.
pub(super) fn for_grafana(expr: &str) -> String {
    expr.replace("@listener", r#"job=~"$job",instance=~"$instance",listener=~"$listener""#)
        .replace("@host", r#"job=~"$job",instance=~"$instance""#)
}

/// The dashboard as Grafana imports it.
pub(super) fn json() -> String {
    let panels: Vec<_> = (1..).zip(placed()).map(|(id, item)| of_item(&item, id)).collect();
    let dashboard = json!({
        "__inputs": [],
        "annotations": { "list": [alerts_as_annotations()] },
        "description": "The injector: connections, headers, payload, backends and the probe. Generated by `cargo xtask observe \
                        --write`; alerts are in deploy/prometheus/injector.rules.yml.",
        "editable": true,
        "graphTooltip": 1,
        "panels": panels,
        "refresh": "30s",
        "schemaVersion": SCHEMA,
        "tags": ["injector", "mail"],
        "templating": { "list": variables() },
        "time": { "from": "now-6h", "to": "now" },
        "timezone": "browser",
        "title": "Injector",
        "uid": "injector",
        "version": 1,
    });
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{dashboard:#}");
    text
}

fn source() -> Value {
    json!({ "type": "prometheus", "uid": "${datasource}" })
}

fn alerts_as_annotations() -> Value {
    json!({
        "datasource": source(),
        "enable": true,
        "expr": r#"ALERTS{alertname=~"Injector.+",alertstate="firing",severity="critical"}"#,
        "iconColor": "red",
        "name": "Critical alerts",
        "titleFormat": "{{alertname}}",
        "textFormat": "{{instance}} {{listener}}",
    })
}

fn variables() -> Value {
    // "All" means all that the query found: Prometheus has other jobs, too.
    let variable = |name: &str, label: &str, query: &str| {
        json!({
            "name": name, "label": label, "type": "query", "datasource": source(),
            "query": { "query": query, "refId": name }, "definition": query,
            "refresh": 2, "sort": 1, "includeAll": true, "multi": true,
            "current": { "selected": true, "text": ["All"], "value": ["$__all"] },
        })
    };
    json!([
        { "name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {} },
        variable("job", "Job", "label_values(injector_build_info, job)"),
        variable("instance", "Host", r#"label_values(injector_build_info{job=~"$job"}, instance)"#),
        variable(
            "listener",
            "Listener",
            r#"label_values(injector_connections_accepted_total{job=~"$job",instance=~"$instance"}, listener)"#,
        ),
    ])
}

fn of_item(item: &Placed, id: u32) -> Value {
    let place = json!({ "h": item.height, "w": item.width, "x": item.x, "y": item.y });
    match item.what {
        Item::Panel(panel) => of_panel(panel, id, &place),
        Item::Heading(title) => {
            json!({ "id": id, "type": "row", "title": title, "collapsed": false, "gridPos": place, "panels": [] })
        }
    }
}

fn of_panel(panel: &Panel, id: u32, place: &Value) -> Value {
    let instant = matches!(panel.kind, Kind::Stat | Kind::Table);
    let format = match panel.kind {
        Kind::Table => "table",
        Kind::Heatmap => "heatmap",
        _ => "time_series",
    };
    let target = |(number, query): (u8, &Query)| {
        json!({
            "refId": char::from(b'A' + number).to_string(),
            "datasource": source(),
            "expr": for_grafana(query.expr),
            "legendFormat": query.legend,
            "format": format,
            "instant": instant,
            "range": !instant,
        })
    };
    let (shape, custom, options) = match panel.kind {
        Kind::Lines => ("timeseries", lines("none", 0), timeseries()),
        Kind::Stacked => ("timeseries", lines("normal", 40), timeseries()),
        Kind::Stat => ("stat", json!({}), stat(panel)),
        Kind::Table => ("table", json!({}), json!({ "showHeader": true })),
        Kind::Heatmap => ("heatmap", json!({}), heatmap()),
    };
    let mut made = json!({
        "id": id,
        "type": shape,
        "title": panel.title,
        "datasource": source(),
        "gridPos": place,
        "targets": (0..).zip(panel.queries).map(target).collect::<Vec<_>>(),
        "fieldConfig": { "defaults": { "unit": panel.unit, "custom": custom, "noValue": panel.may_be_empty }, "overrides": [] },
        "options": options,
    });
    if !panel.about.is_empty() {
        made["description"] = panel.about.into();
    }
    if panel.kind == Kind::Table {
        // The time of an instant query, and the name of the data source's table.
        made["transformations"] =
            json!([{ "id": "organize", "options": { "excludeByName": { "Time": true } } }]);
    }
    made
}

fn lines(stacking: &str, fill: u32) -> Value {
    json!({
        "drawStyle": "line", "lineInterpolation": "linear", "lineWidth": 1, "fillOpacity": fill, "showPoints": "never",
        "spanNulls": false, "stacking": { "group": "A", "mode": stacking },
    })
}

fn timeseries() -> Value {
    json!({
        "legend": { "calcs": ["lastNotNull", "max"], "displayMode": "table", "placement": "bottom", "showLegend": true },
        "tooltip": { "mode": "multi", "sort": "desc" },
    })
}

fn stat(panel: &Panel) -> Value {
    // The version is a name, not a number.
    let text = if panel.title == "Version" { "name" } else { "auto" };
    json!({
        "colorMode": "none", "graphMode": "none", "justifyMode": "auto", "textMode": text, "orientation": "auto",
        "reduceOptions": { "calcs": ["lastNotNull"], "fields": "", "values": false },
    })
}

fn heatmap() -> Value {
    json!({
        "calculate": false, "cellGap": 1, "color": { "mode": "scheme", "scheme": "Blues", "steps": 64 },
        "yAxis": { "unit": "s" }, "legend": { "show": true }, "tooltip": { "show": true, "yHistogram": false },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dashboard_in_deploy_is_this_one() {
        assert_eq!(
            include_str!("../../../deploy/grafana/injector.json"),
            json(),
            "run `cargo xtask observe --write`"
        );
    }

    #[test]
    fn no_two_panels_share_a_place_or_a_name() {
        let made: Value = serde_json::from_str(&json()).unwrap();
        let panels = made["panels"].as_array().unwrap();
        let mut cells = std::collections::BTreeSet::new();
        let mut titles = std::collections::BTreeSet::new();
        for panel in panels {
            assert!(titles.insert(panel["title"].as_str().unwrap()), "{}", panel["title"]);
            let [h, w, x, y] = ["h", "w", "x", "y"].map(|side| panel["gridPos"][side].as_u64().unwrap());
            for cell in (y..y + h).flat_map(|row| (x..x + w).map(move |column| (row, column))) {
                assert!(cell.1 < 24 && cells.insert(cell), "{} at {cell:?}", panel["title"]);
            }
        }
    }

    #[test]
    fn every_variable_that_is_used_is_defined() {
        let text = json();
        let made: Value = serde_json::from_str(&text).unwrap();
        let defined: Vec<_> = made["templating"]["list"]
            .as_array()
            .unwrap()
            .iter()
            .map(|it| it["name"].as_str().unwrap())
            .collect();
        assert_eq!(defined, ["datasource", "job", "instance", "listener"]);
        assert!(!text.contains('@'), "a stand-in was left");
    }
}
