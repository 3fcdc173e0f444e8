//! Mail through the injector to receivers other than Postfix and Dovecot, each with the settings of
//! `docs/receivers.md`: relay and splice, clients and receivers of both families, and the client's
//! address in the receiver's own log.

use std::net::IpAddr;

use anyhow::{Context as _, ensure};
use injector_testbed::certificate::Certificate;
use injector_testbed::daemon::Injector;
use injector_testbed::mail_client::{self, Server};
use injector_testbed::message::Message;
use injector_testbed::netns::{
    self, CLIENT, Family, HostAddresses, MAIL, Netns, Topology, VIP_RELAY, VIP_SPLICE,
};
use injector_testbed::postfix;
use injector_testbed::receivers::{self, Receiver};
use injector_testbed::service::{SMTP, SUBMISSION, SUBMISSIONS, Service};

use crate::external::LIMIT;

const ENGINES: [(&str, HostAddresses); 2] = [("relay", VIP_RELAY), ("splice", VIP_SPLICE)];

/// SMTP with STARTTLS, for servers that offer it on the port in clear text.
const STARTTLS: Service = Service { proxied: SMTP.proxied, ..SUBMISSION };

/// How the receiver's log names a client.
type LogLine = fn(IpAddr) -> String;

pub(crate) fn exim() -> anyhow::Result<()> {
    run(
        &[SMTP, STARTTLS, SUBMISSIONS],
        |ip| format!("[{ip}]:"),
        |netns, certificate| {
            let ports = [SMTP.proxied, SUBMISSIONS.proxied];
            receivers::exim::start(netns, certificate, &receivers::documented("Exim")?, ports)
        },
    )
}

/// TLS is left out: that of Debian 12's OpenSMTPD fails without a proxy too.
pub(crate) fn opensmtpd() -> anyhow::Result<()> {
    run(
        &[SMTP],
        |ip| format!("connected address={}", literal(ip)),
        |netns, certificate| {
            let listeners = receivers::documented("OpenSMTPD")?;
            receivers::opensmtpd::start(netns, certificate, &listeners, &[SMTP.standard, SMTP.proxied])
        },
    )
}

pub(crate) fn aiosmtpd() -> anyhow::Result<()> {
    run(
        &[SMTP, STARTTLS],
        |ip| format!("client [{ip}]:"),
        |netns, certificate| {
            receivers::aiosmtpd::start(netns, certificate, &receivers::documented("aiosmtpd")?, SMTP.proxied)
        },
    )
}

pub(crate) fn haproxy() -> anyhow::Result<()> {
    run_before_postfix(
        &[SMTP, STARTTLS, SUBMISSIONS],
        |ip| format!("client [{ip}]:"),
        |netns, _| {
            let ports = [SMTP.proxied, SUBMISSIONS.proxied];
            receivers::haproxy::start(netns, &receivers::documented("HAProxy")?, &ports)
        },
    )
}

/// Both blocks of the documentation; `mail` has the ports of the matrix, `stream` others.
pub(crate) fn nginx() -> anyhow::Result<()> {
    let streams = [Service { proxied: 2626, standard: 26, ..SMTP }];
    let services = [&[SMTP, SUBMISSIONS][..], &streams].concat();
    run_before_postfix(
        &services,
        |ip| format!(" [{ip}]"),
        |netns, certificate| {
            let ports: Vec<_> = services.iter().map(|service| service.proxied).collect();
            receivers::nginx::start(netns, certificate, &receivers::documented("nginx")?, &ports)
        },
    )
}

fn literal(ip: IpAddr) -> String {
    if ip.is_ipv4() { ip.to_string() } else { format!("[{ip}]") }
}

/// For a receiver that passes mail on to Postfix at the standard ports of its own host.
fn run_before_postfix(
    services: &[Service],
    line: LogLine,
    start: impl FnOnce(&Netns, &Certificate) -> anyhow::Result<Receiver>,
) -> anyhow::Result<()> {
    let mut postfix = None;
    run(services, line, |netns, certificate| {
        postfix = Some(postfix::start_standard_ports(netns, certificate)?);
        start(netns, certificate)
    })
}

fn run(
    services: &[Service],
    line: LogLine,
    start: impl FnOnce(&Netns, &Certificate) -> anyhow::Result<Receiver>,
) -> anyhow::Result<()> {
    let topology = Topology::new().context("no namespaces")?;
    let dir = netns::scratch_dir("certificate")?;
    let certificate = Certificate::new(dir.path())?;
    let receiver = start(&topology.mail, &certificate)?;
    let injector = Injector::start(&topology.edge, &configuration(services))?;
    let mut failures = Vec::new();
    let mut tried = 0;
    for (engine, vip) in ENGINES {
        for backend in Family::ALL {
            for client in Family::ALL {
                for (index, service) in services.iter().enumerate() {
                    tried += 1;
                    let name = format!("{engine}, client {}, {}", client.name(), listener(index, backend));
                    let address = (vip.of(client), port(*service, backend)).into();
                    let server = Server { address, authority_pem: &certificate.authority_pem };
                    let mark = receiver.log().mark();
                    let message = Message::short(&name, "user");
                    let sent = mail_client::send_without_login(
                        &topology.client,
                        server,
                        service.security,
                        "user",
                        &message,
                    );
                    let seen = sent.and_then(|()| {
                        receiver.log().wait_for(mark, &[&line(CLIENT.of(client))], LIMIT).map(drop)
                    });
                    failures.extend(seen.err().map(|error| format!("{name}: {error:#}")));
                }
            }
        }
    }
    ensure!(failures.is_empty(), "{} of {tried} failed:\n{}", failures.len(), failures.join("\n"));
    for session in injector.sessions_within(tried)? {
        ensure!(session.field("reason").is_some_and(|reason| !reason.contains("header")), "{session:?}");
    }
    Ok(())
}

/// Listeners of both engines, each with one backend of either family.
fn configuration(services: &[Service]) -> String {
    let mut text = "[metrics]\nlisten = \"127.0.0.1:9145\"\n".to_owned();
    for (engine, vip) in ENGINES {
        for backend in Family::ALL {
            for (index, service) in services.iter().enumerate() {
                let [v4, v6] = Family::ALL
                    .map(|family| std::net::SocketAddr::new(vip.of(family), port(*service, backend)));
                let address = std::net::SocketAddr::new(MAIL.of(backend), service.proxied);
                text.push_str(&format!(
                    "[[listener]]\nname = \"{engine}-{}\"\nbind = [\"{v4}\", \"{v6}\"]\nprotocol = \"{}\"\n\
                     engine = \"{engine}\"\nbackends = [\"{address}\"]\n",
                    listener(index, backend),
                    service.protocol,
                ));
            }
        }
    }
    text
}

fn listener(index: usize, backend: Family) -> String {
    format!("{index}-{}", backend.name())
}

/// The public port: one for each family of the backend.
fn port(service: Service, backend: Family) -> u16 {
    match backend {
        Family::V4 => service.standard,
        Family::V6 => service.standard + 10_000,
    }
}
