//! Backends with names: how they are looked up, and which of their addresses get connections.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use injector_testbed::daemon::Injector;
use injector_testbed::netns::{self, MAIL};
use injector_testbed::wait::wait_until;

use crate::Run;
use crate::testbed::{BACKEND_PORTS, Config, Testbed};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("a final dot keeps the search list out", final_dot),
    ("rotated answers are not logged, other addresses are", rotated),
    ("a name server that does not answer is asked once at a time", silent_name_server),
    ("an address that does not answer costs the first client a moment", dead_address),
];

/// Runs the daemon with other files in place of some in /etc, which only its mount namespace sees.
fn start(testbed: &Testbed, etc: &[(&str, String)], config: &Config) -> anyhow::Result<Injector> {
    let dir = netns::scratch_dir("etc")?;
    let mut script = "set -e\n".to_owned();
    for (name, contents) in etc {
        let file = dir.path().join(name);
        std::fs::write(&file, contents)?;
        script += &format!("mount --bind {} /etc/{name}\n", file.display());
    }
    let file = dir.path().join("run.sh");
    std::fs::write(&file, script + "eval \"$1\"\n")?;
    let file = file.display().to_string();
    Injector::start_by(&testbed.topology.edge, &["unshare", "--mount", "sh", &file], &config.text())
}

fn resolv_conf() -> (&'static str, String) {
    ("resolv.conf", format!("search example.test\noptions ndots:5\nnameserver {}\n", MAIL.v4))
}

/// A name server that knows `mail.internal` and everything below `example.test`.
struct NameServer {
    over: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
    /// The names that it was asked for.
    asked: Arc<Mutex<Vec<String>>>,
    /// It answers nothing.
    silent: Arc<AtomicBool>,
    /// The addresses of `mail.internal`, rotated by one with each answer.
    addresses: Arc<Mutex<Vec<Ipv4Addr>>>,
}

