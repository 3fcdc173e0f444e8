//! Networks, such as `192.0.2.0/24`.

use std::{fmt, net::IpAddr, str::FromStr};

use super::parse::section::{Section, Spanned};

/// An address and how many of its first bits count. The others are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

impl Network {
    /// Its first address.
    #[must_use]
    pub const fn address(self) -> IpAddr {
        self.address
    }

    /// How many of the address's first bits count: up to 32 for IPv4, up to 128 for IPv6.
    #[must_use]
    pub const fn prefix(self) -> u8 {
        self.prefix
    }
}

impl Network {
    /// What counts as one source of connections: an IPv4 address, or the first 64 bits of an IPv6
    /// address.
    #[must_use]
    pub fn of_source(address: IpAddr) -> Self {
        let address = address.to_canonical();
        Self::around(address, if address.is_ipv4() { 32 } else { 64 })
    }

    /// The network of an address and its first `prefix` bits. More bits than the address has count as
    /// all of them.
    #[must_use]
    pub fn around(address: IpAddr, prefix: u8) -> Self {
        let prefix = prefix.min(bits(address));
        Self { address: first_address(address, prefix), prefix }
    }

    /// The network that has only this address.
    #[must_use]
    pub const fn host(address: IpAddr) -> Self {
        Self { address, prefix: bits(address) }
    }

    /// Whether it has one address only.
    #[must_use]
    pub const fn is_host(self) -> bool {
        self.prefix == bits(self.address)
    }

    /// Whether all of `other` is in it.
    #[must_use]
    pub fn contains_network(self, other: Self) -> bool {
        self.prefix <= other.prefix && self.contains(other.address)
    }

    /// Whether one of the networks contains the address. An IPv4 address in IPv6 is that IPv4 address.
    #[must_use]
    pub fn any_contains(networks: &[Self], address: IpAddr) -> bool {
        let address = address.to_canonical();
        networks.iter().any(|network| network.contains(address))
    }

    /// Whether the address is in it. An IPv4 address is not in an IPv6 network.
    #[must_use]
    pub fn contains(self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4() && first_address(address, self.prefix) == self.address
    }
}

/// Reads a list of networks. Each invalid one is reported.
pub(super) fn read(section: &Section<'_>, field: &'static str) -> Vec<Spanned<Network>> {
    parse(section, field, section.strings(field).unwrap_or_default())
}

/// Parses networks of a list. Each invalid one is reported.
pub(super) fn parse(
    section: &Section<'_>,
    field: &'static str,
    texts: Vec<Spanned<&str>>,
) -> Vec<Spanned<Network>> {
    let mut networks = Vec::new();
    for (at, text) in texts {
        match text.parse::<Network>() {
            Ok(network) => networks.push((at, network)),
            Err(advice) => section.report_field(at, field, &format!(" {text:?}: {advice}")),
        }
    }
    networks
}

impl From<IpAddr> for Network {
    fn from(address: IpAddr) -> Self {
        Self::host(address)
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "must be a network, such as \"192.0.2.0/24\" or \"2001:db8::/64\"";
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        if let Some((without, _)) = address.split_once('%') {
            return Err(format!("an address with a zone is of this host's link only: write \"{without}\""));
        }
        let address: IpAddr = address.parse().map_err(|_| EXPECTED.to_owned())?;
        // What is compared with networks is never in this form.
        if let IpAddr::V4(ipv4) = address.to_canonical()
            && address.is_ipv6()
        {
            return Err(format!("an IPv4 address in IPv6: write \"{ipv4}\""));
        }
        let bits = bits(address);
        let prefix = match prefix {
            None => bits,
            Some(prefix) => match prefix.parse() {
                Ok(prefix) if prefix <= bits => prefix,
                _ => return Err(format!("the number of bits must be 0 to {bits}")),
            },
        };
        let first = first_address(address, prefix);
        if first != address {
            return Err(format!(
                "the address has bits beyond the first {prefix}: write \"{first}/{prefix}\""
            ));
        }
        Ok(Self { address, prefix })
    }
}

const fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn first_address(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V4((ip.to_bits() & mask).into())
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V6((ip.to_bits() & mask).into())
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_has_no_bits_beyond_its_prefix() {
        for (text, expected) in [
            ("192.0.2.0/24", Ok("192.0.2.0/24")),
            ("192.0.2.7", Ok("192.0.2.7/32")),
            ("0.0.0.0/0", Ok("0.0.0.0/0")),
            ("2001:db8::/32", Ok("2001:db8::/32")),
            ("::/0", Ok("::/0")),
            ("2001:db8::1", Ok("2001:db8::1/128")),
            ("192.0.2.7/24", Err("write \"192.0.2.0/24\"")),
            ("2001:db8::1/64", Err("write \"2001:db8::/64\"")),
            ("192.0.2.0/33", Err("0 to 32")),
            ("192.0.2.0/", Err("0 to 32")),
            ("2001:DB8::/32", Ok("2001:db8::/32")),
            ("::ffff:192.0.2.7", Err("write \"192.0.2.7\"")),
            ("fe80::1%eth0", Err("write \"fe80::1\"")),
            ("mail/24", Err("must be a network")),
            ("", Err("must be a network")),
        ] {
            match (text.parse::<Network>(), expected) {
                (Ok(network), Ok(expected)) => assert_eq!(network.to_string(), expected),
                (Err(error), Err(expected)) => assert!(error.contains(expected), "{text}: {error}"),
                (got, expected) => panic!("{text}: {got:?}, expected {expected:?}"),
            }
        }
    }
}
