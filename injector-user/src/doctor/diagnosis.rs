//! The decision table: from observations to findings and the lines to change. No I/O.

mod describe;
mod evidence;
mod localhost;
#[cfg(test)]
mod tests;
mod verdict;

use std::net::IpAddr;

pub(super) use self::describe::describe;
use self::evidence::Evidence;
pub use self::verdict::{Finding, Verdict};
use super::{
    advice::{self, Change},
    observation::{Family, Observation, Outcome, Probe, Target},
    server::{self, Server},
};
use crate::{config::ProxyVersion, protocol::Protocol};

/// Finds the faults of one address. `injectors` are all addresses from which the injector connects
/// to this port; the firewall rule needs them.
#[must_use]
pub fn findings(target: &Target, all: &[Observation], injectors: &[IpAddr]) -> Vec<Finding> {
    let of_backend: Vec<_> = all.iter().filter(|one| one.step.probe.is_to_backend()).cloned().collect();
    let seen = Evidence { target, all: &of_backend, server: server::identify(target, all) };
    if target.untrusted {
        return seen.findings_for_untrusted_host();
    }
    if let Some(finding) = seen.connection_fault() {
        return vec![finding];
    }
    let mut findings = match seen.header_fault() {
        Some(finding) => vec![finding],
        None => seen.findings_after_accepted_header(injectors),
    };
    findings.extend(seen.standard_port_fault(all));
    findings.extend(seen.tls_finding());
    findings
}

