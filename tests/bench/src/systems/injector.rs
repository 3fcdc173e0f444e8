//! The injector's engines, each with the daemon's defaults, and the splice engine with other rules
//! of enrolment.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use injector_load::service::{ALL, PortKind};

use super::{Address, Counters, HOOKS, RunningSystem, System, dropped_at};
use crate::ban_costs::await_in_force;
use crate::testbed::{FEW_LOCAL_PORTS, LOCAL_PORT_RANGE, Testbed, mail};
use crate::{bans, mail_sink};
use tempfile::TempDir;

use injector_testbed::bpffs::BpfFs;
use injector_testbed::daemon::{
    BPF_EVENTS, BYTES, GUARD_DROPPED_PACKETS, HEADERS_FAILED, HEADERS_SENT, Injector, PIPED, PLANE, RELAYED,
    SPLICED,
};
use injector_testbed::metrics::Metrics;
use injector_testbed::netns::{HostAddresses, VIP_INLINE, VIP_RELAY, VIP_SPLICE, scratch_dir};

/// How long the daemon may take to detach its programs and exit.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// A placeholder for the directory of a BPF file system; each run has its own.
pub(super) const PIN: &str = "/sys/fs/bpf/injector-bench";

/// A placeholder for the file with bans; each run has its own.
pub(super) const DENY_FILE: &str = "/run/injector-bench/deny.txt";

/// One engine, with tables that precede the listeners in its configuration.
pub(super) struct Engine {
    pub(super) name: String,
    /// Value of `engine =`.
    pub(super) engine: &'static str,
    /// The address on which it listens.
    pub(super) vip: HostAddresses,
    /// Additional tables of the configuration.
    pub(super) tables: String,
    /// Bans of others, in [`DENY_FILE`].
    pub(super) bans: u32,
    /// See [`System::bans_attacker_at`].
    pub(super) bans_attacker_at: Option<&'static str>,
    pub(super) about: String,
}

impl Engine {
    /// With the daemon's defaults.
    fn new(engine: &'static str, vip: HostAddresses, about: &str) -> Self {
        Self {
            name: engine.to_owned(),
            engine,
            vip,
            tables: String::new(),
            bans: 0,
            bans_attacker_at: None,
            about: about.to_owned(),
        }
    }
}

/// All engines, with the daemon's defaults. To add an engine, add it to [`engine`]; tables that it
/// needs in the configuration go into [`Engine::tables`].
pub(super) fn engines() -> Vec<System> {
    let splice_send = Engine {
        name: "splice-send".to_owned(),
        tables: "[splice]\nheader = \"send\"\n\n".to_owned(),
        about: "the same, the header sent by user space instead of a program".to_owned(),
        ..engine("splice")
    };
    [engine("splice"), splice_send, engine("inline"), engine("relay")].map(Engine::system).into()
}

/// An engine, with the daemon's defaults. `name` is `splice`, `inline` or `relay`.
pub(super) fn engine(name: &str) -> Engine {
    match name {
        "splice" => Engine::new(
            "splice",
            VIP_SPLICE,
            "the injector, sockmap: the kernel carries the payload between two sockets",
        ),
        "inline" => Engine {
            tables: format!("[inline]\npin = \"{PIN}/inline\"\n\n"),
            ..Engine::new(
                "inline",
                VIP_INLINE,
                "the injector, packets: a BPF program translates and forwards them, and adds the header",
            )
        },
        _ => Engine::new("relay", VIP_RELAY, "the injector, user space copies the payload"),
    }
}

