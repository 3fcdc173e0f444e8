//! Compares the queries in `deploy/` with what the daemon and the probe export: names, labels, and
//! label values.
//!
//! promtool does not know which series exist. It accepts an alert on a name that does not exist,
//! which then never fires.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use promql_parser::parser::{
    self, Expr, LabelModifier, VectorMatchCardinality, VectorSelector,
    token::{T_LAND, T_LOR, T_LUNLESS},
};
use serde::Deserialize;
use serde_json::Value;

use super::tests::complete;

const RULES: &str = include_str!("../../../../deploy/prometheus/injector.rules.yml");
const RULE_TESTS: &str = include_str!("../../../../deploy/prometheus/injector.rules.test.yml");
const DASHBOARD: &str = include_str!("../../../../deploy/grafana/injector.json");
const METRICS: &str = include_str!("../../../../docs/metrics.md");

/// Labels that Prometheus adds to every series of a target.
const OF_TARGETS: [&str; 2] = ["job", "instance"];

/// Labels with a fixed set of values, all of which an idle daemon exports.
const CLOSED: [&str; 4] = ["reason", "plane", "direction", "change"];

#[derive(Deserialize)]
struct RuleFile {
    groups: Vec<Group>,
}

#[derive(Deserialize)]
struct Group {
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
struct Rule {
    record: Option<String>,
    alert: Option<String>,
    expr: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

fn rules() -> Vec<Rule> {
    let file: RuleFile = serde_saphyr::from_str(RULES).unwrap();
    file.groups.into_iter().flat_map(|group| group.rules).collect()
}

type Labels = BTreeSet<String>;

/// Name → label → known values; empty if the values are not known.
#[derive(Default)]
struct ExportedSeries(BTreeMap<String, BTreeMap<String, BTreeSet<String>>>);

impl ExportedSeries {
    /// The series of the daemon, the probe and Prometheus itself.
    fn exported() -> Self {
        let mut series = Self::default();
        let (metrics, _) = complete();
        for line in metrics.encode().unwrap().lines().filter(|line| !line.starts_with('#')) {
            let (sample, _) = line.rsplit_once(' ').unwrap();
            let (name, labels) = sample.split_once('{').unwrap_or((sample, ""));
            let labels = labels.trim_end_matches('}').split(',').filter_map(|label| label.split_once('='));
            series.add(name, labels.map(|(label, value)| (label, Some(value.trim_matches('"')))));
        }
        // A test of the probe compares these rows with its output.
        for row in METRICS.lines().filter_map(|line| line.strip_prefix("| `injector_probe_")) {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            let labels = cells[2].split(", ").map(|label| (label.trim_matches('`'), None));
            series.add(&format!("injector_probe_{}", cells[0].trim_end_matches('`')), labels);
        }
        series.add("up", []);
        series.add("ALERTS", ["alertname", "alertstate", "severity", "listener"].map(|label| (label, None)));
        series
    }

    /// The same, with the recording rules.
    fn all() -> Self {
        let mut series = Self::exported();
        for rule in rules() {
            if let Some(record) = &rule.record {
                let labels = series.check(&rule.expr).unwrap_or_else(|problem| panic!("{record}: {problem}"));
                series.add(record, labels.iter().map(|label| (label.as_str(), None)));
            }
        }
        series
    }

    fn add<'a>(&mut self, name: &str, labels: impl IntoIterator<Item = (&'a str, Option<&'a str>)>) {
        let metric = self.0.entry(name.to_owned()).or_default();
        for label in OF_TARGETS {
            metric.entry(label.to_owned()).or_default();
        }
        for (label, value) in labels {
            metric.entry(label.to_owned()).or_default().extend(value.map(str::to_owned));
        }
    }

    /// The labels of an expression's result, if all its series exist.
    fn check(&self, expr: &str) -> Result<Labels, String> {
        let parsed = parser::parse(expr).map_err(|error| format!("{error}: {expr}"))?;
        Ok(self.labels(&parsed)?.unwrap_or_default())
    }

