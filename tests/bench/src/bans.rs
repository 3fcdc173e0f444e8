//! Bans of others than the testbed's hosts, as many as wanted.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Of twenty bans one is an IPv4 network and one an IPv6 network; the others are IPv4 addresses.
const OF: u32 = 20;

/// Odd, so that multiplying by it permutes the numbers of a power of two: neighbours in the list
/// are no neighbours in a table.
const SPREAD: u32 = 0x9E37_79B1;

/// The most bans: then a class of them is used up.
pub const MAX: u32 = OF << 16;

/// A list of this many bans, one a line; all are different.
///
/// They are in networks that the testbed has none of: addresses in 11.0.0.0/8, networks in
/// 12.0.0.0/8 (/24) and 2a0a::/48 (/64).
#[must_use]
pub fn list(count: u32) -> String {
    let mut text = String::new();
    for number in 0..count.min(MAX) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}", ban(number));
    }
    text
}

/// The first of so many bans for which `accept` returns something.
pub(crate) fn first<T>(accept: impl Fn(&str) -> Option<T>, count: u32) -> Option<T> {
    (0..count.min(OF)).find_map(|number| accept(&ban(number)))
}

/// An address that a ban of IPv4 is about: the banned one, or one in the banned network.
pub(crate) fn address(ban: &str) -> Option<Ipv4Addr> {
    match ban.split_once('/') {
        None => ban.parse().ok(),
        Some((network, _)) => network.parse().ok().map(|network: Ipv4Addr| (u32::from(network) | 9).into()),
    }
}

/// Addresses of bans from the whole list of so many, at most this many, the last one included.
pub(crate) fn sample(count: u32, most: u32) -> Vec<Ipv4Addr> {
    let step = (count / most.max(1)).max(1);
    let numbers = (0..count).rev().step_by(step as usize);
    numbers.filter_map(|number| address(&ban(number))).collect()
}

fn ban(number: u32) -> String {
    let spread = |bits: u32| (number / OF).wrapping_mul(SPREAD) & ((1 << bits) - 1);
    match number % OF {
        0 => format!("{}/24", Ipv4Addr::from((12 << 24) | (spread(16) << 8))),
        1 => format!("{}/64", Ipv6Addr::from((0x2A0A_u128 << 112) | (u128::from(spread(16)) << 64))),
        _ => Ipv4Addr::from((11 << 24) | (number.wrapping_mul(SPREAD) & 0x00FF_FFFF)).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn all_bans_are_different_and_of_the_three_kinds() {
        let text = list(MAX);
        let all: HashSet<&str> = text.lines().collect();
        assert_eq!(all.len(), MAX as usize);
        let of = |end: &str| all.iter().filter(|ban| ban.ends_with(end)).count();
        assert_eq!((of("/24"), of("/64")), (1 << 16, 1 << 16));
        assert!(all.iter().all(|ban| ["11.", "12.", "2a0a:"].iter().any(|start| ban.starts_with(start))));
        assert_eq!(list(3).lines().count(), 3);
    }

    #[test]
    fn a_sample_is_from_the_whole_list() {
        assert_eq!(address("11.2.3.4"), Some(Ipv4Addr::new(11, 2, 3, 4)));
        assert_eq!(address("12.2.3.0/24"), Some(Ipv4Addr::new(12, 2, 3, 9)));
        assert_eq!(address("2a0a::/64"), None);
        let sampled = sample(100_000, 100);
        assert!((80..=101).contains(&sampled.len()), "{}", sampled.len());
        assert_eq!(Some(sampled[0]), address(&ban(99_999)));
        assert!(sample(0, 100).is_empty());
        assert_eq!(sample(4, 100).len(), 3, "one of them is of IPv6");
    }
}