/// The splice engine, each direction enrolled after a number of payloads. Bytes alone never enrol
/// here, so that the number of payloads is the only difference.
pub(super) fn enrolments() -> Vec<System> {
    const NEVER: u64 = 1 << 40;
    let after = |messages: u64, bytes: u64, name: &str, about: &str| Engine {
        name: format!("splice-{name}"),
        engine: "splice",
        vip: VIP_SPLICE,
        bans: 0,
        bans_attacker_at: None,
        tables: format!("[splice]\nenrol_after_messages = {messages}\nenrol_after_bytes = {bytes}\n\n"),
        about: format!("the injector, sockmap, enrolled {about}"),
    };
    [
        after(1, NEVER, "after-1", "after one payload"),
        after(4, NEVER, "after-4", "after 4 payloads"),
        after(16, NEVER, "after-16", "after 16 payloads"),
        after(64, NEVER, "after-64", "after 64 payloads"),
        after(8, NEVER, "after-8", "after 8 payloads"),
        after(32, NEVER, "after-32", "after 32 payloads"),
        after(4, 64 << 10, "after-4-or-64k", "after 4 payloads or 64 KiB"),
        after(NEVER, 64 << 10, "after-64k", "after 64 KiB"),
        after(NEVER, 1 << 20, "after-1m", "after 1 MiB"),
        after(NEVER, NEVER, "never", "never"),
    ]
    .map(Engine::system)
    .into()
}

impl Engine {
    pub(super) fn system(self) -> System {
        let config = self.configuration();
        System {
            name: self.name.clone(),
            about: self.about.clone(),
            port_kind: PortKind::Header,
            config: config.clone(),
            baseline: None,
            bans_attacker_at: self.bans_attacker_at,
            address: Address::Edge(self.vip),
            start: Box::new(move |testbed| Ok(Box::new(self.start(testbed, config.clone())?))),
        }
    }

    fn start(&self, testbed: &Testbed, mut config: String) -> anyhow::Result<Daemon> {
        let edge = &testbed.topology.edge;
        if self.engine == "inline" {
            edge.sysctl(LOCAL_PORT_RANGE, FEW_LOCAL_PORTS)?;
        }
        let bpffs = config.contains(PIN).then(BpfFs::mount).transpose()?;
        if let Some(bpffs) = &bpffs {
            config = config.replace(PIN, &bpffs.path().display().to_string());
        }
        let lists = config.contains(DENY_FILE).then(|| scratch_dir("bans")).transpose()?;
        if let Some(lists) = &lists {
            let file = lists.path().join("deny.txt");
            fs::write(&file, bans::list(self.bans))?;
            // The daemon reads a file that has just been written once more after two seconds: amid a
            // measurement, that would be a cost of the guard.
            File::options().write(true).open(&file)?.set_modified(SystemTime::UNIX_EPOCH)?;
            config = config.replace(DENY_FILE, &file.display().to_string());
        }
        let injector = Injector::start(edge, &config)?;
        await_in_force(&injector, edge, self.vip.v4, self.bans)?;
        Ok(Daemon { injector: Some(injector), _bpffs: bpffs, _lists: lists })
    }

    fn configuration(&self) -> String {
        let metrics = SocketAddr::from((Ipv4Addr::LOCALHOST, 9145));
        // No draining after a measurement; and, as with HAProxy, no log line per connection.
        let mut text = format!(
            "[metrics]\nlisten = \"{metrics}\"\n\n[log]\nlevel = \"warn\"\n\n[limits]\nmax_connections = 20000\n\n\
             [stop]\ndeadline = \"0s\"\n\n{}",
            self.tables
        );
        let services = ALL.iter().map(|service| (service.name, service.protocol, service.port));
        for (name, protocol, port) in services.chain([("mail", "smtp", mail_sink::PROXIED)]) {
            let (bind, backend) = (SocketAddr::from((self.vip.v4, port)), mail(port));
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                "[[listener]]\nname = \"{name}\"\nbind = [\"{bind}\"]\nprotocol = \"{protocol}\"\n\
                 engine = \"{}\"\nbackends = [\"{backend}\"]\n\n",
                self.engine
            );
        }
        text
    }
}

/// A running daemon.
#[derive(Debug)]
struct Daemon {
    /// `None` during shutdown.
    injector: Option<Injector>,
    /// Dropped after it: programs and maps are pinned here, and are removed with it.
    _bpffs: Option<BpfFs>,
    /// The directory of [`DENY_FILE`].
    _lists: Option<TempDir>,
}

