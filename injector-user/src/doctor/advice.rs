//! The line to change, in the syntax of the server's own configuration.

use std::net::{IpAddr, SocketAddr};

use super::{
    observation::{Family, Target},
    server::Server,
};
use crate::protocol::Protocol;

/// What to change, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// File and place in it.
    pub place: String,
    /// The lines as they should be.
    pub lines: Vec<String>,
}

impl Change {
    fn new(place: impl Into<String>, lines: &[&str]) -> Self {
        Self { place: place.into(), lines: lines.iter().map(|line| (*line).to_owned()).collect() }
    }

    /// A field of the listener, in the injector's own configuration.
    pub(super) fn own(target: &Target, table: &str, line: &str) -> Self {
        Self::new(format!("the injector's configuration, listener {:?}, {table}", target.listener), &[line])
    }
}

const POSTSCREEN_SETTING: &str = "  -o postscreen_upstream_proxy_protocol=haproxy";
const SMTPD_SETTING: &str = "  -o smtpd_upstream_proxy_protocol=haproxy";

/// Makes the server expect a header: on this port or, if other clients use this port, on one that
/// only the injector uses.
pub(super) fn expect_header(target: &Target, server: Server) -> Vec<Change> {
    match target.protocol.alternative_port() {
        Some(port) if target.is_on_standard_port() && !server.is_by_sender() => {
            let host = target.backend.rsplit_once(':').map_or(target.backend.as_str(), |(host, _)| host);
            let backend = format!("{host}:{port}");
            let own = Change::own(target, "backends", &format!("backends = [\"{backend}\"]"));
            let address = SocketAddr::new(target.address.ip(), port);
            let moved = Target { address, backend, ..target.clone() };
            let mut changes = expect_header_here(&moved, server);
            changes.push(own);
            changes
        }
        _ => expect_header_here(target, server),
    }
}

fn expect_header_here(target: &Target, server: Server) -> Vec<Change> {
    let port = target.address.port();
    let postscreen = || {
        Change::new(
            format!(
                "Postfix, master.cf: if postscreen has port {port} (it ignores smtpd_upstream_proxy_protocol)"
            ),
            &[&format!("{port} inet n - n - 1 postscreen"), POSTSCREEN_SETTING],
        )
    };
    let smtpd = || {
        let wrapper = "  -o smtpd_tls_wrappermode=yes";
        let service = format!("{port} inet n - n - - smtpd");
        let mut lines = vec![service.as_str(), SMTPD_SETTING];
        if target.is_tls() {
            lines.push(wrapper);
        }
        Change::new(
            format!(
                "Postfix, master.cf: if smtpd has port {port} (it ignores postscreen_upstream_proxy_protocol)"
            ),
            &lines,
        )
    };
    match server {
        Server::Postscreen => vec![postscreen()],
        Server::Smtpd => vec![smtpd()],
        Server::Postfix => vec![postscreen(), smtpd()],
        Server::Dovecot => vec![dovecot_listener(target), trust_injector(target)],
        Server::Unknown => match target.protocol {
            Protocol::Smtp => vec![postscreen(), smtpd()],
            Protocol::Submission | Protocol::Submissions => vec![smtpd()],
            Protocol::Plain => Vec::new(),
            _ => vec![dovecot_listener(target), trust_injector(target)],
        },
        Server::Exim => {
            // By default `:` separates the items of an Exim list, those of an IPv6 address too.
            vec![Change::new(
                "Exim, main configuration, in addition to the addresses already listed, after another ;",
                &[&format!("hosts_proxy = <; {}", source(target))],
            )]
        }
        Server::OpenSmtpd => {
            vec![Change::new("OpenSMTPD, smtpd.conf", &[&format!("listen on … port {port} proxy-v2")])]
        }
        Server::Stalwart => {
            vec![Change::new("Stalwart, proxyTrustedNetworks of the listener", &[&source(target)])]
        }
        Server::Cyrus => {
            vec![Change::new("Cyrus, cyrus.conf, SERVICES", &[&format!("cmd=\"… -H\" listen=\"{port}\"")])]
        }
        Server::Haraka => vec![
            Change::new("Haraka, config/haproxy_hosts", &[&source(target)]),
            Change::own(target, "[listener.receiver]", "version = \"v1\""),
        ],
    }
}