impl Evidence<'_> {
    /// Why the connection failed.
    fn connection_fault(&self) -> Option<Finding> {
        let failed = self.all.iter().find(|one| one.failed_to_connect() && one.step.from.is_none())?;
        let address = self.target.address;
        Some(match &failed.outcome {
            Outcome::Refused => Finding::fault(
                Verdict::NotListening,
                format!("nothing listens on {address}: the connection was refused"),
                advice::add_service(self.target),
            ),
            Outcome::NoAnswer => Finding::fault(
                Verdict::NoAnswer,
                format!(
                    "{address} does not answer: a firewall drops the packets, or the mail server has no route back to this host"
                ),
                vec![advice::allow_injector(self.target)],
            ),
            Outcome::NoSourcePorts => Finding::fault(
                Verdict::NoSourcePorts,
                format!(
                    "cannot connect to {address}: every source port of this host is in use towards it, by sessions or in \
                     TIME_WAIT; widen net.ipv4.ip_local_port_range"
                ),
                Vec::new(),
            ),
            Outcome::Unreachable(why) => Finding::fault(
                Verdict::Unreachable,
                format!("cannot connect to {address}: {why}"),
                Vec::new(),
            ),
            _ => return None,
        })
    }

    /// What is wrong if the server answers the injector's own header in neither family.
    fn header_fault(&self) -> Option<Finding> {
        if Family::ALL.iter().any(|family| self.accepts(*family)) {
            return None;
        }
        let (target, server) = (self.target, self.server);
        let Target { address, .. } = target;
        let first = self.configured(Family::V4)?;
        let version = target.receiver.version;
        if self.header(target.other_version(), Family::V4, true).is_some_and(Observation::answered) {
            return Some(self.other_version_fault());
        }
        if self.header(version, Family::V4, false).is_some_and(Observation::answered) {
            return Some(Finding::fault(
                Verdict::RefusesTlvs,
                format!("{address} accepts a header without TLVs, and rejects the one of this listener"),
                vec![Change::own(
                    target,
                    "[listener.receiver]",
                    "# without crc32c, unique_id, authority, noop and custom",
                )],
            ));
        }
        if self.answers_without_header() {
            return Some(Finding::fault(
                Verdict::NoProxy,
                self.no_proxy_message(),
                advice::expect_header(target, server),
            ));
        }
        let silence = self.of(Probe::NoHeader);
        if silence.is_some_and(Observation::closed_immediately) && first.closed_immediately() {
            return Some(self.untrusted_fault());
        }
        Some(self.fault_by_outcome(first))
    }

    /// The fault that follows from the answer to the injector's header alone.
    fn fault_by_outcome(&self, first: &Observation) -> Finding {
        let (target, address) = (self.target, self.target.address);
        match &first.outcome {
            Outcome::Strange(said) if target.is_tls() => Finding::fault(
                Verdict::ClearText,
                format!(
                    "{address} accepts the header, but then sends clear text where TLS is expected: {said:?}"
                ),
                advice::enable_tls(target, self.server),
            ),
            Outcome::Strange(said) => Finding::fault(
                Verdict::OtherProtocol,
                format!("{address} does not speak {}: {said:?}", target.protocol),
                Vec::new(),
            ),
            Outcome::Silent if target.protocol == Protocol::Plain => Finding::note(
                Verdict::Unproven,
                format!(
                    "{address} keeps the connection open after a header and sends nothing: in protocol \"plain\" the doctor \
                     cannot determine whether the header was accepted"
                ),
            ),
            Outcome::Silent => Finding::fault(
                Verdict::Mute,
                format!(
                    "{address} accepts a header and sends nothing: it waits for a client that speaks first, as in TLS, or \
                     for another service behind it{}",
                    if target.is_tls() {
                        ". OpenSMTPD does so in implicit TLS whenever it reads a header and a ClientHello together: \
                         use STARTTLS there"
                    } else {
                        ""
                    }
                ),
                self.changes_if_mute(),
            ),
            Outcome::Rejected(said) if !self.is_about_header(said) => Finding::fault(
                Verdict::Rejected,
                format!("{address} rejects the injector: {said:?}"),
                Vec::new(),
            ),
            _ => Finding::fault(
                Verdict::HeaderRefused,
                format!(
                    "{address} requires a header and rejects the injector's ({}): see the server's log for the reason",
                    describe(first)
                ),
                Vec::new(),
            ),
        }
    }

    /// Postfix sends this if it cannot use a header.
    fn is_about_header(&self, said: &str) -> bool {
        said.contains(server::SMTPD_NO_HEADER) || said.contains(server::POSTSCREEN_NO_HEADER)
    }

    fn other_version_fault(&self) -> Finding {
        let address = self.target.address;
        let other = self.target.other_version();
        let verdict = match other {
            ProxyVersion::V1 => Verdict::WantsV1,
            ProxyVersion::V2 => Verdict::WantsV2,
        };
        Finding::fault(
            verdict,
            format!("{address} accepts a {other} header, but not {}", self.target.receiver.version),
            vec![Change::own(self.target, "[listener.receiver]", &format!("version = \"{other}\""))],
        )
    }

    fn no_proxy_message(&self) -> String {
        let address = self.target.address;
        let what = match self.configured(Family::V4).map(|one| &one.outcome) {
            Some(Outcome::Misunderstood { complaint, .. }) => {
                format!("reads a header as commands ({complaint:?})")
            }
            Some(_) => "closes the connection after a header".to_owned(),
            None => "does not accept a header".to_owned(),
        };
        let mut message =
            format!("{address} does not expect the PROXY protocol: it answers without a header and {what}");
        match self.server {
            Server::Postscreen => message.push_str(
                "; it is postscreen, which has a setting of its own and ignores smtpd_upstream_proxy_protocol",
            ),
            Server::Postfix => message.push_str(
                "; the doctor cannot determine whether postscreen has the port, because postscreen passes known clients \
                 to smtpd: look in master.cf which of the two it is",
            ),
            Server::Smtpd => message.push_str("; it is smtpd, which ignores postscreen_upstream_proxy_protocol"),
            _ => {}
        }
        if self.target.is_on_standard_port() && !self.server.is_by_sender() {
            message.push_str(
                "; other clients, such as webmail, use this port without a header: give the injector a port of its own",
            );
        }
        message
    }

    fn untrusted_fault(&self) -> Finding {
        let Target { address, .. } = self.target;
        let from = self.target.source.map_or_else(|| "this host".to_owned(), |source| source.to_string());
        if self.server == Server::Dovecot {
            return Finding::fault(
                Verdict::Untrusted,
                format!(
                    "{address} closes every connection from {from} at once. Dovecot does so if haproxy_trusted_networks \
                     lacks the client's address: it logs \"haproxy: Client not trusted (rip=…)\" with the address it sees"
                ),
                vec![advice::trust_injector(self.target)],
            );
        }
        Finding::fault(
            Verdict::Untrusted,
            format!(
                "{address} closes every connection from {from} at once: an access list of the server lacks the \
                 address, or a proxy there has no server behind it"
            ),
            match self.target.protocol {
                Protocol::Submission | Protocol::Submissions => vec![advice::trust_injector(self.target)],
                _ => Vec::new(),
            },
        )
    }

    fn changes_if_mute(&self) -> Vec<Change> {
        let implicit = match self.target.protocol {
            Protocol::Submission => Protocol::Submissions,
            Protocol::Imap => Protocol::Imaps,
            Protocol::Pop3 => Protocol::Pop3s,
            _ => return Vec::new(),
        };
        vec![Change::own(
            self.target,
            "if the port expects TLS from the first byte",
            &format!("protocol = \"{implicit}\""),
        )]
    }

    /// What may still be wrong if the header is accepted in at least one family.
    fn findings_after_accepted_header(&self, injectors: &[IpAddr]) -> Vec<Finding> {
        let mut findings = Vec::new();
        let Target { address, .. } = self.target;
        for (family, verdict, needed) in [
            (Family::V6, Verdict::Ipv6Off, self.target.ipv6_clients),
            (Family::V4, Verdict::Ipv4Off, self.target.ipv4_clients),
        ] {
            if self.accepts(family) {
                continue;
            }
            let said = self.configured(family).map(describe).unwrap_or_default();
            let clients = if needed { "" } else { ", which no client of this listener has" };
            findings.push(Finding {
                verdict,
                fault: needed,
                message: format!("{address} rejects headers with {family} addresses{clients} ({said})"),
                changes: advice::enable_family(family, self.server),
            });
        }
        if self.answers_without_header() {
            findings.push(Finding::fault(
                Verdict::HeaderOptional,
                format!(
                    "{address} answers with and without a header: if a connection loses its header, the server takes the \
                     injector for the client, and any host that can reach the port can claim an address"
                ),
                vec![advice::restrict_port(address.port(), injectors, true)],
            ));
        }
        findings.extend(self.forgery_finding(injectors));
        findings.extend(self.localhost_finding(injectors));
        findings
    }

    fn forgery_finding(&self, injectors: &[IpAddr]) -> Option<Finding> {
        let Target { address, .. } = self.target;
        if address.ip().to_canonical().is_loopback() {
            return Some(Finding::note(
                Verdict::Loopback,
                format!(
                    "{address} is reached over loopback: every process on this host can send it a header"
                ),
            ));
        }
        let tried: Vec<_> = self.all.iter().filter(|one| one.step.from.is_some()).collect();
        if let Some(believed) = tried.iter().find(|one| one.answered()) {
            let from = believed.step.from.map(|ip| ip.to_string()).unwrap_or_default();
            let mut changes = vec![advice::restrict_port(address.port(), injectors, true)];
            if self.server == Server::Dovecot {
                changes.insert(0, advice::trust_injector(self.target));
            }
            return Some(Finding::fault(
                Verdict::Forgeable,
                format!(
                    "{address} also trusts a header from {from}, which is not the address that the injector connects \
                     from: any host that can reach the port can claim any client address"
                ),
                changes,
            ));
        }
        tried.is_empty().then(|| {
            Finding::note(
                Verdict::ForgeryUntested,
                "the doctor did not test whether the server trusts headers from other hosts, because this host has no \
                 other address with a route to it: run `injector doctor --untrusted` on another host",
            )
        })
    }

    /// A header is a setting of single services. On the port that other clients use it is a fault,
    /// except in servers that expect it by the sender's address.
    fn standard_port_fault(&self, all: &[Observation]) -> Option<Finding> {
        let header = |one: &&Observation| matches!(one.step.probe, Probe::StandardPort { header: Some(_) });
        let answered = all.iter().filter(header).any(Observation::answered);
        if !answered || self.server.is_by_sender() {
            return None;
        }
        let bare = all.iter().find(|one| one.step.probe == Probe::StandardPort { header: None })?;
        let standard = bare.step.probe.destination(self.target);
        Some(Finding::fault(
            Verdict::StandardPort,
            format!(
                "{standard} requires a header too ({}): webmail, probes and all other clients, which send none, are \
                 rejected or wait",
                describe(bare)
            ),
            advice::header_on_one_port(self.target, self.server),
        ))
    }

    fn findings_for_untrusted_host(&self) -> Vec<Finding> {
        let Target { address, source, .. } = self.target;
        let Some(believed) = self.all.iter().find(|one| one.answered()) else { return Vec::new() };
        let from = source.map_or_else(|| "this host".to_owned(), |source| source.to_string());
        if let Some(open) = self.open_relay_fault(&from) {
            return vec![open];
        }
        vec![Finding::fault(
            Verdict::Forgeable,
            format!(
                "{address} trusts a header from {from}, which is not the injector ({}): any host that can reach the port \
                 can claim any client address{}",
                describe(believed),
                self.relay_remark().unwrap_or_default()
            ),
            vec![advice::restrict_port(address.port(), &[], false)],
        )]
    }

    fn tls_finding(&self) -> Option<Finding> {
        let alert = self.all.iter().find_map(|one| match &one.outcome {
            Outcome::Alert(name) if one.answered() && !one.step.probe.is_bare() => Some(name),
            _ => None,
        })?;
        Some(Finding::note(
            Verdict::TlsTrouble,
            format!(
                "the TLS handshake ends with the alert {alert}: the server accepts the header, but clients that \
                 support only TLS 1.2 and 1.3 may fail (the doctor does not check certificates)"
            ),
        ))
    }
}
