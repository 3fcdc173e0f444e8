//! HAProxy as its own developers would set it up for this: no logging, `send-proxy-v2`, one thread and two, with the
//! kernel's splicing and without.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use injector_load::service::{ALL, Door};
use tempfile::TempDir;

use super::{Address, HAPROXY, Peer, Proof, Running};
use crate::mail_sink;
use crate::stage::{Stage, mail};
use injector_testbed::netns::{self, VIP_HAPROXY};
use injector_testbed::process::Process;

/// One version of HAProxy on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Build {
    /// `3.0`, as it goes into names.
    pub series: String,
    /// `3.0.11-1+deb13u3`, for the report.
    pub version: String,
    /// The program with the arguments that stand before its own: a dynamic loader, where it has its own libraries.
    pub command: Vec<PathBuf>,
}

/// Its output, in its folder.
const LOG: &str = "haproxy.log";

/// Whether the payload goes through pipes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carry {
    Splice,
    Copy,
}

/// Connections that it takes: more than any work has, and two descriptors each.
const MOST: usize = 9_200;

/// Pipes that it may have, two descriptors each: more than bulk needs. By default it wants one for every four connections,
/// and does not start where the limit on descriptors has no room for them.
const PIPES: usize = 512;

pub(super) fn peers(build: &Build) -> Vec<Peer> {
    let mut peers = Vec::new();
    for (carry, name) in [(Carry::Splice, "splice"), (Carry::Copy, "copy")] {
        for threads in [1, 2] {
            peers.push(peer(build, carry, name, threads));
        }
    }
    peers
}

fn peer(build: &Build, carry: Carry, word: &str, threads: usize) -> Peer {
    let copy = build.clone();
    let name = format!("{HAPROXY}-{}-{word}-{threads}t", build.series);
    let splicing = if carry == Carry::Splice { "splice-request, splice-response" } else { "no splicing" };
    Peer {
        name,
        about: format!("HAProxy {}, {splicing}, nbthread {threads}", build.version),
        door: Door::Header,
        config: configuration(carry, threads, Path::new("DIR")),
        address: Address::Edge(VIP_HAPROXY),
        start: Box::new(move |stage| Ok(Box::new(HaProxy::start(stage, &copy, carry, threads)?))),
    }
}

fn configuration(carry: Carry, threads: usize, dir: &Path) -> String {
    let (pipes, splice) = match carry {
        Carry::Splice => (
            format!("    tune.pipesize 1048576\n    maxpipes {PIPES}\n"),
            "    option splice-request\n    option splice-response\n",
        ),
        Carry::Copy => (String::new(), ""),
    };
    let mut text = format!(
        "global
    nbthread {threads}
    maxconn {MOST}
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
    fn start(stage: &Stage, build: &Build, carry: Carry, threads: usize) -> anyhow::Result<Self> {
        let dir = netns::scratch_dir("haproxy")?;
        let config = dir.path().join("haproxy.cfg");
        fs::write(&config, configuration(carry, threads, dir.path()))?;
        let log = dir.path().join(LOG);
        let edge = &stage.topology.edge;
        let (program, arguments) = build.command.split_first().context("no program")?;
        let mut command = edge.command(program);
        command.args(arguments).arg("-db").arg("-f").arg(&config);
        let mut process = Process::start("haproxy", edge, command, &log)?;
        let sockets = ALL.map(|service| (VIP_HAPROXY.v4, service.port).into());
        process
            .wait_listening(edge, &sockets, Duration::from_secs(10))
            .with_context(|| format!("HAProxy said:\n{}", fs::read_to_string(&log).unwrap_or_default()))?;
        Ok(Self { process, dir })
    }

    /// What `show info` says.
    fn info(&self) -> anyhow::Result<String> {
        let mut socket = UnixStream::connect(self.dir.path().join("stats.sock"))?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        socket.write_all(b"show info\n")?;
        let mut info = String::new();
        socket.read_to_string(&mut info)?;
        Ok(info)
    }
}

impl Running for HaProxy {
    fn pids(&self) -> Vec<u32> {
        vec![self.process.pid()]
    }

    fn said(&self) -> String {
        fs::read_to_string(self.dir.path().join(LOG)).unwrap_or_default()
    }

    fn proof(&mut self) -> anyhow::Result<Proof> {
        let info = self.info().context("HAProxy's stats socket does not answer")?;
        // "Splicded" is how every series so far writes it; the other spelling is for the day when that is mended.
        let spliced = ["TotalSplicdedBytesOut", "TotalSplicedBytesOut"];
        number(&info, "TotalBytesOut")
            .zip(spliced.iter().find_map(|name| number(&info, name)))
            .map(|(out, spliced)| {
                Proof::from([("bytes out".to_owned(), out), ("bytes spliced".to_owned(), spliced)])
            })
            .with_context(|| format!("HAProxy does not say what it spliced:\n{info}"))
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
    fn only_the_splicing_one_is_told_of_pipes() {
        let splice = configuration(Carry::Splice, 2, Path::new("/d"));
        assert!(splice.contains("option splice-response") && splice.contains("tune.pipesize 1048576"));
        assert!(splice.contains("nbthread 2"));
        let copy = configuration(Carry::Copy, 1, Path::new("/d"));
        assert!(!copy.contains("splice") && !copy.contains("pipesize"));
        assert!(copy.contains("server mail 10.25.0.2:7001 send-proxy-v2"), "{copy}");
    }
}
