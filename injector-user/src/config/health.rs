//! `[listener.health]`: how it is found out whether a backend can be sent connections.

use std::time::Duration;

use super::{
    parse::section::{Section, Spanned, Zero},
    receiver::{ProxyVersion, Receiver},
};
use crate::protocol::Protocol;

/// `[listener.health]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// What is asked of each backend, over and over; `None`: nothing, only connections of clients tell.
    pub check: Option<Check>,
    /// What becomes of a backend that clients' connections do not reach.
    pub ejection: Ejection,
}

/// A question that a backend is asked now and then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// What is spoken; `None`: a connection that is accepted says enough.
    pub protocol: Option<Protocol>,
    /// The port, where it is not the backend's own.
    pub port: Option<u16>,
    /// What stands in front. Always [`CheckHeader::None`] without `protocol`.
    pub header: CheckHeader,
    /// From one check to the next; each pause is up to a tenth longer or shorter.
    pub interval: Duration,
    /// For a whole check.
    pub timeout: Duration,
    /// A backend that is down is up again after so many good checks in a row; at least 1.
    pub rise: u32,
    /// A backend that is up is down after so many bad checks in a row; at least 1.
    pub fall: u32,
}

/// What a check sends first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CheckHeader {
    /// Nothing: the port is one for which the server is not told to expect a header.
    #[default]
    None,
    /// A v2 header with the command LOCAL: the connection is the proxy's own (PROXY protocol, section 2.2).
    Local,
}

/// `eject_after`, `eject_for`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejection {
    /// So many failures to connect in a row; `None`: never.
    pub after: Option<u32>,
    /// For how long it is left out then.
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

/// More in a row would take hours to notice.
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

/// Without checks, what they would be like says nothing.
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
        // smtpd up to 3.10: "fatal: … haproxy …" when the peer is gone after its header.
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
