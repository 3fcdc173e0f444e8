//! Addresses as text, with a suggestion for each error.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::section::{Section, Spanned};
use crate::config::destination::Destination;

/// Reads `listen` of an operator's address and reports an invalid value. The error suggests what to
/// write, with `example_port` as the port.
pub(crate) fn listen(
    section: &Section<'_>,
    at: usize,
    text: &str,
    example_port: u16,
) -> Option<Spanned<SocketAddr>> {
    match socket_address(text, Some(example_port)) {
        Ok(address) => Some((at, address)),
        Err(advice) => {
            section.report_field(at, "listen", &format!(" {text:?}: {advice}"));
            None
        }
    }
}

/// Parses an address to bind: `192.0.2.10:25` or `[2001:db8::10]:25`. The error suggests what to
/// write, with `standard_port` as the port.
pub(crate) fn socket_address(text: &str, standard_port: Option<u16>) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok(address);
    }
    let example_port = standard_port.unwrap_or(25);
    if let Ok(ip) = text.trim_matches(['[', ']']).parse::<IpAddr>() {
        return Err(format!(
            "the port is missing: write {:?}",
            SocketAddr::new(ip, example_port).to_string()
        ));
    }
    let (host, port) = text.rsplit_once(':').unwrap_or((text, ""));
    if let Ok(port) = port.parse::<u16>() {
        return Err(match host {
            "" | "*" => format!(
                "the address is missing: write \"0.0.0.0:{port}\" for IPv4, or \"[::]:{port}\" for IPv6 and \
                 IPv4"
            ),
            _ if host.parse::<Ipv6Addr>().is_ok() => {
                format!("an IPv6 address must be in brackets: write \"[{host}]:{port}\"")
            }
            _ => format!(
                "{host:?} is not an IP address: write one of this host, such as \"192.0.2.10:{port}\""
            ),
        });
    }
    Err(format!(
        "must be an IP address and a port, such as \"192.0.2.10:{example_port}\" or \"[2001:db8::10]:{example_port}\""
    ))
}

/// Parses an address to bind from a flag or a variable. An IPv6 address needs no brackets there:
/// Kubernetes puts a node's address without them in front of a port, as in `$(NODE_ADDRESS):9145`.
pub fn parse_flag_address(text: &str) -> Result<SocketAddr, String> {
    let unbracketed = || {
        let (host, port) = text.rsplit_once(':')?;
        Some(SocketAddr::new(host.parse::<Ipv6Addr>().ok()?.into(), port.parse().ok()?))
    };
    unbracketed().map_or_else(|| socket_address(text, Some(9145)), Ok)
}

/// Parses a backend: `mail.internal:2525`, `192.0.2.20:2525` or `[2001:db8::20]:2525`. The error
/// suggests what to write.
pub(crate) fn backend(text: &str) -> Result<Destination, String> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return backend_address(address);
    }
    if let Ok(ip) = text.trim_matches(['[', ']']).parse::<IpAddr>() {
        let address = SocketAddr::new(ip, 2525).to_string();
        return Err(format!(
            "the port is missing: write {address:?} with the port on which it expects the header"
        ));
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        host_name(text)?;
        return Err(format!(
            "the port is missing: write \"{text}:2525\" with the port on which it expects the header"
        ));
    };
    let port: u16 = port.parse().map_err(|_| format!("port {port:?} must be a number from 1 to 65535"))?;
    if host.parse::<Ipv6Addr>().is_ok() {
        return Err(format!("an IPv6 address must be in brackets: write \"[{host}]:{port}\""));
    }
    require_port(port)?;
    Ok(Destination::Name { name: name_to_resolve(host)?, port })
}

/// A host name in lower case, with its final dot. The dot makes it absolute: the resolver's search
/// list is for names without it (resolv.conf(5)), and could answer with another host.
fn name_to_resolve(text: &str) -> Result<String, String> {
    let name = host_name(text)?;
    Ok(if text.ends_with('.') { format!("{name}.") } else { name })
}

