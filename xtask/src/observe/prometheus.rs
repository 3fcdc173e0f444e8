//! A client of Prometheus' HTTP API (v1), for the calls that the live run needs.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, bail};
use injector_testbed::netns::NetnsHandle;
use serde_json::Value;

/// A Prometheus in a namespace.
#[derive(Clone, Debug)]
pub(super) struct Api {
    netns: NetnsHandle,
    address: SocketAddr,
}

/// One series of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Series {
    pub(super) labels: BTreeMap<String, String>,
    /// Time in seconds since 1970, and value.
    pub(super) points: Vec<(f64, f64)>,
}

impl Api {
    pub(super) fn new(netns: NetnsHandle, address: SocketAddr) -> Self {
        Self { netns, address }
    }

    /// The values at one time.
    pub(super) fn instant(&self, expr: &str, at: f64) -> Result<Vec<Series>> {
        self.query("query", &[("query", expr), ("time", &at.to_string())])
    }

    /// The values between two times.
    pub(super) fn range(&self, expr: &str, from: f64, to: f64, step: u32) -> Result<Vec<Series>> {
        let (from, to, step) = (from.to_string(), to.to_string(), step.to_string());
        self.query("query_range", &[("query", expr), ("start", &from), ("end", &to), ("step", &step)])
    }

    fn query(&self, verb: &str, form: &[(&str, &str)]) -> Result<Vec<Series>> {
        let data = self.ask(&format!("/api/v1/{verb}"), form)?;
        let result = data["result"].as_array().with_context(|| format!("not a list of series: {data}"))?;
        // A scalar is a pair, not a list of series.
        result.iter().map(|item| series(item).with_context(|| format!("not a series: {item}"))).collect()
    }

    /// The part `data` of an answer.
    pub(super) fn ask(&self, path: &str, form: &[(&str, &str)]) -> Result<Value> {
        let url = format!("http://{}{path}", self.address);
        let text = self.netns.run(|| -> Result<String> {
            let agent = ureq::Agent::config_builder()
                .timeout_global(Some(Duration::from_secs(10)))
                .http_status_as_error(false)
                .build()
                .new_agent();
            let answer = if form.is_empty() {
                agent.get(&url).call()
            } else {
                agent.post(&url).send_form(form.iter().copied())
            };
            Ok(answer?.body_mut().read_to_string()?)
        })??;
        let mut answer: Value =
            serde_json::from_str(&text).with_context(|| format!("{url} answers {text}"))?;
        if answer["status"] != "success" {
            bail!("{}", answer["error"].as_str().unwrap_or(&text));
        }
        Ok(answer["data"].take())
    }
}

fn series(item: &Value) -> Option<Series> {
    let labels = item["metric"].as_object()?;
    let labels = labels.iter().filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())));
    let points: Vec<_> = match &item["values"] {
        Value::Array(values) => values.iter().filter_map(point).collect(),
        _ => vec![point(&item["value"])?],
    };
    Some(Series { labels: labels.collect(), points })
}

fn point(pair: &Value) -> Option<(f64, f64)> {
    Some((pair[0].as_f64()?, pair[1].as_str()?.parse().ok()?))
}

impl Series {
    /// Its name by a panel's legend, with each `{{label}}` filled in.
    pub(super) fn name(&self, legend: &str) -> String {
        let mut name = legend.to_owned();
        for (label, value) in &self.labels {
            name = name.replace(&format!("{{{{{label}}}}}"), value);
        }
        // A label that the series does not have is empty, as in Grafana.
        while let Some((before, rest)) = name.split_once("{{") {
            let Some((_, after)) = rest.split_once("}}") else { break };
            name = format!("{before}{after}");
        }
        name.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// The last value that is a number.
    pub(super) fn last(&self) -> Option<f64> {
        self.points.iter().rev().map(|(_, value)| *value).find(|value| value.is_finite())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn series_are_named_by_their_legend() {
        let item = json!({ "metric": { "listener": "smtp", "engine": "splice" }, "values": [[1.0, "2"], [2.0, "NaN"]] });
        let series = series(&item).unwrap();
        assert_eq!(series.name("{{listener}} by {{engine}}{{backend}}"), "smtp by splice");
        assert_eq!(series.last(), Some(2.0));
        assert_eq!(
            super::series(&json!({ "metric": {}, "value": [1.5, "4"] })).unwrap().points,
            [(1.5, 4.0)]
        );
        assert_eq!(super::series(&json!([1.5, "4"])), None);
    }
}
