//! The names of the findings.

use crate::doctor::advice::Change;

/// What is wrong, or worth knowing. JSON and `docs/doctor.md` use the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The connection is refused.
    NotListening,
    /// No answer to the SYN.
    NoAnswer,
    /// Every source port of this host is in use towards the address.
    NoSourcePorts,
    /// No route, or the like.
    Unreachable,
    /// A name without an address.
    NoAddress,
    /// The server greets without a header, and reads a header as commands.
    NoProxy,
    /// Only v1 is understood.
    WantsV1,
    /// Only v2 is understood.
    WantsV2,
    /// Only a header without TLVs is understood.
    RefusesTlvs,
    /// The server closes every connection from here at once.
    Untrusted,
    /// Headers with IPv6 addresses are refused.
    Ipv6Off,
    /// Headers with IPv4 addresses are refused.
    Ipv4Off,
    /// The port answers with and without a header.
    HeaderOptional,
    /// The server trusts a header from a host other than the injector.
    Forgeable,
    /// The server accepts mail to foreign domains from a client that it has no reason to trust.
    OpenRelay,
    /// The server accepts mail to foreign domains if the header has the source localhost.
    RelaysForLocalhost,
    /// The doctor could not determine whether the server relays.
    RelayUnknown,
    /// The server accepts passwords in clear text if the header has the source localhost.
    TrustsLocalhost,
    /// The server sends clear text where TLS is expected.
    ClearText,
    /// The server accepts the connection and sends nothing.
    Mute,
    /// The server rejects the connection for a reason other than the header.
    Rejected,
    /// The server rejects the header for an unknown reason.
    HeaderRefused,
    /// The server speaks another protocol.
    OtherProtocol,
    /// The TLS handshake ends with an alert.
    TlsTrouble,
    /// Protocol `plain` cannot show whether the server accepts the header.
    Unproven,
    /// The doctor could not test whether the server trusts headers from other addresses.
    ForgeryUntested,
    /// The backend is reached over loopback: every process on this host can send a header.
    Loopback,
    /// Splice and relay connect from other addresses than the doctor.
    SourceAddresses,
    /// Engine inline connects from other addresses than the doctor.
    InlineSource,
    /// The standard port requires a header too.
    StandardPort,
    /// The doctor could not ask the daemon about its guard.
    GuardUnknown,
    /// The daemon runs without the guard that is configured.
    GuardOff,
    /// The daemon's guard does not drop all packets of banned sources, or has not read a list.
    GuardIncomplete,
}

impl Verdict {
    /// Its name in JSON and documents.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::NotListening => "not_listening",
            Self::NoAnswer => "no_answer",
            Self::NoSourcePorts => "no_source_ports",
            Self::Unreachable => "unreachable",
            Self::NoAddress => "no_address",
            Self::NoProxy => "no_proxy",
            Self::WantsV1 => "wants_v1",
            Self::WantsV2 => "wants_v2",
            Self::RefusesTlvs => "refuses_tlvs",
            Self::Untrusted => "untrusted",
            Self::Ipv6Off => "ipv6_off",
            Self::Ipv4Off => "ipv4_off",
            Self::HeaderOptional => "header_optional",
            Self::Forgeable => "forgeable",
            Self::OpenRelay => "open_relay",
            Self::RelaysForLocalhost => "relays_for_localhost",
            Self::RelayUnknown => "relay_unknown",
            Self::TrustsLocalhost => "trusts_localhost",
            Self::ClearText => "clear_text",
            Self::Mute => "mute",
            Self::Rejected => "rejected",
            Self::HeaderRefused => "header_refused",
            Self::OtherProtocol => "other_protocol",
            Self::TlsTrouble => "tls_trouble",
            Self::Unproven => "unproven",
            Self::ForgeryUntested => "forgery_untested",
            Self::Loopback => "loopback",
            Self::SourceAddresses => "source_addresses",
            Self::InlineSource => "inline_source",
            Self::StandardPort => "standard_port",
            Self::GuardUnknown => "guard_unknown",
            Self::GuardOff => "guard_off",
            Self::GuardIncomplete => "guard_incomplete",
        }
    }
}

/// One thing found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub verdict: Verdict,
    /// Must be repaired; otherwise it is only worth knowing.
    pub fault: bool,
    /// The same for people.
    pub message: String,
    /// The lines to change. If there is more than one change, each states when it applies.
    pub changes: Vec<Change>,
}

impl Finding {
    pub(in crate::doctor) fn fault(
        verdict: Verdict,
        message: impl Into<String>,
        changes: Vec<Change>,
    ) -> Self {
        Self { verdict, fault: true, message: message.into(), changes }
    }

    pub(in crate::doctor) fn note(verdict: Verdict, message: impl Into<String>) -> Self {
        Self { verdict, fault: false, message: message.into(), changes: Vec::new() }
    }
}
