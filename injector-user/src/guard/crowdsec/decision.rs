//! One decision of the LAPI, and whether it is a ban. Pure.

use std::net::IpAddr;

use serde::Deserialize;

use super::duration;
use crate::config::{Captcha, Network};

/// A decision as the LAPI writes it (`models.Decision`). Fields may be missing or null.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Decision {
    /// The rest of its time, as Go writes durations.
    pub(super) duration: Option<String>,
    /// Who decided: `crowdsec`, `cscli`, `CAPI`, `lists` …
    pub(super) origin: Option<String>,
    /// Why. For `lists`, the name of the list.
    pub(super) scenario: Option<String>,
    /// What `value` is: `Ip`, `Range`, `Country`, `AS` …
    pub(super) scope: Option<String>,
    /// What to do: `ban`, `captcha` …
    #[serde(rename = "type")]
    pub(super) remediation: Option<String>,
    /// The address or network.
    pub(super) value: Option<String>,
    /// Whether it must have no effect.
    pub(super) simulated: Option<bool>,
}

/// What a decision asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remediation {
    Ban,
    Captcha,
}

/// Why a decision is no ban.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ignored {
    /// Its type is unknown, or `captcha` where that is ignored.
    Type,
    /// Its scope is not an address or a range.
    Scope,
    /// It is simulated.
    Simulated,
    /// Its value or duration cannot be read.
    Invalid,
    /// Its network is so large that it must be a mistake.
    TooLarge,
    /// There are more than `guard.max_bans`.
    Full,
}

impl Ignored {
    /// All of them.
    pub(super) const ALL: [Self; 6] =
        [Self::Type, Self::Scope, Self::Simulated, Self::Invalid, Self::TooLarge, Self::Full];

    /// The label `reason` of `injector_guard_crowdsec_ignored_total`.
    #[must_use]
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Type => "type",
            Self::Scope => "scope",
            Self::Simulated => "simulated",
            Self::Invalid => "invalid",
            Self::TooLarge => "too_large",
            Self::Full => "full",
        }
    }
}

/// The largest networks that a feed may ban: 8 bits of IPv4, 19 bits of IPv6. Larger ones than those were never given to
/// one holder.
const MIN_PREFIX_IPV4: u8 = 8;
const MIN_PREFIX_IPV6: u8 = 19;

impl Decision {
    /// Whom it concerns and what it asks for, or why it is ignored.
    pub(super) fn target(&self, captcha: Captcha) -> Result<(Network, Remediation), Ignored> {
        if self.simulated == Some(true) {
            return Err(Ignored::Simulated);
        }
        let is = |field: &Option<String>, word: &str| {
            field.as_deref().is_some_and(|text| text.eq_ignore_ascii_case(word))
        };
        let remediation = if is(&self.remediation, "ban") {
            Remediation::Ban
        } else if is(&self.remediation, "captcha") && captcha == Captcha::Ban {
            Remediation::Captcha
        } else {
            return Err(Ignored::Type);
        };
        if !is(&self.scope, "ip") && !is(&self.scope, "range") {
            return Err(Ignored::Scope);
        }
        let network = self.value.as_deref().and_then(network).ok_or(Ignored::Invalid)?;
        let least = if network.address().is_ipv4() { MIN_PREFIX_IPV4 } else { MIN_PREFIX_IPV6 };
        if network.prefix() < least {
            return Err(Ignored::TooLarge);
        }
        Ok((network, remediation))
    }

    /// How long it has left, in nanoseconds.
    pub(super) fn remaining_ns(&self) -> Result<u64, Ignored> {
        self.duration.as_deref().and_then(duration::parse_ns).ok_or(Ignored::Invalid)
    }
}

