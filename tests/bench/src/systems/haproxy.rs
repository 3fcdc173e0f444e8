//! HAProxy as its own developers would configure it for this: no logging, `send-proxy-v2`, one
//! thread and two, with kernel splicing and without.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use injector_load::service::{ALL, PortKind};
use tempfile::TempDir;

use super::{Address, Counters, HAPROXY, RunningSystem, System};
use crate::mail_sink;
use crate::testbed::{Testbed, mail};
use injector_testbed::netns::{self, VIP_HAPROXY};
use injector_testbed::process::Process;

/// One version of HAProxy on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Build {
    /// `3.0`, as it appears in names.
    pub series: String,
    /// `3.0.11-1+deb13u3`, for the report.
    pub version: String,
    /// The program with the arguments before its own: a dynamic loader, where HAProxy has its own
    /// libraries.
    pub command: Vec<PathBuf>,
}

/// Its output, in its directory.
const LOG: &str = "haproxy.log";

/// Whether the payload goes through pipes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Forwarding {
    Splice,
    Copy,
}

/// Connection limit: more than any workload has; each takes two descriptors.
const MAX_CONNECTIONS: usize = 9_200;

/// Pipe limit, two descriptors each: more than bulk needs. By default HAProxy wants one for every
/// four connections, and does not start where the descriptor limit is too low for them.
const PIPES: usize = 512;

pub(super) fn systems(build: &Build) -> Vec<System> {
    let mut systems = Vec::new();
    for (forwarding, name) in [(Forwarding::Splice, "splice"), (Forwarding::Copy, "copy")] {
        for threads in [1, 2] {
            systems.push(system(build, forwarding, name, threads));
        }
    }
    systems
}

fn system(build: &Build, forwarding: Forwarding, word: &str, threads: usize) -> System {
    let copy = build.clone();
    let name = format!("{HAPROXY}-{}-{word}-{threads}t", build.series);
    let splicing =
        if forwarding == Forwarding::Splice { "splice-request, splice-response" } else { "no splicing" };
    System {
        name,
        about: format!("HAProxy {}, {splicing}, nbthread {threads}", build.version),
        port_kind: PortKind::Header,
        config: configuration(forwarding, threads, Path::new("DIR")),
        baseline: None,
        bans_attacker_at: None,
        address: Address::Edge(VIP_HAPROXY),
        start: Box::new(move |testbed| Ok(Box::new(HaProxy::start(testbed, &copy, forwarding, threads)?))),
    }
}

fn configuration(forwarding: Forwarding, threads: usize, dir: &Path) -> String {
    let (pipes, splice) = match forwarding {
        Forwarding::Splice => (
            format!("    tune.pipesize 1048576\n    maxpipes {PIPES}\n"),
            "    option splice-request\n    option splice-response\n",
        ),
        Forwarding::Copy => (String::new(), ""),
    };
    let mut text = format!(
        "global
    nbthread {threads}
    maxconn {MAX_CONNECTIONS}
{pipes}    stats socket {}/stats.sock level admin
defaults
    mode tcp
    option tcp-smart-accept
    option tcp-smart-connect
{splice}    timeout connect 5s
    timeout client 60s
    timeout server 60s
",
        dir.display()
    );
    let services = ALL.iter().map(|service| (service.name, service.port));
    for (name, port) in services.chain([("mail", mail_sink::PROXIED)]) {
        let (bind, backend) = (format!("{}:{port}", VIP_HAPROXY.v4), mail(port));
        // Writing to a String cannot fail.
        let _ = write!(text, "listen {name}\n    bind {bind}\n    server mail {backend} send-proxy-v2\n");
    }
    text
}

/// A running HAProxy.
#[derive(Debug)]
struct HaProxy {
    // Before the directory: fields are dropped in this order.
    process: Process,
    dir: TempDir,
}

impl HaProxy {
    fn start(
        testbed: &Testbed,
        build: &Build,
        forwarding: Forwarding,
        threads: usize,
    ) -> anyhow::Result<Self> {
        let dir = netns::scratch_dir("haproxy")?;
        let config = dir.path().join("haproxy.cfg");
        fs::write(&config, configuration(forwarding, threads, dir.path()))?;
        let log = dir.path().join(LOG);
        let edge = &testbed.topology.edge;
        let (program, arguments) = build.command.split_first().context("no program")?;
        let mut command = edge.command(program);
        command.args(arguments).arg("-db").arg("-f").arg(&config);
        let mut process = Process::start("haproxy", edge, command, &log)?;
        let sockets = ALL.map(|service| (VIP_HAPROXY.v4, service.port).into());
        process
            .wait_listening(edge, &sockets, Duration::from_secs(10))
            .with_context(|| format!("HAProxy printed:\n{}", fs::read_to_string(&log).unwrap_or_default()))?;
        Ok(Self { process, dir })
    }

    /// The output of `show info`.
    fn info(&self) -> anyhow::Result<String> {
        let mut socket = UnixStream::connect(self.dir.path().join("stats.sock"))?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        socket.write_all(b"show info\n")?;
        let mut info = String::new();
        socket.read_to_string(&mut info)?;
        Ok(info)
    }
}

impl RunningSystem for HaProxy {
    fn pids(&self) -> Vec<u32> {
        vec![self.process.pid()]
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join(LOG)).unwrap_or_default()
    }

    fn counters(&mut self) -> anyhow::Result<Counters> {
        let info = self.info().context("HAProxy's stats socket does not respond")?;
        // All series so far print "Splicded"; the other spelling is for a version that corrects it.
        let spliced = ["TotalSplicdedBytesOut", "TotalSplicedBytesOut"];
        number(&info, "TotalBytesOut")
            .zip(spliced.iter().find_map(|name| number(&info, name)))
            .map(|(out, spliced)| {
                Counters::from([("bytes out".to_owned(), out), ("bytes spliced".to_owned(), spliced)])
            })
            .with_context(|| format!("HAProxy does not report the bytes that it spliced:\n{info}"))
    }
}

/// A line `NAME: NUMBER` of `show info`.
fn number(info: &str, name: &str) -> Option<f64> {
    let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn show_info_is_read_by_whole_names() {
        let info = "Name: HAProxy\nTotalBytesOut: 1200\nTotalSplicdedBytesOut: 1000\nBytesOutRate: 7\n";
        assert_eq!(number(info, "TotalBytesOut"), Some(1200.0));
        assert_eq!(number(info, "TotalSplicdedBytesOut"), Some(1000.0));
        assert_eq!(number(info, "BytesOut"), None);
    }

    #[test]
    fn only_the_splicing_configuration_has_pipe_settings() {
        let splice = configuration(Forwarding::Splice, 2, Path::new("/d"));
        assert!(splice.contains("option splice-response") && splice.contains("tune.pipesize 1048576"));
        assert!(splice.contains("nbthread 2"));
        let copy = configuration(Forwarding::Copy, 1, Path::new("/d"));
        assert!(!copy.contains("splice") && !copy.contains("pipesize"));
        assert!(copy.contains("server mail 10.25.0.2:7001 send-proxy-v2"), "{copy}");
    }
}