impl RunningSystem for Daemon {
    fn pids(&self) -> Vec<u32> {
        self.injector.iter().map(Injector::pid).collect()
    }

    fn log(&self) -> String {
        self.injector.as_ref().map(Injector::log).unwrap_or_default()
    }

    fn counters(&mut self) -> anyhow::Result<Counters> {
        let Some(injector) = &self.injector else { return Ok(Counters::new()) };
        let metrics = injector.metrics()?;
        let mut counters = Counters::from([
            ("bytes spliced".to_owned(), metrics.sum(BYTES, &[(PLANE, SPLICED)])),
            ("bytes piped".to_owned(), metrics.sum(BYTES, &[(PLANE, PIPED)])),
            ("bytes relayed".to_owned(), metrics.sum(BYTES, &[(PLANE, RELAYED)])),
            ("headers sent".to_owned(), metrics.sum(HEADERS_SENT, &[])),
            ("headers failed".to_owned(), metrics.sum(HEADERS_FAILED, &[])),
        ]);
        if metrics.has(GUARD_DROPPED_PACKETS) {
            let dropped = |hook| metrics.sum(GUARD_DROPPED_PACKETS, &[("hook", hook)]);
            counters.extend(HOOKS.map(|hook| (dropped_at(hook), dropped(hook))));
        }
        counters.extend(syns_of_inline(&metrics));
        Ok(counters)
    }
}

/// What has become of clients' SYNs in engine inline's program.
fn syns_of_inline(metrics: &Metrics) -> impl Iterator<Item = (String, f64)> {
    let fate = |event: &&str| {
        ["opened", "established", "abandoned"].contains(event) || event.starts_with("to_socket_")
    };
    metrics.samples().iter().filter(|sample| sample.name == BPF_EVENTS && sample.value > 0.0).filter_map(
        move |sample| {
            let label =
                |name| sample.labels.iter().find(|label| label.0 == name).map(|label| label.1.as_str());
            let event = label("event").filter(fate).filter(|_| label("program") == Some("inline"))?;
            Some((format!("inline: {event}"), sample.value))
        },
    )
}

impl Drop for Daemon {
    /// In order, so that an engine with programs on interfaces detaches them.
    fn drop(&mut self) {
        let Some(injector) = self.injector.take() else { return };
        let begun = Instant::now();
        match injector.stop() {
            Ok((status, log)) if !status.success() => {
                eprintln!("bench: the injector ended with {status}:\n{log}")
            }
            Ok(_) if begun.elapsed() > STOP_LIMIT => {
                eprintln!("bench: the injector took {:?} to end", begun.elapsed())
            }
            Ok(_) => {}
            Err(error) => eprintln!("bench: {error:#}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_engine_has_every_service_and_mail() {
        for system in engines().iter().chain(&enrolments()) {
            assert_eq!(system.config.matches("[[listener]]").count(), ALL.len() + 1, "{}", system.name);
            assert!(system.config.parse::<toml::Table>().is_ok(), "{}", system.config);
        }
    }

    #[test]
    fn the_fate_of_syns_is_counted() {
        let text = "injector_bpf_events_total{program=\"inline\",event=\"opened\"} 5\n\
                    injector_bpf_events_total{program=\"inline\",event=\"to_socket_limit\"} 7\n\
                    injector_bpf_events_total{program=\"inline\",event=\"to_socket_full\"} 0\n\
                    injector_bpf_events_total{program=\"inline\",event=\"appended\"} 5\n\
                    injector_bpf_events_total{program=\"verdict\",event=\"established\"} 5\n# EOF\n";
        let counted: Vec<_> = syns_of_inline(&Metrics::parse(text).unwrap()).collect();
        assert_eq!(
            counted,
            [("inline: opened".to_owned(), 5.0), ("inline: to_socket_limit".to_owned(), 7.0)]
        );
    }

    #[test]
    fn the_rules_of_enrolment_differ() {
        let mut configs: Vec<_> = enrolments().into_iter().map(|system| system.config).collect();
        let count = configs.len();
        configs.sort();
        configs.dedup();
        assert_eq!(configs.len(), count);
    }
}
