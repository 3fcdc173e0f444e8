//! HTTP to the LAPI. Each request has a connection of its own: after ten seconds of silence an old one may be dead, and a
//! renewed key or certificate needs no reload.

use std::{
    fs::File,
    io::{self, BufReader, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ureq::{
    Agent,
    http::{Response, StatusCode},
    tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem},
};

use super::stream::{self, Answer, Rules, StreamError};
use crate::config::CrowdSec;

/// Name and version, as the LAPI shows them (`cscli bouncers list`).
const USER_AGENT: &str = concat!("injector/", env!("CARGO_PKG_VERSION"));
/// The longest key or file of certificates that is read.
const MAX_FILE: u64 = 1 << 20;

/// How long the LAPI may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timeouts {
    pub(super) resolve: Duration,
    /// With the handshake of TLS. As long for each request that has a body, until it is sent.
    pub(super) connect: Duration,
    /// From the request to the head of the answer: the LAPI asks its database first.
    pub(super) head: Duration,
    /// For the rest of the answer.
    pub(super) body: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            resolve: Duration::from_secs(5),
            connect: Duration::from_secs(5),
            head: Duration::from_secs(30),
            body: Duration::from_secs(120),
        }
    }
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error("cannot read {}: {error}", path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("{} must contain one line, the API key that `cscli bouncers add` printed", .0.display())]
    Key(PathBuf),
    #[error("{} contains no certificate in PEM", .0.display())]
    Ca(PathBuf),
    #[error(
        "the LAPI rejected the API key with status {status}: make one with `cscli bouncers add injector`, and write it to {}",
        file.display()
    )]
    Rejected { status: u16, file: PathBuf },
    #[error("the LAPI has nothing at {url} (status {status}): check guard.crowdsec.url")]
    NotFound { url: String, status: u16 },
    #[error("the LAPI answered with status {0}")]
    Status(u16),
    #[error("no answer from the LAPI: {0}")]
    Http(#[from] Box<ureq::Error>),
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// A LAPI, for one request.
#[derive(Debug)]
pub(super) struct Client<'a> {
    settings: &'a CrowdSec,
    agent: Agent,
    key: String,
}

impl<'a> Client<'a> {
    /// Reads the key and the certificates.
    pub(super) fn new(settings: &'a CrowdSec, timeouts: Timeouts) -> Result<Self, RequestError> {
        let key = key(&settings.api_key_file)?;
        let roots = settings.ca_file.as_deref().map_or(Ok(RootCerts::WebPki), roots)?;
        let agent = Agent::config_builder()
            .user_agent(USER_AGENT)
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .http_status_as_error(false)
            // The key is for this LAPI alone.
            .max_redirects(0)
            .proxy(None)
            .timeout_resolve(Some(timeouts.resolve))
            .timeout_connect(Some(timeouts.connect))
            .timeout_send_body(Some(timeouts.connect))
            .timeout_recv_response(Some(timeouts.head))
            .timeout_recv_body(Some(timeouts.body))
            .build()
            .new_agent();
        Ok(Self { settings, agent, key })
    }

    /// Asks for all decisions, or for what changed since the last request of this API key.
    pub(super) fn decisions(self, rules: &Rules) -> Result<Answer, RequestError> {
        let url = self.url("/v1/decisions/stream");
        let mut request = self
            .agent
            .get(&url)
            .header("X-Api-Key", &self.key)
            .query("startup", if rules.full { "true" } else { "false" })
            .query("scopes", "ip,range");
        for (name, words) in [
            ("origins", &self.settings.origins),
            ("scenarios_containing", &self.settings.scenarios_containing),
        ] {
            if !words.is_empty() {
                request = request.query(name, words.join(","));
            }
        }
        let answer = self.check(url, request.call())?;
        // The entries are limited one by one.
        let body = answer.into_body().into_with_config().limit(u64::MAX).reader();
        Ok(stream::read(BufReader::with_capacity(64 << 10, body), rules)?)
    }

    /// Sends usage metrics. `false` if the LAPI does not know them: it is older than 1.6.3.
    pub(super) fn usage(self, payload: &serde_json::Value) -> Result<bool, RequestError> {
        let url = self.url("/v1/usage-metrics");
        let request = self.agent.post(&url).header("X-Api-Key", &self.key).content_type("application/json");
        match self.check(url, request.send(payload.to_string())) {
            Ok(_) => Ok(true),
            Err(RequestError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.settings.url)
    }

    fn check(
        &self,
        url: String,
        answer: Result<Response<ureq::Body>, ureq::Error>,
    ) -> Result<Response<ureq::Body>, RequestError> {
        let answer = answer.map_err(Box::new)?;
        let status = answer.status();
        match status {
            _ if status.is_success() => Ok(answer),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(RequestError::Rejected {
                status: status.as_u16(),
                file: self.settings.api_key_file.clone(),
            }),
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::GONE => {
                Err(RequestError::NotFound { url, status: status.as_u16() })
            }
            _ => Err(RequestError::Status(status.as_u16())),
        }
    }
}

fn read_file(path: &Path) -> Result<Vec<u8>, RequestError> {
    let mut contents = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE).read_to_end(&mut contents))
        .map_err(|error| RequestError::File { path: path.to_owned(), error })?;
    Ok(contents)
}

fn key(path: &Path) -> Result<String, RequestError> {
    let contents = read_file(path)?;
    let key = str::from_utf8(&contents).unwrap_or_default().trim();
    // What a header may contain.
    if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(RequestError::Key(path.to_owned()));
    }
    Ok(key.to_owned())
}

fn roots(path: &Path) -> Result<RootCerts, RequestError> {
    let contents = read_file(path)?;
    let items = parse_pem(&contents).filter_map(Result::ok);
    let certificates: Vec<Certificate<'static>> = items
        .filter_map(|item| match item {
            PemItem::Certificate(certificate) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(RequestError::Ca(path.to_owned()));
    }
    Ok(RootCerts::Specific(Arc::new(certificates)))
}

#[cfg(test)]
mod tests;
