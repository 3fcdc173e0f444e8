//! A flood of SYNs in a victim's name: the limits of its source must not keep the victim itself out.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use etherparse::PacketBuilder;
use injector_testbed::daemon::Injector;
use injector_testbed::netns::{Family, MAIL, Netns};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::Run;
use crate::testbed::{Testbed, listeners, wait_for};

pub(crate) const TRIALS: &[(&str, Run)] =
    &[("forged SYNs in a victim's name, and the victim is served by every engine", served)];

/// Beside the client's address, on its host.
const VICTIM: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 8);
/// The source ports of forged SYNs. The victim does not answer there: a reset would end the handshakes.
const FORGED_PORTS: std::ops::Range<u16> = 1024..20_000;
/// Forged SYNs to each listener, in a second, at most.
const RATE: u32 = 2000;
/// The limit of a source.
const LIMIT: usize = 10;
/// How many sessions the victim opens with each engine, and keeps.
const EACH: usize = 3;
/// Of this trial's own backend.
const BACKEND_PORT: u16 = 12600;
const TIMEOUT: Duration = Duration::from_secs(10);

const ENGINES: [&str; 3] = ["splice", "relay", "inline"];

fn served(testbed: &Testbed) -> anyhow::Result<()> {
    let client = &testbed.topology.client;
    let _victim = Victim::new(client)?;
    let address = SocketAddr::new(MAIL.of(Family::V4), BACKEND_PORT);
    let backend = testbed.topology.mail.listen(address)?;
    let guard =
        format!("max_connections_per_source = {LIMIT}\nmax_rate_per_source = 5\nburst_per_source = 20");
    let config = testbed.config(&ENGINES, &guard).replace(":12500\"", &format!(":{BACKEND_PORT}\""));
    let injector = Injector::start(&testbed.topology.edge, &config)?;
    let (over, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| client.run(|| flood(&over, &sent))?);
        let serving = scope.spawn(|| greet_all(&backend, &over));
        let outcome = under_flood(&injector, &sent).and_then(|()| client.run(sessions)?);
        over.store(true, Ordering::Relaxed);
        let (flood, serving) = (flood.join(), serving.join());
        for ended in [flood, serving] {
            ended.map_err(|_| anyhow::anyhow!("panicked"))??;
        }
        outcome.with_context(|| format!("{} forged SYNs; {}", sent.load(Ordering::Relaxed), injector.log()))
    })
}

/// Waits until the flood has taken what the victim's source may have with inline.
fn under_flood(injector: &Injector, sent: &AtomicU64) -> anyhow::Result<()> {
    wait_for("forged SYNs above the limit", || {
        let above =
            injector.metrics()?.sum("injector_bpf_events_total", &[("event", "to_socket_source_limit")]);
        Ok(above > 0.0 && sent.load(Ordering::Relaxed) > 1000)
    })
}

/// The victim's sessions, up to its limit and beyond it.
fn sessions() -> anyhow::Result<()> {
    let all = listeners(&ENGINES, Family::V4);
    let mut open = Vec::new();
    for address in all.iter().flat_map(|address| std::iter::repeat_n(*address, EACH)).chain([all[0]]) {
        let (stream, line) = session(address)?;
        ensure!(
            line.starts_with("220"),
            "{address}: {} sessions are open, and the next gets {line:?}",
            open.len()
        );
        open.push(stream);
    }
    ensure!(open.len() == LIMIT, "{} sessions", open.len());
    for address in all {
        let (_, line) = session(address)?;
        ensure!(line.starts_with("421 4.7.0 Too many connections"), "{address}: above the limit: {line:?}");
    }
    Ok(())
}

/// A connection of the victim, and the first line that it gets.
fn session(address: SocketAddr) -> anyhow::Result<(TcpStream, String)> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SockAddr::from(SocketAddrV4::new(VICTIM, 0)))?;
    socket.connect_timeout(&address.into(), TIMEOUT).with_context(|| address.to_string())?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    let stream = TcpStream::from(socket);
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).with_context(|| address.to_string())?;
    Ok((stream, line))
}

/// Greets every client, and keeps its connection.
fn greet_all(backend: &TcpListener, over: &AtomicBool) -> anyhow::Result<()> {
    backend.set_nonblocking(true)?;
    let mut open = Vec::new();
    while !over.load(Ordering::Relaxed) {
        match backend.accept() {
            Ok((mut stream, _)) => {
                stream.write_all(b"220 hello\r\n")?;
                open.push(stream);
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    Ok(())
}

/// Sends SYNs in the victim's name to all listeners.
fn flood(over: &AtomicBool, sent: &AtomicU64) -> anyhow::Result<()> {
    // The packet has its own IP header: raw(7), IPPROTO_RAW.
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    let targets = listeners(&ENGINES, Family::V4);
    for (port, sequence) in FORGED_PORTS.cycle().zip(0_u32..) {
        if over.load(Ordering::Relaxed) {
            break;
        }
        for target in &targets {
            let SocketAddr::V4(target) = target else { bail!("{target} is not IPv4") };
            let packet = PacketBuilder::ipv4(VICTIM.octets(), target.ip().octets(), 64)
                .tcp(port, target.port(), sequence.wrapping_mul(7919), 64240)
                .syn();
            let mut bytes = Vec::with_capacity(packet.size(0));
            packet.write(&mut bytes, &[])?;
            // A full queue loses it.
            if socket.send_to(&bytes, &SockAddr::from(*target)).is_ok() {
                sent.fetch_add(1, Ordering::Relaxed);
            }
        }
        std::thread::sleep(Duration::from_secs(1) / RATE);
    }
    Ok(())
}

/// The victim's address, on the client's host. Answers to forged SYNs are dropped there.
struct Victim<'a>(&'a Netns);

impl<'a> Victim<'a> {
    fn new(client: &'a Netns) -> anyhow::Result<Self> {
        client.ip(&["address", "add", &format!("{VICTIM}/24"), "dev", "eth0"])?;
        let victim = Self(client);
        client.nft(&format!(
            "add table ip victim; add chain ip victim input {{ type filter hook input priority 0; }}; \
             add rule ip victim input ip daddr {VICTIM} tcp dport {}-{} drop",
            FORGED_PORTS.start,
            FORGED_PORTS.end - 1
        ))?;
        Ok(victim)
    }
}

impl Drop for Victim<'_> {
    fn drop(&mut self) {
        let removed = self.0.nft("delete table ip victim");
        let address = self.0.ip(&["address", "del", &format!("{VICTIM}/24"), "dev", "eth0"]);
        if let Err(error) = removed.and(address) {
            eprintln!("{error:#}");
        }
    }
}
