//! Reading the injector's `/metrics`, in the OpenMetrics text format 1.0.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::sockets::LIMIT;

/// How long the daemon may take to respond.
const TIMEOUT: Duration = LIMIT;

/// One sample: `name{label="value",…} number`.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// As printed, suffixes such as `_total` and `_bucket` included.
    pub name: String,
    /// Names and values, in the order printed.
    pub labels: Vec<(String, String)>,
    /// Its value.
    pub value: f64,
}

/// All samples of one scrape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    samples: Vec<Sample>,
}

impl Metrics {
    /// Scrapes `http://ADDRESS/metrics`, from the calling thread's namespace.
    ///
    /// # Errors
    /// When there is no response, or it is not a valid exposition.
    pub fn scrape(address: SocketAddr) -> anyhow::Result<Self> {
        let (status, body) = get(address, "/metrics")?;
        ensure!(status == 200, "/metrics answered {status}: {body}");
        Self::parse(&body)
    }

    /// Parses an exposition.
    ///
    /// # Errors
    /// When a line is neither a comment nor a sample, or the end (`# EOF`) is missing.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        ensure!(text.trim_end().ends_with("# EOF"), "the exposition is truncated: no # EOF");
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        let samples = lines.map(|line| parse_sample(line).with_context(|| format!("not a sample: {line}")));
        Ok(Self { samples: samples.collect::<anyhow::Result<_>>()? })
    }

    /// The sum of all samples with that name and at least those labels; 0 if there are none.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let has = |sample: &&Sample| {
            let label = |(name, value): &(&str, &str)| {
                sample.labels.iter().any(|label| label.0 == *name && label.1 == *value)
            };
            sample.name == name && labels.iter().all(label)
        };
        self.samples.iter().filter(has).map(|sample| sample.value).sum()
    }

    /// Whether there is any sample with that name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.samples.iter().any(|sample| sample.name == name)
    }

    /// All samples, as printed.
    #[must_use]
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }
}

/// Requests one page; returns the status code and the body.
pub fn get(address: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    // HTTP/1.0: the response ends with the connection and is not chunked.
    let accept = "application/openmetrics-text; version=1.0.0";
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\nAccept: {accept}\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.with_context(|| format!("no HTTP status in: {head}"))?, body.to_owned()))
}

fn parse_sample(line: &str) -> Option<Sample> {
    let name_end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(name_end);
    let mut labels = Vec::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, after) = rest.trim_start_matches(',').split_once("=\"")?;
            let (value, after) = quoted(after)?;
            labels.push((label.to_owned(), value));
            rest = after;
        }
        rest = rest.strip_prefix('}')?;
    }
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// Reads up to the closing quote, resolving `\\`, `\"` and `\n`; also returns what follows the
/// quote.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, text.get(at + 1..)?)),
            '\\' => match characters.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPOSITION: &str = "# TYPE a counter\n\
        a_total{direction=\"in\",plane=\"spliced\"} 3\n\
        a_total{direction=\"out\",plane=\"spliced\"} 4\n\
        a_total{direction=\"out\",plane=\"rel}\\\"a,y\\\\ed\"} 5 1700000000.5\n\
        up 1\n\
        # EOF\n";

    #[test]
    fn samples_are_summed_by_label() {
        let metrics = Metrics::parse(EXPOSITION).unwrap();
        let cases: [(&[_], _); 4] = [
            (&[], 12.0),
            (&[("plane", "spliced")], 7.0),
            (&[("plane", "spliced"), ("direction", "out")], 4.0),
            (&[("plane", "rel}\"a,y\\ed")], 5.0),
        ];
        for (labels, sum) in cases {
            assert!((metrics.sum("a_total", labels) - sum).abs() < 1e-9, "{labels:?}");
        }
        assert!(metrics.has("up") && !metrics.has("a"));
    }

    #[test]
    fn half_an_exposition_is_refused() {
        assert!(Metrics::parse("up 1\n").is_err());
        assert!(Metrics::parse("up{a=\"b} 1\n# EOF\n").is_err());
    }
}
