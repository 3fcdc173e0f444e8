//! Mail through the injector to receivers other than Postfix and Dovecot, each with the settings of
//! `docs/receivers.md`: relay and splice, clients and receivers of both families, and the client's
//! address in the receiver's own log. Then the doctor examines the receiver.

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, ensure};
use injector_testbed::certificate::Certificate;
use injector_testbed::daemon::{self, Injector};
use injector_testbed::mail_client::{self, Server};
use injector_testbed::message::Message;
use injector_testbed::netns::{
    self, CLIENT, Family, HostAddresses, MAIL, Netns, Topology, VIP_RELAY, VIP_SPLICE,
};
use injector_testbed::postfix;
use injector_testbed::receivers::{self, Receiver};
use injector_testbed::service::{SMTP, SUBMISSION, SUBMISSIONS, Service};
use injector_testbed::wait::wait_until;
use serde_json::Value;

use crate::external::LIMIT;

const ENGINES: [(&str, HostAddresses); 2] = [("relay", VIP_RELAY), ("splice", VIP_SPLICE)];

/// SMTP with STARTTLS, for servers that offer it on the port in clear text.
const STARTTLS: Service = Service { proxied: SMTP.proxied, ..SUBMISSION };

/// What a receiver is tried with, and what it must show.
struct Case<'a> {
    services: &'a [Service],
    /// Other headers than the default.
    headers: [Option<Settings>; 2],
    /// How its log names a client.
    line: fn(IpAddr) -> String,
    /// What the doctor reports if no firewall closes the port.
    faults: &'a [&'a str],
}

/// A receiver with the documented settings trusts every host, unless it has a list of its own.
const FORGEABLE: &[&str] = &["forgeable"];

pub(crate) fn exim() -> anyhow::Result<()> {
    let case = Case {
        services: &[SMTP, STARTTLS, SUBMISSIONS],
        headers: [Some(V1), Some(TLVS)],
        line: |ip| format!("[{ip}]:"),
        faults: &[],
    };
    run(&case, |netns, certificate| {
        let ports = [SMTP.proxied, SUBMISSIONS.proxied];
        receivers::exim::start(netns, certificate, &receivers::documented("Exim")?, ports)
    })
}

/// It supports only v2. TLS is left out: that of Debian 12's OpenSMTPD fails without a proxy too.
pub(crate) fn opensmtpd() -> anyhow::Result<()> {
    let case = Case {
        services: &[SMTP],
        headers: [None, Some(TLVS)],
        line: |ip| format!("connected address={}", literal(ip)),
        faults: FORGEABLE,
    };
    run(&case, |netns, certificate| {
        let listeners = receivers::documented("OpenSMTPD")?;
        receivers::opensmtpd::start(netns, certificate, &listeners, &[SMTP.standard, SMTP.proxied])
    })
}

pub(crate) fn aiosmtpd() -> anyhow::Result<()> {
    let case = Case {
        services: &[SMTP, STARTTLS],
        headers: [Some(V1), Some(TLVS)],
        line: |ip| format!("client [{ip}]:"),
        faults: FORGEABLE,
    };
    run(&case, |netns, certificate| {
        receivers::aiosmtpd::start(netns, certificate, &receivers::documented("aiosmtpd")?, SMTP.proxied)
    })
}

pub(crate) fn haproxy() -> anyhow::Result<()> {
    let case = Case {
        services: &[SMTP, STARTTLS, SUBMISSIONS],
        headers: [Some(V1), Some(TLVS)],
        line: |ip| format!("client [{ip}]:"),
        faults: &[],
    };
    run_before_postfix(&case, |netns, _| {
        let ports = [SMTP.proxied, SUBMISSIONS.proxied];
        receivers::haproxy::start(netns, &receivers::documented("HAProxy")?, &ports)
    })
}

/// Both blocks of the documentation; `mail` has the ports of the matrix, `stream` others.
pub(crate) fn nginx() -> anyhow::Result<()> {
    let services = [SMTP, SUBMISSIONS, Service { proxied: 2626, standard: 26, ..SMTP }];
    let case = Case {
        services: &services,
        headers: [Some(V1), Some(SHORT_TLVS)],
        line: |ip| format!(" [{ip}]"),
        faults: FORGEABLE,
    };
    run_before_postfix(&case, |netns, certificate| {
        let ports = services.map(|service| service.proxied);
        receivers::nginx::start(netns, certificate, &receivers::documented("nginx")?, &ports)
    })
}

fn literal(ip: IpAddr) -> String {
    if ip.is_ipv4() { ip.to_string() } else { format!("[{ip}]") }
}

/// For a receiver that passes mail on to Postfix at the standard ports of its own host.
fn run_before_postfix(
    case: &Case<'_>,
    start: impl FnOnce(&Netns, &Certificate) -> anyhow::Result<Receiver>,
) -> anyhow::Result<()> {
    let mut postfix = None;
    run(case, |netns, certificate| {
        postfix = Some(postfix::start_standard_ports(netns, certificate)?);
        start(netns, certificate)
    })
}

/// A listener's other settings, with a name.
type Settings = (&'static str, &'static str);

/// A header of version 1.
const V1: Settings = ("v1", "[listener.receiver]\nversion = \"v1\"\n");

/// A header with TLVs, and checks with LOCAL.
const TLVS: Settings = (
    "tlvs-and-local-checks",
    "[listener.receiver]\ncrc32c = true\nunique_id = true\nauthority = \"mail.example.test\"\n\
     [listener.health]\ncheck = \"mail\"\nheader = \"local\"\ninterval = \"1s\"\n",
);