    /// The labels of a vector; `None` for a number.
    fn labels(&self, expr: &Expr) -> Result<Option<Labels>, String> {
        match expr {
            Expr::VectorSelector(selector) => self.selected(selector).map(Some),
            Expr::MatrixSelector(matrix) => self.selected(&matrix.vs).map(Some),
            Expr::Paren(paren) => self.labels(&paren.expr),
            Expr::Unary(unary) => self.labels(&unary.expr),
            Expr::Subquery(subquery) => self.labels(&subquery.expr),
            Expr::NumberLiteral(_) | Expr::StringLiteral(_) => Ok(None),
            Expr::Aggregate(aggregate) => {
                let below = self.labels(&aggregate.expr)?.unwrap_or_default();
                Ok(Some(match &aggregate.modifier {
                    None => Labels::new(),
                    Some(LabelModifier::Include(by)) => named(&by.labels, &below, "by")?,
                    Some(LabelModifier::Exclude(without)) => {
                        let gone = named(&without.labels, &below, "without")?;
                        below.difference(&gone).cloned().collect()
                    }
                }))
            }
            Expr::Binary(binary) => {
                let (left, right) = (self.labels(&binary.lhs)?, self.labels(&binary.rhs)?);
                let (Some(left), Some(right)) = (left.clone(), right.clone()) else {
                    return Ok(left.or(right));
                };
                let modifier = binary.modifier.as_ref();
                let set = [T_LAND, T_LOR, T_LUNLESS].contains(&binary.op.id());
                match modifier.and_then(|modifier| modifier.matching.as_ref()) {
                    Some(LabelModifier::Include(on)) => {
                        named(&on.labels, &left, "on")?;
                        named(&on.labels, &right, "on")?;
                    }
                    Some(LabelModifier::Exclude(ignoring)) => {
                        drop(named(&ignoring.labels, &left, "ignoring")?)
                    }
                    // Sides with different labels never match. The labels of absent() depend on its
                    // selector.
                    None if left != right && !binary.rhs.to_string().starts_with("absent(") => {
                        return Err(format!("{left:?} is never matched by {right:?}: {binary}"));
                    }
                    None => {}
                }
                let one_to_one =
                    modifier.is_none_or(|modifier| modifier.card == VectorMatchCardinality::OneToOne);
                match modifier.and_then(|modifier| modifier.matching.as_ref()) {
                    // The result has the labels that were matched on, except for comparisons, which
                    // filter their left side.
                    Some(LabelModifier::Include(on))
                        if one_to_one && !set && !binary.op.is_comparison_operator() =>
                    {
                        Ok(Some(on.labels.iter().cloned().collect()))
                    }
                    _ => Ok(Some(left)),
                }
            }
            Expr::Call(call) => {
                let mut labels = None;
                for argument in &call.args.args {
                    labels = labels.or(self.labels(argument)?);
                }
                if call.func.name == "histogram_quantile" {
                    let labels = labels.get_or_insert_default();
                    if !labels.remove("le") {
                        return Err(format!("no buckets: {expr}"));
                    }
                }
                Ok(labels)
            }
            Expr::Extension(_) => Err(format!("not known fields: {expr}")),
        }
    }

    fn selected(&self, selector: &VectorSelector) -> Result<Labels, String> {
        let name = selector.name.as_deref().ok_or("a selector without a name")?;
        let metric = self.0.get(name).ok_or_else(|| format!("no metric is named {name}"))?;
        for matcher in &selector.matchers.matchers {
            let values =
                metric.get(&matcher.name).ok_or_else(|| format!("{name} has no label {}", matcher.name))?;
            let closed = CLOSED.contains(&matcher.name.as_str()) && !values.is_empty();
            if closed && !values.iter().any(|value| matcher.is_match(value)) {
                return Err(format!("{name}: no {} is matched by {matcher}", matcher.name));
            }
        }
        Ok(metric.keys().cloned().collect())
    }
}

fn named(wanted: &[String], have: &Labels, keyword: &str) -> Result<Labels, String> {
    match wanted.iter().find(|label| !have.contains(*label)) {
        Some(missing) => Err(format!("{keyword} ({missing}): there is {have:?}")),
        None => Ok(wanted.iter().cloned().collect()),
    }
}

/// The names between `{{` and `}}` with this prefix.
fn placeholders<'a>(text: &'a str, start: &str) -> Vec<&'a str> {
    let inside =
        text.split("{{").skip(1).filter_map(|rest| rest.split_once("}}").map(|(inside, _)| inside.trim()));
    inside.filter_map(|inside| inside.split(['|', ' ']).next()?.strip_prefix(start)).collect()
}

#[test]
fn the_rules_use_exported_series() {
    let series = ExportedSeries::all();
    for rule in rules() {
        let name = rule.alert.as_ref().or(rule.record.as_ref()).unwrap();
        let labels = series.check(&rule.expr).unwrap_or_else(|problem| panic!("{name}: {problem}"));
        for text in rule.annotations.values() {
            for label in placeholders(text, "$labels.") {
                assert!(labels.contains(label), "{name} uses {{{{ $labels.{label} }}}} and has {labels:?}");
            }
        }
    }
}

#[test]
fn every_alert_has_a_summary_and_a_runbook() {
    let operations = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations.md");
    // The page is optional here. If it exists, every alert must have its heading in it.
    let operations = fs::read_to_string(operations).ok();
    for rule in rules() {
        let Some(alert) = &rule.alert else { continue };
        assert!(["critical", "warning"].contains(&rule.labels["severity"].as_str()), "{alert}");
        assert!(
            !rule.annotations["summary"].is_empty() && rule.annotations["description"].len() > 60,
            "{alert}"
        );
        let anchor = format!("alert-{}", kebab(alert));
        assert_eq!(rule.annotations["runbook_url"], format!("docs/operations.md#{anchor}"));
        if let Some(text) = &operations {
            let headings = text.lines().filter(|line| line.starts_with('#')).map(slug);
            let there =
                headings.into_iter().any(|slug| slug == anchor) || text.contains(&format!("id=\"{anchor}\""));
            assert!(there, "docs/operations.md has no #{anchor}");
        }
    }
}