impl NameServer {
    fn start(testbed: &Testbed, addresses: &[Ipv4Addr]) -> anyhow::Result<Self> {
        let socket = testbed.topology.mail.run(|| UdpSocket::bind((MAIL.v4, 53)))??;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        let over = Arc::new(AtomicBool::new(false));
        let (asked, addresses) = (Arc::default(), Arc::new(Mutex::new(addresses.to_vec())));
        let mut server = Self { over, thread: None, asked, silent: Arc::default(), addresses };
        let (over, silent) = (Arc::clone(&server.over), Arc::clone(&server.silent));
        let (asked, addresses) = (Arc::clone(&server.asked), Arc::clone(&server.addresses));
        let thread = thread::spawn(move || {
            let mut query = [0; 512];
            while !over.load(Ordering::Relaxed) {
                let Ok((len, from)) = socket.recv_from(&mut query) else { continue };
                let Some((name, kind, end)) = question(&query[..len]) else { continue };
                asked.lock().unwrap_or_else(PoisonError::into_inner).push(name.clone());
                if silent.load(Ordering::Relaxed) {
                    continue;
                }
                let mut addresses = addresses.lock().unwrap_or_else(PoisonError::into_inner);
                let found = match name.as_str() {
                    "mail.internal" if kind == 1 => {
                        addresses.rotate_left(1);
                        addresses.clone()
                    }
                    name if name.ends_with(".example.test") && kind == 1 => vec![Ipv4Addr::LOCALHOST],
                    _ => Vec::new(),
                };
                let exists = name == "mail.internal" || name.ends_with(".example.test");
                let _ = socket.send_to(&reply(&query[..end], exists, &found), from);
            }
        });
        server.thread = Some(thread);
        Ok(server)
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_addresses(&self, addresses: &[Ipv4Addr]) {
        *self.addresses.lock().unwrap_or_else(PoisonError::into_inner) = addresses.to_vec();
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The name, the type, and the end of the question (RFC 1035, section 4.1.2).
fn question(query: &[u8]) -> Option<(String, u16, usize)> {
    let (mut at, mut labels) = (12, Vec::new());
    loop {
        let len = usize::from(*query.get(at)?);
        if len == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(query.get(at + 1..at + 1 + len)?).to_lowercase());
        at += 1 + len;
    }
    let kind = u16::from_be_bytes(query.get(at + 1..at + 3)?.try_into().ok()?);
    Some((labels.join("."), kind, at + 5))
}

/// The answer with these addresses, which may not be cached (RFC 1035, section 4.1).
fn reply(question: &[u8], exists: bool, addresses: &[Ipv4Addr]) -> Vec<u8> {
    let flags: u16 = if exists { 0x8180 } else { 0x8183 };
    let count = u16::try_from(addresses.len()).unwrap_or_default();
    let mut reply = question[..2].to_vec();
    for word in [flags, 1, count, 0, 0] {
        reply.extend(word.to_be_bytes());
    }
    reply.extend(&question[12..]);
    for address in addresses {
        reply.extend([0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
        reply.extend(address.octets());
    }
    reply
}

fn named(engine: &str, name: &str) -> Config {
    let mut config = Config::new(engine);
    config.backends = format!("\"{name}:{}\"", BACKEND_PORTS[0]);
    config
}

/// The search list has the name below `example.test`, at another host.
fn final_dot(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let names = NameServer::start(testbed, &[MAIL.v4])?;
    let injector = start(testbed, &[resolv_conf()], &named(engine, "mail.internal."))?;
    ensure!(testbed.who_answers()? == 0);
    let asked: BTreeSet<_> = names.asked().into_iter().collect();
    ensure!(asked == BTreeSet::from(["mail.internal".to_owned()]), "{asked:?}");
    drop(injector);
    // Without the dot the search list is asked first: the trial would notice the difference.
    let _injector = start(testbed, &[resolv_conf()], &named(engine, "mail.internal"))?;
    wait_until(
        "names",
        || Ok(names.asked()),
        |asked| asked.contains(&"mail.internal.example.test".to_owned()),
    )
    .map(drop)
}

/// Each lookup occupies a thread for seconds: clients must not begin their own.
fn silent_name_server(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let names = NameServer::start(testbed, &[MAIL.v4])?;
    names.silent.store(true, Ordering::Relaxed);
    let mut config = named(engine, "mail.internal.");
    config.listener = "[listener.timeouts]\nconnect = \"200ms\"\n".to_owned();
    let _injector = start(testbed, &[resolv_conf()], &config)?;
    thread::scope(|scope| -> anyhow::Result<()> {
        let client = || -> anyhow::Result<()> {
            let line = testbed.client()?.line()?;
            ensure!(line.starts_with("421 4.3.2 Mail service not available"), "{line:?}");
            Ok(())
        };
        let clients: Vec<_> = (0..20).map(|_| scope.spawn(client)).collect();
        for client in clients {
            client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(())
    })?;
    // For A and AAAA.
    let asked = names.asked().len();
    ensure!(asked <= 4, "asked {asked} times for one name");
    names.silent.store(false, Ordering::Relaxed);
    wait_until("the backend", || testbed.who_answers(), |number| *number == 0).map(drop)
}

fn rotated(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let others = [Ipv4Addr::new(10, 25, 0, 201), Ipv4Addr::new(10, 25, 0, 202)];
    let names = NameServer::start(testbed, &[MAIL.v4, others[0]])?;
    let mut config = named(engine, "mail.internal.");
    config.listener = "resolve_interval = \"50ms\"\n".to_owned();
    let injector = start(testbed, &[resolv_conf()], &config)?;
    let resolved = |count: usize| {
        let logged = || Ok(injector.log().matches("backend name resolved").count());
        wait_until("lines", logged, |found| *found >= count).context("no line about the addresses")
    };
    resolved(1)?;
    let asked = names.asked().len();
    wait_until("queries", || Ok(names.asked().len()), |now| *now >= asked + 12)?;
    ensure!(resolved(1)? == 1, "{}", injector.log());
    names.set_addresses(&[MAIL.v4, others[1]]);
    ensure!(resolved(2)? == 2, "{}", injector.log());
    let status = injector.status()?;
    let addresses = status["listeners"][0]["backends"][0]["addresses"].to_string();
    ensure!(addresses.contains("10.25.0.202") && !addresses.contains("10.25.0.201"), "{addresses}");
    Ok(())
}

/// The first address of the name belongs to no host: neighbour discovery takes seconds to fail.
fn dead_address(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let hosts = format!("127.0.0.1 localhost\nfd25::dead mail.internal\n{} mail.internal\n", MAIL.v4);
    let etc = [("hosts", hosts)];
    let dead: SocketAddr = format!("[fd25::dead]:{}", BACKEND_PORTS[0]).parse()?;
    for check in ["none", "tcp"] {
        let mut config = named(engine, "mail.internal");
        config.listener = format!("[listener.health]\ncheck = \"{check}\"\n");
        let injector = start(testbed, &etc, &config)?;
        let mut times = Vec::new();
        for _ in 0..6 {
            let start = Instant::now();
            ensure!(testbed.who_answers()? == 0);
            times.push(start.elapsed());
        }
        let (first, mut later) = (times[0], times[1..].to_vec());
        later.sort_unstable();
        ensure!(first < Duration::from_millis(1500), "the first client waited: {times:?}");
        // Each would wait for 250 ms. On a busy machine a few take as long.
        ensure!(later[later.len() / 2] < Duration::from_millis(200), "later clients waited: {times:?}");
        let status = injector.status()?;
        let backend = &status["listeners"][0]["backends"][0];
        ensure!(backend["state"] == "up", "{backend:#}");
        ensure!(backend["failing_addresses"] == serde_json::json!([dead.to_string()]), "{backend:#}");
        ensure!(
            backend["addresses"][0] == dead.to_string(),
            "the dead address is not the first: {backend:#}"
        );
    }
    Ok(())
}
