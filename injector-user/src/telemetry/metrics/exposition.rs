//! The formats of `/metrics`, and which of them a scraper gets.

/// A format of `/metrics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// The text format of Prometheus, version 0.0.4, which every scraper reads.
    Text,
    /// The text format of OpenMetrics 1.0.
    OpenMetrics,
}

impl Format {
    /// The value of Content-Type.
    pub(super) const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// The format for a scraper with these values of Accept (RFC 9110, section 12.5.1): OpenMetrics
    /// if it is named and wanted at least as much as text, else text. A wildcard does not name it:
    /// not every reader of text knows OpenMetrics.
    pub(super) fn negotiate<'a>(accept: impl IntoIterator<Item = &'a str>) -> Self {
        let ranges: Vec<_> =
            accept.into_iter().flat_map(|value| value.split(',')).filter_map(MediaRange::parse).collect();
        let best = |name: &str| {
            let matching = ranges.iter().filter(|range| range.name.eq_ignore_ascii_case(name));
            matching.filter(|range| range.is_readable()).map(|range| range.quality).max()
        };
        let text = ["text/plain", "text/*", "*/*"].into_iter().find_map(best).unwrap_or(0);
        match best("application/openmetrics-text") {
            Some(openmetrics) if openmetrics > 0 && openmetrics >= text => Self::OpenMetrics,
            _ => Self::Text,
        }
    }
}

/// One item of Accept.
#[derive(Clone, Copy, Debug)]
struct MediaRange<'a> {
    name: &'a str,
    version: Option<&'a str>,
    /// The weight, in thousandths.
    quality: u16,
}

impl<'a> MediaRange<'a> {
    /// `None` if it has no name or its weight is not a number.
    fn parse(item: &'a str) -> Option<Self> {
        let mut parts = item.split(';').map(str::trim);
        let name = parts.next().filter(|name| !name.is_empty())?;
        let mut range = Self { name, version: None, quality: 1000 };
        for (key, value) in parts.filter_map(|parameter| parameter.split_once('=')) {
            let (key, value) = (key.trim(), value.trim().trim_matches('"'));
            if key.eq_ignore_ascii_case("q") {
                range.quality = thousandths(value)?;
            } else if key.eq_ignore_ascii_case("version") {
                range.version = Some(value);
            }
        }
        Some(range)
    }

    /// Whether what is served is of the version that it asks for. All text is readable as 0.0.4.
    fn is_readable(&self) -> bool {
        self.name.starts_with("text/") || self.version.is_none_or(|version| version.starts_with("1."))
    }
}

/// A weight of 0 to 1 with at most three decimals (RFC 9110, section 12.4.2).
fn thousandths(weight: &str) -> Option<u16> {
    let (whole, decimals) = weight.split_once('.').unwrap_or((weight, ""));
    let digits = decimals.len() <= 3 && decimals.bytes().all(|byte| byte.is_ascii_digit());
    let part: u16 = format!("{decimals:0<3}").parse().ok().filter(|_| digits)?;
    match (whole, part) {
        ("0", part) => Some(part),
        ("1", 0) => Some(1000),
        _ => None,
    }
}