/// The same with at most the 107 bytes that nginx 1.22 accepts.
const SHORT_TLVS: Settings = (
    TLVS.0,
    "[listener.receiver]\ncrc32c = true\nauthority = \"mail.example.test\"\nmax_header = 107\n\
     [listener.health]\ncheck = \"mail\"\nheader = \"local\"\ninterval = \"1s\"\n",
);

fn run(
    case: &Case<'_>,
    start: impl FnOnce(&Netns, &Certificate) -> anyhow::Result<Receiver>,
) -> anyhow::Result<()> {
    let topology = Topology::new().context("no namespaces")?;
    let dir = netns::scratch_dir("certificate")?;
    let certificate = Certificate::new(dir.path())?;
    let receiver = start(&topology.mail, &certificate)?;
    let listeners = listeners(case);
    let injector = Injector::start(&topology.edge, &configuration(&listeners))?;
    let mut failures = Vec::new();
    let tried = listeners.len() * Family::ALL.len();
    for listener in &listeners {
        for client in Family::ALL {
            let address = SocketAddr::new(listener.vip.of(client), listener.port);
            let server = Server { address, authority_pem: &certificate.authority_pem };
            let mark = receiver.log().mark();
            let message = Message::short(&listener.name, "user");
            let security = listener.service.security;
            let sent = mail_client::send_without_login(&topology.client, server, security, "user", &message);
            let seen = sent.and_then(|()| {
                receiver.log().wait_for(mark, &[&(case.line)(CLIENT.of(client))], LIMIT).map(drop)
            });
            let name = format!("{}, client {}", listener.name, client.name());
            failures.extend(seen.err().map(|error| format!("{name}: {error:#}")));
        }
    }
    let count = failures.len();
    ensure!(count == 0, "{count} of {tried} failed:\n{}\n{}", failures.join("\n"), injector.log());
    injector.sessions_within(tried)?;
    checks_pass(&injector)?;
    let found = faults(&topology.edge, case.services[0])?;
    ensure!(found == case.faults, "the doctor found {found:?}, expected {:?}", case.faults);
    Ok(())
}

/// The faults that the doctor finds at the receiver, which no firewall closes.
fn faults(edge: &Netns, service: Service) -> anyhow::Result<Vec<String>> {
    let dir = netns::scratch_dir("doctor")?;
    let file = dir.path().join("injector.toml");
    let (engine, vip) = ENGINES[0];
    let port = service.standard;
    let name = "doctor".to_owned();
    let listener = Listener { name, engine, vip, port, service, backend: Family::V4, more: "" };
    fs::write(&file, configuration(&[listener]))?;
    let mut command = edge.command(daemon::binary()?);
    // A receiver that waits for a header says nothing before that.
    command.arg("doctor").arg("--config").arg(&file).args(["--json", "--timeout", "1s"]);
    let output = command.output()?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("the doctor printed {}", String::from_utf8_lossy(&output.stderr)))?;
    let findings = report.pointer("/listeners/0/backends/0/addresses/0/findings").and_then(Value::as_array);
    let faults = findings.context("no findings")?.iter().filter(|one| one["fault"] == true);
    Ok(faults.filter_map(|one| one["verdict"].as_str().map(str::to_owned)).collect())
}

/// Waits for the first check.
fn checks_pass(injector: &Injector) -> anyhow::Result<()> {
    let counts = || {
        let metrics = injector.metrics()?;
        Ok(["passed", "failed"]
            .map(|result| metrics.sum("injector_backend_checks_total", &[("result", result)])))
    };
    let [passed, failed] = wait_until("checks", counts, |counts| *counts != [0.0, 0.0])?;
    ensure!(failed == 0.0, "{passed} checks passed and {failed} failed: {}", injector.log());
    Ok(())
}

/// A listener for clients of both families.
struct Listener {
    name: String,
    engine: &'static str,
    vip: HostAddresses,
    port: u16,
    service: Service,
    backend: Family,
    /// More tables.
    more: &'static str,
}

/// Listeners of both engines, each with one backend of either family, and one for each other header.
fn listeners(case: &Case<'_>) -> Vec<Listener> {
    let mut all = Vec::new();
    for (engine, vip) in ENGINES {
        for backend in Family::ALL {
            for service in case.services.iter().copied() {
                // One port for each family of the backend.
                let port = if backend == Family::V4 { service.standard } else { service.standard + 10_000 };
                let name = format!("{engine}-{port}-to-{}", backend.name());
                all.push(Listener { name, engine, vip, port, service, backend, more: "" });
            }
        }
    }
    for ((name, more), port) in case.headers.iter().flatten().zip(30_000..) {
        let name = format!("header-{name}");
        let (engine, vip) = ENGINES[0];
        all.push(Listener { name, engine, vip, port, service: case.services[0], backend: Family::V4, more });
    }
    all
}

fn configuration(listeners: &[Listener]) -> String {
    let mut text = "[metrics]\nlisten = \"127.0.0.1:9145\"\n".to_owned();
    for Listener { name, engine, vip, port, service, backend, more } in listeners {
        let [v4, v6] = Family::ALL.map(|family| SocketAddr::new(vip.of(family), *port));
        let address = SocketAddr::new(MAIL.of(*backend), service.proxied);
        let protocol = service.protocol;
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "[[listener]]\nname = \"{name}\"\nbind = [\"{v4}\", \"{v6}\"]\nprotocol = \"{protocol}\"\n\
             engine = \"{engine}\"\nbackends = [\"{address}\"]\n{more}"
        );
    }
    text
}
