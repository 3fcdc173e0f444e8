//! `[listener.health]`: health checks, and ejection after failed connections.

use std::time::Duration;

use super::{
    parse::section::{Section, Spanned, Zero},
    receiver::{ProxyVersion, Receiver},
};
use crate::protocol::Protocol;

/// `[listener.health]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// The active check of each backend. `None`: only the connections of clients show a failure.
    pub check: Option<Check>,
    /// What happens to a backend after failed connections.
    pub ejection: Ejection,
}

/// An active health check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// The protocol of the exchange. `None`: success means that the connection was accepted.
    pub protocol: Option<Protocol>,
    /// The port, if it is not the backend's own.
    pub port: Option<u16>,
    /// The header that the check sends. Always [`CheckHeader::None`] without `protocol`.
    pub header: CheckHeader,
    /// Time between the starts of two checks. Each interval varies by up to a tenth.
    pub interval: Duration,
    /// Time for a whole check.
    pub timeout: Duration,
    /// A backend that is down is up after this many successful checks in a row; at least 1.
    pub rise: u32,
    /// A backend that is up is down after this many failed checks in a row; at least 1.
    pub fall: u32,
}

impl Check {
    /// One check, within this time: whether the backend accepts a connection.
    #[must_use]
    pub const fn connecting(timeout: Duration) -> Self {
        Self {
            protocol: None,
            port: None,
            header: CheckHeader::None,
            interval: timeout,
            timeout,
            rise: 1,
            fall: 1,
        }
    }
}

/// The header that a check sends first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CheckHeader {
    /// None: the server does not expect a header on the checked port.
    #[default]
    None,
    /// A v2 header with command LOCAL: a connection of the proxy itself (PROXY protocol, section
    /// 2.2).
    Local,
}

/// `eject_after`, `eject_for`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejection {
    /// Eject after this many failed connections in a row. `None`: never.
    pub after: Option<u32>,
    /// How long an ejected backend gets no connections.
    pub time: Duration,
}

impl Default for Health {
    fn default() -> Self {
        Self { check: None, ejection: Ejection { after: Some(3), time: Duration::from_secs(30) } }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum CheckKind {
    None,
    Tcp,
    Mail,
}

impl CheckKind {
    const CHOICES: [(&'static str, Self); 3] =
        [("none", Self::None), ("tcp", Self::Tcp), ("mail", Self::Mail)];
}

/// With more in a row, a failure would be noticed only after hours.
const MAX_CONSECUTIVE: u64 = 100;

pub(super) fn read(section: Option<Section<'_>>, protocol: Protocol, receiver: &Receiver) -> Health {
    let mut health = Health::default();
    let Some(section) = section else { return health };
    let kind = section.choice("check", &CheckKind::CHOICES).unwrap_or(CheckKind::None);
    let port = section.integer("port", 1, u64::from(u16::MAX));
    let protocol_field = section.string("protocol").and_then(|text| {
        let all = Protocol::ALL.map(|protocol| (protocol.name(), protocol));
        Some((text.0, section.choose("protocol", text, &all)?))
    });
    let header = section.string("header").and_then(|text| {
        let all = [("none", CheckHeader::None), ("local", CheckHeader::Local)];
        Some((text.0, section.choose("header", text, &all)?))
    });
    let check = Check {
        protocol: (kind == CheckKind::Mail)
            .then(|| protocol_field.map_or(protocol, |(_, protocol)| protocol)),
        port: port.and_then(|(_, port)| u16::try_from(port).ok()),
        header: header.map(|(_, header)| header).unwrap_or_default(),
        interval: section
            .duration("interval", Zero::Rejected)
            .map_or(Duration::from_secs(10), |(_, given)| given),
        timeout: section
            .duration("timeout", Zero::Rejected)
            .map_or(Duration::from_secs(5), |(_, given)| given),
        rise: consecutive(&section, "rise", 1).map_or(2, |(_, given)| given),
        fall: consecutive(&section, "fall", 1).map_or(3, |(_, given)| given),
    };
    if let Some((_, after)) = consecutive(&section, "eject_after", 0) {
        health.ejection.after = (after > 0).then_some(after);
    }
    if let Some((_, time)) = section.duration("eject_for", Zero::Rejected) {
        health.ejection.time = time;
    }
    match kind {
        CheckKind::None => reject_without_check(&section),
        CheckKind::Tcp => validate_tcp(&section, protocol_field, header),
        CheckKind::Mail => validate_mail(&section, &check, protocol_field, header, receiver),
    }
    health.check = (kind != CheckKind::None).then_some(check);
    section.finish();
    health
}

fn consecutive(section: &Section<'_>, field: &'static str, min: u64) -> Option<Spanned<u32>> {
    let (at, given) = section.integer(field, min, MAX_CONSECUTIVE)?;
    Some((at, u32::try_from(given).ok()?))
}

impl Check {
    /// Whether the check sends a header to the port that also gets the clients' headers.
    #[must_use]
    pub fn tries_the_header(&self) -> bool {
        self.header == CheckHeader::Local && self.port.is_none()
    }
}

/// Without a check, its settings have no effect.
fn reject_without_check(section: &Section<'_>) {
    for field in ["port", "protocol", "header", "interval", "timeout", "rise", "fall"] {
        if section.has(field) {
            let what = ": has no effect without check = \"tcp\" or check = \"mail\"";
            section.report_field(section.at(), field, what);
        }
    }
}

fn validate_tcp(
    section: &Section<'_>,
    protocol_field: Option<Spanned<Protocol>>,
    header: Option<Spanned<CheckHeader>>,
) {
    if let Some((at, _)) = protocol_field {
        section.report_field(at, "protocol", ": has no effect with check = \"tcp\"");
    }
    if let Some((at, CheckHeader::Local)) = header {
        // smtpd up to 3.10 logs "fatal: … haproxy …" if the peer closes right after the header.
        let what = ": closing right after a header terminates Postfix's smtpd: use check = \"mail\"";
        section.report_field(at, "header", what);
    }
}

fn validate_mail(
    section: &Section<'_>,
    check: &Check,
    protocol_field: Option<Spanned<Protocol>>,
    header: Option<Spanned<CheckHeader>>,
    receiver: &Receiver,
) {
    if check.protocol == Some(Protocol::Plain) {
        let at = protocol_field.map_or(section.at(), |(at, _)| at);
        let what = " \"plain\": check = \"mail\" needs a protocol whose server sends a greeting: use check = \"tcp\"";
        section.report_field(at, "protocol", what);
    }
    if let (Some((at, CheckHeader::Local)), ProxyVersion::V1) = (header, receiver.version) {
        section.report_field(
            at,
            "header",
            " \"local\": PROXY version 1 has no LOCAL command: set health.port to a port that does not expect a header",
        );
    }
    if check.port.is_none() && check.header == CheckHeader::None {
        let what = " is missing: the backend's own demands a header. Give one that does not (such as 25), or header = \
                    \"local\" where the server takes that";
        section.report_field(section.at(), "port", what);
    }
}
