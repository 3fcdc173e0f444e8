//! Durations as Go writes them (`time.Duration.String`, `time.ParseDuration`): `3h59m57.12s`, `-1.5s`.

const UNITS: [(&str, u128); 8] = [
    ("ns", 1),
    // Micro sign and Greek mu.
    ("\u{b5}s", 1_000),
    ("\u{3bc}s", 1_000),
    ("us", 1_000),
    ("ms", 1_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
];

/// The most digits of a number: more are no duration that Go can have.
const MAX_DIGITS: usize = 20;

/// A duration in nanoseconds, `None` if the text is none. A negative one is 0: it is over. A longer one than `u64`
/// holds (584 years) is that.
pub(super) fn parse_ns(text: &str) -> Option<u64> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let (whole, after) = digits(rest);
        let (fraction, after) = after.strip_prefix('.').map_or(("", after), digits);
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let (unit, ns) = UNITS.into_iter().find(|(unit, _)| after.starts_with(unit))?;
        total = total.saturating_add(number(whole)?.saturating_mul(ns));
        let scale = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
        total = total.saturating_add(number(fraction)?.saturating_mul(ns) / scale);
        rest = &after[unit.len()..];
    }
    let ns = u64::try_from(total).unwrap_or(u64::MAX);
    Some(if negative { 0 } else { ns })
}

fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.bytes().take_while(u8::is_ascii_digit).count())
}

fn number(digits: &str) -> Option<u128> {
    match digits.len() {
        0 => Some(0),
        1..=MAX_DIGITS => digits.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_of_the_lapi_are_read() {
        const SECOND: u64 = 1_000_000_000;
        for (text, expected) in [
            ("3h59m57.12s", Some(14_397 * SECOND + 120_000_000)),
            ("4h", Some(14_400 * SECOND)),
            ("1.5h", Some(5_400 * SECOND)),
            ("167h59m45.5s", Some(604_785 * SECOND + 500_000_000)),
            ("300ms", Some(300_000_000)),
            ("12.5us", Some(12_500)),
            ("12\u{b5}s", Some(12_000)),
            ("12\u{3bc}s", Some(12_000)),
            ("7ns", Some(7)),
            (".5s", Some(500_000_000)),
            ("2.s", Some(2 * SECOND)),
            ("0", Some(0)),
            ("+1s", Some(SECOND)),
            ("0s", Some(0)),
            ("-1h2m3s", Some(0)),
            ("99999999999h", Some(u64::MAX)),
            ("", None),
            ("-", None),
            ("5", None),
            ("h", None),
            ("s", None),
            (".s", None),
            ("1d", None),
            ("1h ", None),
            ("1h-2m", None),
            ("1.2.3s", None),
            ("999999999999999999999h", None),
            ("1\u{b5}", None),
        ] {
            assert_eq!(parse_ns(text), expected, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[-+.0-9hmsnuµ]{0,40}|.*") {
            let _ = parse_ns(&text);
        }

        #[test]
        fn what_go_would_write_is_read_back(hours in 0u64..5_000_000, minutes in 0u64..60, ms in 0u64..60_000) {
            let text = format!("{hours}h{minutes}m{}.{:03}s", ms / 1000, ms % 1000);
            prop_assert_eq!(parse_ns(&text), Some(((hours * 60 + minutes) * 60_000 + ms) * 1_000_000));
        }
    }
}