/// Takes the header from the ports of other clients.
pub(super) fn header_on_one_port(target: &Target, server: Server) -> Vec<Change> {
    if !server.is_postfix() {
        return Vec::new();
    }
    let main_cf = Change::new(
        "Postfix, main.cf: it applies to the standard ports too, so it belongs into master.cf alone",
        &["smtpd_upstream_proxy_protocol =", "postscreen_upstream_proxy_protocol ="],
    );
    let mut changes = vec![main_cf];
    changes.extend(expect_header(target, server));
    changes
}

/// Adds a service on a port on which nothing listens.
pub(super) fn add_service(target: &Target) -> Vec<Change> {
    let server = match target.protocol {
        Protocol::Smtp => Server::Postscreen,
        Protocol::Submission | Protocol::Submissions => Server::Smtpd,
        Protocol::Plain => return Vec::new(),
        _ => Server::Dovecot,
    };
    expect_header(target, server)
}

fn dovecot_listener(target: &Target) -> Change {
    let service = match target.protocol {
        Protocol::Imap | Protocol::Imaps => "imap-login",
        Protocol::Pop3 | Protocol::Pop3s => "pop3-login",
        Protocol::Sieve => "managesieve-login",
        Protocol::Smtp | Protocol::Submission | Protocol::Submissions | Protocol::Plain => "submission-login",
    };
    let (opening, port) = (format!("service {service} {{"), format!("    port = {}", target.address.port()));
    let listener = format!("  inet_listener {}_proxied {{", target.protocol);
    let mut lines = vec![opening.as_str(), &listener, &port];
    if target.is_tls() {
        lines.push("    ssl = yes");
    }
    lines.extend(["    haproxy = yes", "  }", "}"]);
    Change::new("Dovecot, conf.d/10-master.conf, at the inet_listener with this port", &lines)
}

/// Makes Dovecot trust this host.
pub(super) fn trust_injector(target: &Target) -> Change {
    Change::new(
        "Dovecot, dovecot.conf, in addition to the networks already listed",
        &[&format!("haproxy_trusted_networks = {}", source(target))],
    )
}

/// Makes the server relay only for clients that have logged in, whatever address the header has.
pub(super) fn restrict_relaying(target: &Target, server: Server) -> Vec<Change> {
    const SETTING: &str = "  -o smtpd_relay_restrictions=permit_sasl_authenticated,reject_unauth_destination";
    const INSTEAD: &str = "or, to keep relaying for some networks, -o mynetworks= with only those, without 127.0.0.0/8 and [::1]/128";
    let port = target.address.port();
    let smtpd = || {
        Change::new(
            format!("Postfix, master.cf: below the smtpd on {port}, then reload ({INSTEAD})"),
            &[SETTING],
        )
    };
    let postscreen = || {
        Change::new(
            format!(
                "Postfix, master.cf: below the smtpd behind postscreen on {port} (`smtpd pass`, or that of its \
                 smtpd_service_name), then reload ({INSTEAD})"
            ),
            &[SETTING],
        )
    };
    match server {
        Server::Postscreen => vec![postscreen()],
        Server::Smtpd => vec![smtpd()],
        Server::Postfix => vec![postscreen(), smtpd()],
        _ => Vec::new(),
    }
}

/// Makes Dovecot treat a client on its own host as any other.
pub(super) fn distrust_localhost(server: Server) -> Option<Change> {
    (server == Server::Dovecot).then(|| {
        Change::new(
            "Dovecot, dovecot.conf: remove 127.0.0.0/8 and ::1, keep the other networks",
            &["login_trusted_networks ="],
        )
    })
}

/// Makes Postfix accept addresses of this family.
pub(super) fn enable_family(family: Family, server: Server) -> Vec<Change> {
    match server {
        Server::Postscreen | Server::Smtpd | Server::Postfix => vec![Change::new(
            format!(
                "Postfix, main.cf (or -o at the service), then restart: {family} is off in inet_protocols"
            ),
            &["inet_protocols = all"],
        )],
        _ => Vec::new(),
    }
}