fn backend_address(address: SocketAddr) -> Result<Destination, String> {
    require_port(address.port())?;
    if address.ip().is_unspecified() {
        return Err(format!(
            "{} cannot be used as a destination: write the address or name of the mail server",
            address.ip()
        ));
    }
    if matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0) {
        return Err("link-local addresses with a zone are not supported: use a global address".to_owned());
    }
    Ok(Destination::Address(address))
}

fn require_port(port: u16) -> Result<(), String> {
    if port == 0 { Err("port must be 1 to 65535".to_owned()) } else { Ok(()) }
}

/// Checks a host name (RFC 1123, section 2.1; underscores are allowed, as Docker uses them).
/// Returns it in lower case without the final dot.
pub(crate) fn host_name(text: &str) -> Result<String, String> {
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    let label_ok = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    // RFC 1035, section 2.3.4: 255 bytes on the wire leave 253 in text.
    if name.len() > 253 || !name.split('.').all(label_ok) {
        return Err(format!("{text:?} is not a host name"));
    }
    // "192.0.2" or "192.0.2.300": no top-level domain is numeric, so this is a mistyped address.
    if name.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit())) {
        return Err(format!("{text:?} is neither a host name nor an IP address"));
    }
    Ok(name)
}

/// Whether a socket bound to `bound` accepts connections to `address`. `[::]` includes IPv4, and an
/// IPv4-mapped address is that IPv4 address. Port 0 stands for a port that no other socket has.
pub(crate) fn accepts(bound: SocketAddr, address: SocketAddr) -> bool {
    if bound.port() != address.port() || bound.port() == 0 {
        return false;
    }
    let (bound, address) = (bound.ip().to_canonical(), address.ip().to_canonical());
    bound == address || covers(bound, address)
}

/// The addresses to which a socket bound to `bound` accepts connections, the unspecified one of IPv4 for
/// itself. None with port 0: the kernel chooses one.
pub(crate) fn accepted(bound: SocketAddr) -> impl Iterator<Item = SocketAddr> {
    let of_both = bound.is_ipv6() && bound.ip().is_unspecified();
    let ipv4 = of_both.then(|| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), bound.port()));
    [Some(bound), ipv4].into_iter().flatten().filter(|address| address.port() != 0)
}

/// Whether one of the two addresses accepts connections to the other.
pub(crate) fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    accepts(one, other) || accepts(other, one)
}

fn covers(wildcard: IpAddr, other: IpAddr) -> bool {
    wildcard.is_unspecified() && (wildcard.is_ipv6() || other.is_ipv4())
}