/// `InjectorNoTrafficOn25` → `injector-no-traffic-on-25`.
fn kebab(name: &str) -> String {
    let mut text = String::new();
    let mut digit = false;
    for character in name.chars() {
        if (character.is_uppercase() || character.is_ascii_digit() && !digit) && !text.is_empty() {
            text.push('-');
        }
        digit = character.is_ascii_digit();
        text.extend(character.to_lowercase());
    }
    text
}

/// The anchor of a Markdown heading.
fn slug(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept =
        text.chars().filter(|character| character.is_alphanumeric() || matches!(character, ' ' | '-' | '_'));
    kept.map(|character| if character == ' ' { '-' } else { character }).collect()
}

#[test]
fn every_alert_is_tested_firing_and_not() {
    let tests: serde_json::Value = serde_saphyr::from_str(RULE_TESTS).unwrap();
    let mut cases: BTreeMap<String, [bool; 2]> = BTreeMap::new();
    for case in tests["tests"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|test| test["promql_expr_test"].as_array().unwrap())
    {
        let expr = case["expr"].as_str().unwrap();
        let Some((_, rest)) = expr.split_once("alertname=\"") else { continue };
        let fires = !case["exp_samples"].as_array().unwrap().is_empty();
        // A pending alert is not a firing one.
        assert!(!fires || expr.contains("alertstate=\"firing\""), "{expr}");
        let (name, _) = rest.split_once('"').unwrap();
        cases.entry(name.to_owned()).or_default()[usize::from(fires)] = true;
    }
    let alerts: BTreeSet<_> = rules().into_iter().filter_map(|rule| rule.alert).collect();
    assert_eq!(cases.keys().cloned().collect::<BTreeSet<_>>(), alerts);
    for (alert, both) in cases {
        assert_eq!(both, [true, true], "{alert}: [a case in which it does not fire, one in which it does]");
    }
}

#[test]
fn the_dashboard_uses_exported_series() {
    let series = ExportedSeries::all();
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let mut queries = 0;
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expr = chosen(target["expr"].as_str().unwrap());
            let labels =
                series.check(&expr).unwrap_or_else(|problem| panic!("{}: {problem}", panel["title"]));
            for label in placeholders(target["legendFormat"].as_str().unwrap(), "") {
                assert!(
                    labels.contains(label),
                    "{} shows {{{{{label}}}}} and has {labels:?}",
                    panel["title"]
                );
            }
            queries += 1;
        }
    }
    assert!(queries > 30, "only {queries} queries were found");
    for annotation in dashboard["annotations"]["list"].as_array().unwrap() {
        series.check(&chosen(annotation["expr"].as_str().unwrap())).unwrap();
    }
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        let Some(definition) = variable["definition"].as_str() else { continue };
        let inside =
            definition.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')')).unwrap();
        let (selector, label) = inside.rsplit_once(", ").unwrap();
        assert!(series.check(&chosen(selector)).unwrap().contains(label), "{definition}");
    }
}

/// An expression with Grafana's variables replaced.
fn chosen(expr: &str) -> String {
    let expr = expr.replace("$__rate_interval", "5m").replace("$__range", "1h");
    ["$job", "$instance", "$listener"].iter().fold(expr, |expr, variable| expr.replace(variable, ".*"))
}

#[test]
fn wrong_queries_are_found() {
    let series = ExportedSeries::all();
    for (expr, problem) in [
        (
            "rate(injector_connection_accepted_total[5m])",
            "no metric is named injector_connection_accepted_total",
        ),
        ("injector_backlog_bytes{listener=\"smtp\"}", "injector_backlog_bytes has no label listener"),
        ("injector_connections_rejected_total{reason=\"bannerless\"}", "no reason is matched"),
        ("injector_connections_rejected_total{reason=~\"front_.+\"}", "no reason is matched"),
        ("sum by (engine) (injector_connections_accepted_total)", "by (engine)"),
        ("injector_connections_active / injector_max_connections", "is never matched"),
        ("injector_connections_active / on (listener) injector_max_connections", "on (listener)"),
        (
            "histogram_quantile(0.5, sum by (listener) (injector_header_to_first_byte_seconds_bucket))",
            "no buckets",
        ),
    ] {
        let found = series.check(expr).unwrap_err();
        assert!(found.contains(problem), "{expr}: {found}");
    }
    let labels =
        series.check("sum by (listener) (rate(injector_bytes_total{plane=\"spliced\"}[5m])) > 3").unwrap();
    assert_eq!(labels, Labels::from(["listener".to_owned()]));
    assert_eq!(kebab("InjectorNoTrafficOn25"), "injector-no-traffic-on-25");
    assert_eq!(slug("### Alert: injector down"), "alert-injector-down");
}