/// OpenMetrics text as text format 0.0.4. The samples are the same. The differences: families of
/// counters and of information have the name of their samples, and there are no units and no end.
pub(super) fn text_0_0_4(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let mut help = None;
    for line in openmetrics.lines() {
        if let Some(described) = line.strip_prefix("# HELP ") {
            help = described.split_once(' ').map(|(_, described)| described);
        } else if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|typed| typed.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", kind),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                kind => ("", kind),
            };
            if let Some(help) = help.take() {
                text.extend(["# HELP ", name, suffix, " ", help, "\n"]);
            }
            text.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
        } else if !line.starts_with('#') {
            text.extend([line, "\n"]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::telemetry::metrics::tests::complete;

    #[test]
    fn a_scraper_gets_the_format_that_it_asks_for() {
        let (text, openmetrics) = (Format::Text, Format::OpenMetrics);
        for (accept, expected) in [
            ("", text),
            ("*/*", text),
            ("application/*", text),
            ("text/html, */*;q=0.1", text),
            ("application/json", text),
            ("text/plain", text),
            ("text/plain;version=0.0.4", text),
            ("application/openmetrics-text", openmetrics),
            ("Application/OpenMetrics-Text; version=\"1.0.0\"; charset=utf-8", openmetrics),
            ("application/openmetrics-text;version=0.0.1", text),
            ("application/openmetrics-text;version=2.0.0", text),
            ("application/openmetrics-text;q=0", text),
            ("application/openmetrics-text;q=0.2,text/plain;q=0.3", text),
            ("application/openmetrics-text;q=0.2,text/*;q=0.3", text),
            ("application/openmetrics-text;q=0.2,*/*;q=0.3", text),
            ("application/openmetrics-text;q=0.3,text/plain;q=0.3", openmetrics),
            ("text/plain;q=0.1,text/*;q=0.9,application/openmetrics-text;q=0.5", openmetrics),
            ("application/openmetrics-text;q=many,text/plain;q=0.001", text),
            // Prometheus 2.
            (
                "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                openmetrics,
            ),
            // Prometheus 3 with the text format first.
            (
                "text/plain;version=0.0.4;q=0.6,application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,*/*;q=0.2",
                text,
            ),
        ] {
            assert_eq!(Format::negotiate([accept]), expected, "{accept}");
        }
        // A header may be repeated (RFC 9110, section 5.3).
        let accept = ["text/plain;q=0.3", "application/openmetrics-text;q=0.5"];
        assert_eq!(Format::negotiate(accept), openmetrics);
        assert_eq!(Format::negotiate([]), text);
    }

    #[test]
    fn weights_have_three_decimals() {
        for (weight, expected) in [
            ("0", Some(0)),
            ("1", Some(1000)),
            ("0.5", Some(500)),
            ("0.05", Some(50)),
            ("0.123", Some(123)),
            ("1.000", Some(1000)),
            ("1.001", None),
            ("0.1234", None),
            ("2", None),
            ("-1", None),
            ("0.+1", None),
            ("", None),
        ] {
            assert_eq!(thousandths(weight), expected, "{weight}");
        }
    }

    /// The faults that a reader finds which knows only text format 0.0.4.
    fn faults(text: &str) -> Vec<String> {
        let (mut faults, mut types) = (Vec::new(), BTreeMap::new());
        for line in text.lines() {
            if let Some(comment) = line.strip_prefix("# ") {
                let words: Vec<_> = comment.splitn(3, ' ').collect();
                match words[..] {
                    ["TYPE", name, kind] => {
                        if !["counter", "gauge", "histogram", "summary", "untyped"].contains(&kind) {
                            faults.push(format!("type {kind}"));
                        }
                        types.insert(name, kind);
                    }
                    ["HELP", ..] => {}
                    _ => faults.push(line.to_owned()),
                }
                continue;
            }
            let name = line.split(['{', ' ']).next().unwrap_or_default();
            let family = types.keys().copied().find(|family| *family == name);
            let parts = ["_bucket", "_sum", "_count"];
            let whole = parts.iter().find_map(|part| name.strip_suffix(part)).unwrap_or(name);
            if family.is_none() && types.get(whole) != Some(&"histogram") {
                faults.push(format!("sample of no family: {name}"));
            }
        }
        faults
    }

    #[test]
    fn text_has_the_same_samples_and_only_what_0_0_4_knows() {
        let openmetrics = complete().0.encode().unwrap();
        assert!(!faults(&openmetrics).is_empty());
        let text = text_0_0_4(&openmetrics);
        assert_eq!(faults(&text), Vec::<String>::new(), "{text}");
        let samples = |text: &str| -> Vec<String> {
            text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
        };
        assert_eq!(samples(&text), samples(&openmetrics));
        let types = |text: &str| text.lines().filter(|line| line.starts_with("# TYPE ")).count();
        assert_eq!(types(&text), types(&openmetrics));
        for line in [
            "# TYPE injector_connections_accepted_total counter\n",
            "# HELP injector_connections_accepted_total ",
            "# TYPE injector_build_info gauge\n",
            "# TYPE injector_header_to_first_byte_seconds histogram\n",
        ] {
            assert!(text.contains(line), "no {line} in {text}");
        }
    }
}
