//! The names of what can be found.

use crate::doctor::advice::Change;

/// What is wrong, or worth knowing. The names are those of JSON and `docs/doctor.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The connection is refused.
    NotListening,
    /// Nobody answers.
    NoAnswer,
    /// No route, or the like.
    Unreachable,
    /// A name without an address.
    NoAddress,
    /// The port greets without a header and takes one for commands.
    NoProxy,
    /// Only v1 is understood.
    WantsV1,
    /// Only v2 is understood.
    WantsV2,
    /// Only a header without TLVs is understood.
    RefusesTlvs,
    /// The port closes at once on whatever comes from here.
    Untrusted,
    /// Headers with IPv6 addresses are refused.
    Ipv6Off,
    /// Headers with IPv4 addresses are refused.
    Ipv4Off,
    /// The port answers with and without a header.
    HeaderOptional,
    /// A header is believed from others than the injector.
    Forgeable,
    /// Mail to foreign domains is accepted from a client that nobody trusts, or that anybody can be.
    OpenRelay,
    /// Mail to foreign domains is accepted where the header says localhost.
    RelaysForLocalhost,
    /// Whether it is accepted could not be found out.
    RelayUnknown,
    /// Passwords are accepted in clear text where the header says localhost.
    TrustsLocalhost,
    /// Clear text where TLS is meant to be.
    ClearText,
    /// Connected, and no word.
    Mute,
    /// The server will not serve, whatever it is sent.
    TurnedAway,
    /// The header is refused, for a reason that was not found.
    HeaderRefused,
    /// Another protocol.
    OtherProtocol,
    /// The TLS handshake ends with an alert.
    TlsTrouble,
    /// What protocol `plain` cannot show.
    Unproven,
    /// Whether others are believed could not be tried.
    ForgeryUntried,
    /// Behind this host's loopback: every process here can send a header.
    Loopback,
    /// Engine inline leaves the client's address as it is.
    ClientAddressed,
}

impl Verdict {
    /// Its name in JSON and documents.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::NotListening => "not_listening",
            Self::NoAnswer => "no_answer",
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
            Self::TurnedAway => "turned_away",
            Self::HeaderRefused => "header_refused",
            Self::OtherProtocol => "other_protocol",
            Self::TlsTrouble => "tls_trouble",
            Self::Unproven => "unproven",
            Self::ForgeryUntried => "forgery_untried",
            Self::Loopback => "loopback",
            Self::ClientAddressed => "client_addressed",
        }
    }
}

/// One thing found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub verdict: Verdict,
    /// It has to be mended; otherwise it is only worth knowing.
    pub fault: bool,
    /// The same for people.
    pub message: String,
    /// The lines to change; where there is more than one, each says when it applies.
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