/// Makes the port expect TLS from the first byte.
pub(super) fn enable_tls(target: &Target, server: Server) -> Vec<Change> {
    let clear = match target.protocol {
        Protocol::Submissions => Protocol::Submission,
        Protocol::Imaps => Protocol::Imap,
        Protocol::Pop3s => Protocol::Pop3,
        other => other,
    };
    let mut changes = match server {
        Server::Dovecot => vec![dovecot_listener(target)],
        Server::Postscreen | Server::Smtpd | Server::Postfix => vec![Change::new(
            format!("Postfix, master.cf, below the service {}", target.address.port()),
            &["  -o smtpd_tls_wrappermode=yes"],
        )],
        _ => Vec::new(),
    };
    changes.push(Change::own(target, "if clear text is intended", &format!("protocol = \"{clear}\"")));
    changes
}

/// Closes the port to all hosts but the injector: nft commands for the mail host. `injectors` are
/// the injector's addresses.
pub(super) fn restrict_port(port: u16, injectors: &[IpAddr], known: bool) -> Change {
    let place = if known {
        "the mail host's firewall (nft; to make it permanent, in /etc/nftables.conf)"
    } else {
        "the mail host's firewall (nft), with the address that `injector doctor` prints on the injector's host"
    };
    let mut lines = vec![
        "nft add table inet proxy_ports".to_owned(),
        "nft 'add chain inet proxy_ports input { type filter hook input priority -10; }'".to_owned(),
    ];
    for (family, key, protocol, placeholder) in
        [(Family::V4, "ip", "ipv4", "INJECTOR_IPV4"), (Family::V6, "ip6", "ipv6", "INJECTOR_IPV6")]
    {
        let mut addresses: Vec<String> =
            injectors.iter().filter(|ip| Family::of(**ip) == family).map(ToString::to_string).collect();
        addresses.sort();
        addresses.dedup();
        if !known {
            addresses = vec![placeholder.to_owned()];
        }
        let rest = format!("tcp dport {port} counter drop");
        lines.push(match addresses.as_slice() {
            // The injector does not use this family, so the rule drops all of it.
            [] => format!("nft 'add rule inet proxy_ports input meta nfproto {protocol} {rest}'"),
            [one] => format!("nft 'add rule inet proxy_ports input {key} saddr != {one} {rest}'"),
            many => format!(
                "nft 'add rule inet proxy_ports input {key} saddr != {{ {} }} {rest}'",
                many.join(", ")
            ),
        });
    }
    Change { place: place.to_owned(), lines }
}

/// Makes a firewall accept the injector's connections.
pub(super) fn allow_injector(target: &Target) -> Change {
    let key = if target.address.is_ipv4() { "ip" } else { "ip6" };
    let (source, port) = (source(target), target.address.port());
    Change::new(
        "the firewall that drops the packets, in its input chain",
        &[&format!("{key} saddr {source} tcp dport {port} accept")],
    )
}

fn source(target: &Target) -> String {
    target.source.map_or_else(|| "ADDRESS-OF-THE-INJECTOR".to_owned(), |source| source.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_drops_a_family_that_the_injector_does_not_use() {
        let injectors: [IpAddr; 1] = ["10.25.0.1".parse().unwrap()];
        let change = restrict_port(2525, &injectors, true);
        assert_eq!(
            change.lines[2..],
            [
                "nft 'add rule inet proxy_ports input ip saddr != 10.25.0.1 tcp dport 2525 counter drop'",
                "nft 'add rule inet proxy_ports input meta nfproto ipv6 tcp dport 2525 counter drop'",
            ]
        );
        let injectors: [IpAddr; 3] =
            ["10.25.0.1".parse().unwrap(), "fd25::1".parse().unwrap(), "10.25.0.3".parse().unwrap()];
        let change = restrict_port(2525, &injectors, true);
        assert!(change.lines[2].contains("ip saddr != { 10.25.0.1, 10.25.0.3 } tcp"), "{change:?}");
        assert!(change.lines[3].contains("ip6 saddr != fd25::1 tcp"), "{change:?}");
    }
}
