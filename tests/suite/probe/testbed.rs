//! What all trials share: namespaces, mail servers, an injector, and a way to run the probe.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::Context;
use injector_testbed::certificate::MAIL_NAME;
use injector_testbed::daemon::{self, Injector};
use injector_testbed::dovecot::PASSWORD;
use injector_testbed::forward::Forward;
use injector_testbed::mail_client::{self, Server};
use injector_testbed::mail_host::MailHost;
use injector_testbed::message::DOMAIN;
use injector_testbed::netns::{self, EDGE_OUTSIDE, Family, MAIL, Topology, VIP_SPLICE};
use injector_testbed::service::{CLEAR_IMAP, IMAP, IMAPS, SMTP, SUBMISSION, SUBMISSIONS, Service};
use serde_json::Value;
use tempfile::TempDir;

/// Namespaces and servers. Fields are dropped in this order: what runs in a namespace before the
/// namespace.
pub(crate) struct Testbed {
    pub(crate) injector: Injector,
    pub(crate) host: MailHost,
    pub(crate) topology: Topology,
    /// The probe's files.
    pub(crate) folder: TempDir,
    /// For a certificate that is not the mail host's.
    pub(crate) strange_folder: TempDir,
}

/// The result of a run of the probe.
pub(crate) struct Outcome {
    pub(crate) succeeded: bool,
    /// Its output.
    pub(crate) output: String,
    /// Its JSON output, if there is any.
    pub(crate) report: Option<Value>,
    /// The textfile, unless the flags name another.
    pub(crate) metrics: String,
}

impl Testbed {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let topology = Topology::new()?;
        // So that the PROXY ports are reachable from the client, as without a firewall.
        topology.client.ip(&["route", "add", "10.25.0.0/24", "via", &EDGE_OUTSIDE.v4.to_string()])?;
        topology.client.ip(&["route", "add", "fd25::/64", "via", &EDGE_OUTSIDE.v6.to_string()])?;
        let host = MailHost::start_with(&topology.mail, CLEAR_IMAP)?;
        let forward =
            |service: Service| Family::ALL.map(|family| Forward::to_mail(VIP_SPLICE, service, family));
        let forwards: Vec<_> =
            [SMTP, SUBMISSION, SUBMISSIONS, IMAP, IMAPS].into_iter().flat_map(forward).collect();
        let metrics = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9145);
        let injector = Injector::start(&topology.edge, &daemon::configuration(&forwards, "splice", metrics))?;
        let folder = netns::scratch_dir("probe")?;
        fs::write(folder.path().join("ca.pem"), &host.certificate.authority_pem)?;
        Ok(Self { injector, host, topology, folder, strange_folder: netns::scratch_dir("stranger")? })
    }

    /// Runs the probe with JSON output and its own textfile; later flags override earlier ones.
    pub(crate) fn probe(
        &self,
        family: Family,
        smtp: Service,
        imap: Service,
        user: &str,
        flags: &[&str],
    ) -> anyhow::Result<Outcome> {
        self.probe_with_password(family, smtp, imap, user, PASSWORD, flags)
    }

    pub(crate) fn probe_with_password(
        &self,
        family: Family,
        smtp: Service,
        imap: Service,
        user: &str,
        password: &str,
        flags: &[&str],
    ) -> anyhow::Result<Outcome> {
        let ca = self.folder.path().join("ca.pem").display().to_string();
        let mut all = vec!["--tls-name", MAIL_NAME];
        if !flags.contains(&"--ca") {
            all.extend(["--ca", &ca]);
        }
        all.extend(flags);
        self.probe_bare(family, smtp, imap, user, password, &all)
    }

    /// As [`Self::probe`], without a trusted CA unless the flags name one.
    pub(crate) fn probe_bare(
        &self,
        family: Family,
        smtp: Service,
        imap: Service,
        user: &str,
        password: &str,
        flags: &[&str],
    ) -> anyhow::Result<Outcome> {
        let (secret, textfile) = (self.folder.path().join("password"), self.folder.path().join("own.prom"));
        fs::write(&secret, format!("{password}\n"))?;
        let server = |service: Service| SocketAddr::new(VIP_SPLICE.of(family), service.standard).to_string();
        let mut command = self.topology.client.command(daemon::binary()?);
        command.args(["probe", "--smtp", &server(smtp), "--imap", &server(imap), "--user", user, "--json"]);
        command.arg("--password-file").arg(&secret);
        command.args(["--from", "probe@client.example.test", "--hello", "client.example.test"]);
        if !flags.contains(&"--to") {
            command.args(["--to", &format!("{user}@{DOMAIN}")]);
        }
        if !flags.contains(&"--textfile") {
            command.arg("--textfile").arg(&textfile);
        }
        command.args(flags);
        let output = command.output().context("cannot run the probe")?;
        let printed = String::from_utf8_lossy(&output.stdout);
        Ok(Outcome {
            succeeded: output.status.success(),
            report: serde_json::from_str(&printed).ok(),
            output: format!("{printed}{}", String::from_utf8_lossy(&output.stderr)),
            metrics: fs::read_to_string(&textfile).unwrap_or_default(),
        })
    }

    /// A user's messages, read directly from the mail host.
    pub(crate) fn inbox(&self, user: &str) -> anyhow::Result<Vec<Vec<u8>>> {
        let server = self.standard(Family::V4, IMAPS);
        Ok(mail_client::read_inbox(&self.topology.edge, server, user, &[])?.messages)
    }

    /// The mail host's own port, without a header.
    pub(crate) fn standard(&self, family: Family, service: Service) -> Server<'_> {
        let address = SocketAddr::new(MAIL.of(family), service.standard);
        Server { address, authority_pem: &self.host.certificate.authority_pem }
    }
}
