//! nginx' stream module. It sends version 1 of the header, the only version it supports, and copies
//! in user space.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use injector_load::service::{ALL, PortKind};
use tempfile::TempDir;

use super::{Address, RunningSystem, System};
use crate::mail_sink;
use crate::testbed::{Testbed, mail};
use injector_testbed::netns::{self, VIP_HAPROXY};
use injector_testbed::process::Process;

pub(super) fn system(program: &Path, modules: &Path) -> System {
    let (program, modules) = (program.to_owned(), modules.to_owned());
    System {
        name: "nginx".to_owned(),
        about: "nginx stream, two workers; its header is PROXY version 1, the only one it supports"
            .to_owned(),
        port_kind: PortKind::Header,
        config: configuration(&modules, Path::new("DIR")),
        baseline: None,
        bans_attacker_at: None,
        address: Address::Edge(VIP_HAPROXY),
        start: Box::new(move |testbed| Ok(Box::new(Nginx::start(testbed, &program, &modules)?))),
    }
}

fn configuration(modules: &Path, dir: &Path) -> String {
    let mut text = format!(
        "load_module {}/ngx_stream_module.so;
daemon off;
user root;
pid {dir}/nginx.pid;
error_log {dir}/error.log warn;
worker_processes 2;
worker_rlimit_nofile 20000;
events {{
    worker_connections 19000;
}}
stream {{
    proxy_protocol on;
",
        modules.display(),
        dir = dir.display()
    );
    let ports = ALL.iter().map(|service| service.port).chain([mail_sink::PROXIED]);
    for port in ports {
        let (bind, backend) = (format!("{}:{port}", VIP_HAPROXY.v4), mail(port));
        // Writing to a String cannot fail. Backlog and reuseport follow nginx' advice for many
        // short sessions.
        let _ =
            writeln!(text, "    server {{ listen {bind} reuseport backlog=16384; proxy_pass {backend}; }}");
    }
    text.push_str("}\n");
    text
}

/// A running nginx.
#[derive(Debug)]
struct Nginx {
    // Before the directory: fields are dropped in this order.
    process: Process,
    dir: TempDir,
}

impl Nginx {
    fn start(testbed: &Testbed, program: &Path, modules: &Path) -> anyhow::Result<Self> {
        let dir = netns::scratch_dir("nginx")?;
        let config = dir.path().join("nginx.conf");
        fs::write(&config, configuration(modules, dir.path()))?;
        let log = dir.path().join("nginx.out");
        let edge = &testbed.topology.edge;
        let mut command = edge.command(program);
        command.arg("-e").arg(dir.path().join("error.log")).arg("-c").arg(&config);
        let mut process = Process::start("nginx", edge, command, &log)?;
        let sockets = ALL.map(|service| (VIP_HAPROXY.v4, service.port).into());
        process
            .wait_listening(edge, &sockets, Duration::from_secs(10))
            .with_context(|| format!("nginx printed:\n{}", fs::read_to_string(&log).unwrap_or_default()))?;
        Ok(Self { process, dir })
    }
}

impl RunningSystem for Nginx {
    fn pids(&self) -> Vec<u32> {
        let master = self.process.pid();
        let path = format!("/proc/{master}/task/{master}/children");
        let children = fs::read_to_string(path).unwrap_or_default();
        let workers = children.split_whitespace().filter_map(|pid| pid.parse().ok());
        std::iter::once(master).chain(workers).collect()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("error.log")).unwrap_or_default()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // A master that shuts down stops its workers; one that is killed leaves them running.
        let workers = self.pids();
        let _ = self.process.signal(libc::SIGTERM);
        let deadline = std::time::Instant::now() + Duration::from_secs(3);
        while std::time::Instant::now() < deadline && self.process.ensure_running().is_ok() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let left = workers.iter().filter(|pid| Path::new("/proc").join(pid.to_string()).exists()).count();
        if left > 0 {
            eprintln!("bench: {left} processes of nginx are still running; they end with their namespace");
        }
    }
}