/// Whether a connection to the backend certainly reaches the listener bound to `bind`.
pub(crate) fn is_loop(bind: SocketAddr, destination: &Destination) -> bool {
    if destination.port() != Some(bind.port()) {
        return false;
    }
    let bind = bind.ip().to_canonical();
    match destination {
        Destination::Address(address) => {
            let ip = address.ip().to_canonical();
            ip == bind || (ip.is_loopback() && covers(bind, ip))
        }
        Destination::Name { name, .. } => {
            name.strip_suffix('.').unwrap_or(name) == "localhost"
                && (bind.is_loopback() || bind.is_unspecified())
        }
        // An endpoint may be this host's; the Service's owner answers for it.
        Destination::Service { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_bind_address_is_answered_with_what_to_write() {
        for (text, expected) in [
            ("foo", "must be an IP address and a port, such as \"192.0.2.10:25\" or \"[2001:db8::10]:25\""),
            (
                "192.0.2.10:port",
                "must be an IP address and a port, such as \"192.0.2.10:25\" or \"[2001:db8::10]:25\"",
            ),
            ("192.0.2.10", "the port is missing: write \"192.0.2.10:25\""),
            ("[2001:db8::10]", "the port is missing: write \"[2001:db8::10]:25\""),
            (
                ":25",
                "the address is missing: write \"0.0.0.0:25\" for IPv4, or \"[::]:25\" for IPv6 and IPv4",
            ),
            (
                "*:25",
                "the address is missing: write \"0.0.0.0:25\" for IPv4, or \"[::]:25\" for IPv6 and IPv4",
            ),
            (
                "mx.example:25",
                "\"mx.example\" is not an IP address: write one of this host, such as \"192.0.2.10:25\"",
            ),
            // The last group is not a hexadecimal number of four digits, so it is the port.
            ("2001:db8::10:65535", "an IPv6 address must be in brackets: write \"[2001:db8::10]:65535\""),
        ] {
            assert_eq!(socket_address(text, Some(25)), Err(expected.to_owned()), "{text}");
        }
    }

    #[test]
    fn an_address_of_either_family_stands_before_a_port() {
        for (node, bound) in [
            ("192.0.2.1", "192.0.2.1:9145"),
            ("fd24::1", "[fd24::1]:9145"),
            ("2001:db8:1:2:3:4:5:6", "[2001:db8:1:2:3:4:5:6]:9145"),
            ("[fd24::1]", "[fd24::1]:9145"),
        ] {
            let address = parse_flag_address(&format!("{node}:9145"));
            assert_eq!(address.map(|it| it.to_string()), Ok(bound.to_owned()), "{node}");
        }
        for (text, advice) in [
            ("2001:db8::9145", "the port is missing: write \"[2001:db8::9145]:9145\""),
            ("fd24::1:99999", "must be an IP address and a port"),
            ("9145", "must be an IP address and a port"),
            (":9145", "the address is missing"),
        ] {
            let error = parse_flag_address(text).unwrap_err();
            assert!(error.starts_with(advice), "{text}: {error}");
        }
    }

    #[test]
    fn a_backends_name_keeps_its_final_dot() {
        for (text, name) in [
            ("Mail.Internal.:2525", "mail.internal."),
            ("mail.internal:2525", "mail.internal"),
            ("mail:2525", "mail"),
            ("mail.:2525", "mail."),
        ] {
            assert_eq!(backend(text), Ok(Destination::Name { name: name.to_owned(), port: 2525 }), "{text}");
        }
        assert_eq!(backend(".:2525"), Err("\".\" is not a host name".to_owned()));
        assert_eq!(backend("mail..:2525"), Err("\"mail..\" is not a host name".to_owned()));
        // A name in a TLV or in TLS has none (RFC 6066, section 3).
        assert_eq!(host_name("Mail.Internal."), Ok("mail.internal".to_owned()));
    }

    #[test]
    fn a_wrong_backend_is_answered_with_what_to_write() {
        for (text, expected) in [
            (
                "mail.internal",
                "the port is missing: write \"mail.internal:2525\" with the port on which it expects the header",
            ),
            (
                "192.0.2.20",
                "the port is missing: write \"192.0.2.20:2525\" with the port on which it expects the header",
            ),
            (
                "2001:db8::20",
                "the port is missing: write \"[2001:db8::20]:2525\" with the port on which it expects the header",
            ),
            ("2001:db8::20:65535", "an IPv6 address must be in brackets: write \"[2001:db8::20]:65535\""),
            ("mail.internal:0", "port must be 1 to 65535"),
            ("192.0.2.20:0", "port must be 1 to 65535"),
            ("mail.internal:smtp", "port \"smtp\" must be a number from 1 to 65535"),
            ("mail.internal:70000", "port \"70000\" must be a number from 1 to 65535"),
            ("mail_.-x:25", "\"mail_.-x\" is not a host name"),
            ("ma il:25", "\"ma il\" is not a host name"),
            (":2525", "\"\" is not a host name"),
            ("192.0.2:25", "\"192.0.2\" is neither a host name nor an IP address"),
            (
                "0.0.0.0:2525",
                "0.0.0.0 cannot be used as a destination: write the address or name of the mail server",
            ),
            ("[::]:2525", ":: cannot be used as a destination: write the address or name of the mail server"),
            ("[fe80::1%2]:2525", "link-local addresses with a zone are not supported: use a global address"),
        ] {
            assert_eq!(backend(text), Err(expected.to_owned()), "{text}");
        }
    }
}
