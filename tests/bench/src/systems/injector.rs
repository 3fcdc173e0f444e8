//! The injector's engines, each with the daemon's defaults, and the splice engine with other rules
//! of enrolment.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use injector_load::service::{ALL, PortKind};

use super::{Address, Counters, RunningSystem, System};
use crate::mail_sink;
use crate::testbed::{FEW_LOCAL_PORTS, LOCAL_PORT_RANGE, mail};
use injector_testbed::bpffs::BpfFs;
use injector_testbed::daemon::{
    BYTES, HEADERS_FAILED, HEADERS_SENT, Injector, PIPED, PLANE, RELAYED, SPLICED,
};
use injector_testbed::netns::{HostAddresses, VIP_INLINE, VIP_RELAY, VIP_SPLICE};

/// How long the daemon may take to detach its programs and exit.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// A placeholder for the directory of a BPF file system; each run of the inline engine has its own.
const PIN: &str = "/sys/fs/bpf/injector-bench";

/// One engine, with tables that precede the listeners in its configuration.
struct Engine {
    name: String,
    /// Value of `engine =`.
    engine: &'static str,
    /// The address on which it listens.
    vip: HostAddresses,
    /// Additional tables of the configuration.
    tables: String,
    about: String,
}

impl Engine {
    /// With the daemon's defaults.
    fn new(engine: &'static str, vip: HostAddresses, about: &str) -> Self {
        Self { name: engine.to_owned(), engine, vip, tables: String::new(), about: about.to_owned() }
    }
}

/// All engines, with the daemon's defaults. To add an engine, add an entry here; tables that it
/// needs in the configuration go into [`Engine::tables`].
pub(super) fn engines() -> Vec<System> {
    [
        Engine::new(
            "splice",
            VIP_SPLICE,
            "the injector, sockmap: the kernel carries the payload between two sockets",
        ),
        Engine {
            name: "splice-send".to_owned(),
            tables: "[splice]\nheader = \"send\"\n\n".to_owned(),
            ..Engine::new(
                "splice",
                VIP_SPLICE,
                "the same, the header sent by user space instead of a program",
            )
        },
        Engine {
            tables: format!("[inline]\npin = \"{PIN}\"\n\n"),
            ..Engine::new(
                "inline",
                VIP_INLINE,
                "the injector, packets: a BPF program translates and forwards them, and adds the header",
            )
        },
        Engine::new("relay", VIP_RELAY, "the injector, user space copies the payload"),
    ]
    .map(system)
    .into()
}

/// The splice engine, each direction enrolled after a number of payloads. Bytes alone never enrol
/// here, so that the number of payloads is the only difference.
pub(super) fn enrolments() -> Vec<System> {
    const NEVER: u64 = 1 << 40;
    let after = |messages: u64, bytes: u64, name: &str, about: &str| Engine {
        name: format!("splice-{name}"),
        engine: "splice",
        vip: VIP_SPLICE,
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
    .map(system)
    .into()
}

fn system(engine: Engine) -> System {
    let config = engine.configuration();
    System {
        name: engine.name.clone(),
        about: engine.about.clone(),
        port_kind: PortKind::Header,
        config: config.clone(),
        address: Address::Edge(engine.vip),
        start: Box::new(move |testbed| {
            let edge = &testbed.topology.edge;
            if !config.contains(PIN) {
                return Ok(Box::new(Daemon {
                    injector: Some(Injector::start(edge, &config)?),
                    _bpffs: None,
                }));
            }
            let bpffs = BpfFs::mount()?;
            let config = config.replace(PIN, &bpffs.path().display().to_string());
            edge.sysctl(LOCAL_PORT_RANGE, FEW_LOCAL_PORTS)?;
            let injector = Injector::start(edge, &config)?;
            Ok(Box::new(Daemon { injector: Some(injector), _bpffs: Some(bpffs) }))
        }),
    }
}

impl Engine {
    fn configuration(&self) -> String {
        let metrics = SocketAddr::from((Ipv4Addr::LOCALHOST, 9145));
        // No draining after a measurement; and, as with HAProxy, no log line per connection.
        let mut text = format!(
            "[metrics]\nlisten = \"{metrics}\"\n\n[log]\nlevel = \"warn\"\n\n[stop]\ndeadline = \"0s\"\n\n{}",
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
        Ok(Counters::from([
            ("bytes spliced".to_owned(), metrics.sum(BYTES, &[(PLANE, SPLICED)])),
            ("bytes piped".to_owned(), metrics.sum(BYTES, &[(PLANE, PIPED)])),
            ("bytes relayed".to_owned(), metrics.sum(BYTES, &[(PLANE, RELAYED)])),
            ("headers sent".to_owned(), metrics.sum(HEADERS_SENT, &[])),
            ("headers failed".to_owned(), metrics.sum(HEADERS_FAILED, &[])),
        ]))
    }
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
    fn the_rules_of_enrolment_differ() {
        let mut configs: Vec<_> = enrolments().into_iter().map(|system| system.config).collect();
        let count = configs.len();
        configs.sort();
        configs.dedup();
        assert_eq!(configs.len(), count);
    }
}