/// An address or a range. The LAPI accepts ranges with bits beyond their prefix, and IPv4 addresses written as IPv6.
fn network(text: &str) -> Option<Network> {
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix.parse::<u8>().ok()?)),
        None => (text, None),
    };
    let written: IpAddr = address.parse().ok()?;
    let address = written.to_canonical();
    let mapped = written.is_ipv6() && address.is_ipv4();
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let prefix = match prefix {
        None => bits,
        Some(prefix) if mapped => prefix.checked_sub(96)?,
        Some(prefix) => prefix,
    };
    (prefix <= bits).then(|| Network::around(address, prefix))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decision(scope: &str, remediation: &str, value: &str) -> Decision {
        let text = |text: &str| Some(text.to_owned());
        Decision {
            duration: text("4h"),
            scope: text(scope),
            remediation: text(remediation),
            value: text(value),
            ..Decision::default()
        }
    }

    #[test]
    fn only_bans_of_addresses_and_ranges_count() {
        use Remediation::{Ban, Captcha as Asked};
        for (scope, kind, value, expected) in [
            ("Ip", "ban", "192.0.2.7", Ok(("192.0.2.7/32", Ban))),
            ("ip", "BAN", "192.0.2.7", Ok(("192.0.2.7/32", Ban))),
            ("IP", "captcha", "2001:db8::7", Ok(("2001:db8::7/128", Asked))),
            ("Range", "ban", "192.0.2.0/24", Ok(("192.0.2.0/24", Ban))),
            ("range", "ban", "192.0.2.7/24", Ok(("192.0.2.0/24", Ban))),
            ("Range", "ban", "2001:DB8::1/64", Ok(("2001:db8::/64", Ban))),
            ("Ip", "ban", "::ffff:192.0.2.7", Ok(("192.0.2.7/32", Ban))),
            ("Range", "ban", "::ffff:192.0.2.0/120", Ok(("192.0.2.0/24", Ban))),
            ("Range", "ban", "::ffff:192.0.2.0/64", Err(Ignored::Invalid)),
            ("Country", "ban", "DE", Err(Ignored::Scope)),
            ("AS", "ban", "64496", Err(Ignored::Scope)),
            ("", "ban", "192.0.2.7", Err(Ignored::Scope)),
            ("Ip", "throttle", "192.0.2.7", Err(Ignored::Type)),
            ("Ip", "", "192.0.2.7", Err(Ignored::Type)),
            ("Ip", "ban", "", Err(Ignored::Invalid)),
            ("Ip", "ban", "fe80::1%eth0", Err(Ignored::Invalid)),
            ("Ip", "ban", "192.0.2.256", Err(Ignored::Invalid)),
            ("Range", "ban", "192.0.2.0/33", Err(Ignored::Invalid)),
            ("Range", "ban", "192.0.2.0/-1", Err(Ignored::Invalid)),
            ("Range", "ban", "0.0.0.0/0", Err(Ignored::TooLarge)),
            ("Range", "ban", "10.0.0.0/7", Err(Ignored::TooLarge)),
            ("Range", "ban", "10.0.0.0/8", Ok(("10.0.0.0/8", Ban))),
            ("Range", "ban", "2001::/18", Err(Ignored::TooLarge)),
            ("Range", "ban", "2001::/19", Ok(("2001::/19", Ban))),
        ] {
            let got = decision(scope, kind, value).target(Captcha::Ban);
            let got = got.map(|(network, remediation)| (network.to_string(), remediation));
            let expected = expected.map(|(network, remediation)| (network.to_owned(), remediation));
            assert_eq!(got, expected, "{scope} {kind} {value}");
        }
    }

    #[test]
    fn a_captcha_may_be_ignored_and_a_simulation_always_is() {
        assert_eq!(decision("Ip", "captcha", "192.0.2.7").target(Captcha::Ignore), Err(Ignored::Type));
        assert!(decision("Ip", "ban", "192.0.2.7").target(Captcha::Ignore).is_ok());
        let simulated = Decision { simulated: Some(true), ..decision("Ip", "ban", "192.0.2.7") };
        assert_eq!(simulated.target(Captcha::Ban), Err(Ignored::Simulated));
        let real = Decision { simulated: Some(false), ..decision("Ip", "ban", "192.0.2.7") };
        assert!(real.target(Captcha::Ban).is_ok());
        assert_eq!(Decision::default().target(Captcha::Ban), Err(Ignored::Type));
        assert_eq!(Decision::default().remaining_ns(), Err(Ignored::Invalid));
    }

    proptest! {
        #[test]
        fn no_value_panics(value in "[0-9a-f.:/]{0,45}|.*") {
            let _ = decision("Ip", "ban", &value).target(Captcha::Ban);
        }
    }
}
