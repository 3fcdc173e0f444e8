//! `[guard.crowdsec]`

use std::{path::PathBuf, time::Duration};

use super::parse::section::{Section, Zero};

/// The least time between two requests: the LAPI updates its database for each.
const MIN_INTERVAL: Duration = Duration::from_secs(1);

/// `[guard.crowdsec]`: the LAPI whose decisions are bans.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrowdSec {
    /// The LAPI: scheme, host, port and path, without a final slash.
    pub url: String,
    /// A file with the API key of this bouncer. It is read before each request.
    pub api_key_file: PathBuf,
    /// A file with the certificate authorities (PEM) that sign the LAPI's certificate. `None`: those that browsers trust.
    pub ca_file: Option<PathBuf>,
    /// From one request to the next.
    pub interval: Duration,
    /// Whether a decision of type `captcha` is a ban.
    pub captcha: Captcha,
    /// Only decisions of these origins. Empty: of all.
    pub origins: Vec<String>,
    /// Only decisions whose scenario contains one of these words. Empty: all.
    pub scenarios_containing: Vec<String>,
    /// Whether the LAPI gets usage metrics.
    pub usage_metrics: bool,
}

/// What becomes of a decision of type `captcha`, which mail protocols do not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Captcha {
    /// A ban, as in other bouncers of packets and connections.
    #[default]
    Ban,
    /// Nothing.
    Ignore,
}

impl CrowdSec {
    /// Whether the key crosses a network in clear text.
    #[must_use]
    pub fn sends_key_in_clear(&self) -> bool {
        let Some(rest) = self.url.strip_prefix("http://") else { return false };
        let host = rest.split('/').next().unwrap_or_default();
        let is_local = ["127.", "[::1]", "localhost"].iter().any(|local| host.starts_with(local));
        !is_local
    }
}

pub(super) fn read(section: Section<'_>) -> Option<CrowdSec> {
    let url = section.required("url", url);
    let api_key_file = section.required("api_key_file", Section::path);
    let ca_file = section.path("ca_file");
    if let (Some(_), Some(url)) = (&ca_file, &url)
        && url.starts_with("http://")
    {
        section.report_field(section.at(), "ca_file", " needs a url that begins with \"https://\"");
    }
    let interval = section.duration("interval", Zero::Rejected);
    if let Some((at, interval)) = interval
        && interval < MIN_INTERVAL
    {
        section.report_field(at, "interval", ": must be at least \"1s\"");
    }
    let captcha = section.choice("captcha", &[("ban", Captcha::Ban), ("ignore", Captcha::Ignore)]);
    let origins = words(&section, "origins");
    let scenarios_containing = words(&section, "scenarios_containing");
    let usage_metrics = section.flag("usage_metrics").is_none_or(|(_, wanted)| wanted);
    section.finish();
    Some(CrowdSec {
        url: url?,
        api_key_file: api_key_file?,
        ca_file,
        interval: interval.map_or(Duration::from_secs(10), |(_, interval)| interval),
        captcha: captcha.unwrap_or_default(),
        origins,
        scenarios_containing,
        usage_metrics,
    })
}

fn url(section: &Section<'_>, field: &'static str) -> Option<String> {
    let (at, text) = section.string(field)?;
    match check_url(text) {
        Ok(url) => Some(url),
        Err(advice) => {
            section.report_field(at, field, &format!(" {text:?}: {advice}"));
            None
        }
    }
}

/// Checks a URL of scheme, host, port and path, and removes its final slashes.
fn check_url(text: &str) -> Result<String, &'static str> {
    const EXPECTED: &str = "must be the address of the LAPI, such as \"http://127.0.0.1:8080\"";
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://")).ok_or(EXPECTED)?;
    let host = rest.split('/').next().unwrap_or_default();
    if host.is_empty()
        || !text.bytes().all(|byte| byte.is_ascii_graphic())
        || text.contains(['?', '#', '"', '\\'])
    {
        return Err(EXPECTED);
    }
    if host.contains('@') {
        return Err("must have no user name: the API key stands in api_key_file");
    }
    if rest.trim_end_matches('/').ends_with("/v1") {
        return Err("must not end in \"/v1\", which every request adds");
    }
    Ok(text.trim_end_matches('/').to_owned())
}

/// Words that go into one parameter of the LAPI, which separates them by commas.
fn words(section: &Section<'_>, field: &'static str) -> Vec<String> {
    let mut words = Vec::new();
    for (at, word) in section.strings(field).unwrap_or_default() {
        if word.trim().is_empty() || word.contains(',') {
            section.report_field(at, field, &format!(" {word:?}: must be one word, without a comma"));
        } else {
            words.push(word.to_owned());
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_a_scheme_a_host_and_no_key() {
        for (text, expected) in [
            ("http://127.0.0.1:8080", Ok("http://127.0.0.1:8080")),
            ("http://127.0.0.1:8080/", Ok("http://127.0.0.1:8080")),
            ("https://lapi.example/crowdsec/", Ok("https://lapi.example/crowdsec")),
            ("https://[2001:db8::1]:8080", Ok("https://[2001:db8::1]:8080")),
            ("127.0.0.1:8080", Err("must be the address of the LAPI")),
            ("ftp://lapi.example", Err("must be the address of the LAPI")),
            ("http://", Err("must be the address of the LAPI")),
            ("http:///v1", Err("must be the address of the LAPI")),
            ("http://lapi.example/?a=b", Err("must be the address of the LAPI")),
            ("http://lapi .example", Err("must be the address of the LAPI")),
            ("http://key@lapi.example", Err("must have no user name")),
            ("http://lapi.example/v1/", Err("must not end in \"/v1\"")),
        ] {
            match (check_url(text), expected) {
                (Ok(url), Ok(expected)) => assert_eq!(url, expected),
                (Err(error), Err(expected)) => assert!(error.starts_with(expected), "{text}: {error}"),
                (got, expected) => panic!("{text}: {got:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn only_http_to_another_host_sends_the_key_in_clear() {
        let crowdsec = |url: &str| CrowdSec {
            url: url.to_owned(),
            api_key_file: PathBuf::from("/k"),
            ca_file: None,
            interval: MIN_INTERVAL,
            captcha: Captcha::Ban,
            origins: Vec::new(),
            scenarios_containing: Vec::new(),
            usage_metrics: true,
        };
        for url in ["http://127.0.0.1:8080", "http://[::1]:8080", "http://localhost", "https://lapi.example"]
        {
            assert!(!crowdsec(url).sends_key_in_clear(), "{url}");
        }
        for url in ["http://10.0.0.1:8080", "http://lapi.example/x", "http://[2001:db8::1]"] {
            assert!(crowdsec(url).sends_key_in_clear(), "{url}");
        }
    }
}
