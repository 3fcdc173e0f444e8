//! The protocols of systemd, without systemd: a socket in place of its own, and its `systemd-socket-activate`.

use std::collections::VecDeque;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use anyhow::ensure;
use injector_testbed::netns;
use injector_testbed::sockets::LIMIT;

use crate::Run;
use crate::testbed::{Config, PORT, Testbed};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("notified of start, reload, liveness and stop", told),
    ("a socket that systemd opened is adopted", taken_over),
];

/// What stands in for systemd's end.
struct Notified {
    socket: UnixDatagram,
    heard: VecDeque<String>,
}

impl Notified {
    /// Waits for a line.
    fn hear(&mut self, line: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if let Some(at) = self.heard.iter().position(|heard| heard.starts_with(line)) {
                self.heard.drain(..=at);
                return Ok(());
            }
            let mut bytes = [0; 4096];
            if let Ok(count) = self.socket.recv(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
                self.heard.extend(text.lines().map(str::to_owned));
            }
        }
        anyhow::bail!("never told {line:?}, but {:?}", self.heard)
    }
}

fn told(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let dir = netns::scratch_dir("notify")?;
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut systemd = Notified { socket, heard: VecDeque::new() };
    let variables = format!("NOTIFY_SOCKET={} WATCHDOG_USEC=1000000 sh -c", path.display());
    let by: Vec<_> = ["env"].into_iter().chain(variables.split(' ')).collect();
    let config = Config::new(engine);
    let mut injector =
        injector_testbed::daemon::Injector::start_by(&testbed.topology.edge, &by, &config.text())?;
    systemd.hear("READY=1")?;
    systemd.hear("STATUS=serving")?;
    systemd.hear("WATCHDOG=1")?;
    systemd.hear("WATCHDOG=1")?;
    injector.command(&["reload"])?;
    systemd.hear("RELOADING=1")?;
    systemd.hear("MONOTONIC_USEC=")?;
    systemd.hear("READY=1")?;
    injector.ask_to_stop()?;
    systemd.hear("STOPPING=1")?;
    let (status, log) = injector.wait_stopped()?;
    ensure!(status.success(), "{log}");
    Ok(())
}

/// The name is in the environment of a service that systemd starts for its sockets.
fn taken_over(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let config = Config::new(engine);
    let address = format!("--listen={}:{PORT}", injector_testbed::netns::VIP_SPLICE.v4);
    // It starts what it is told when the first client comes.
    let by = ["systemd-socket-activate", address.as_str(), "sh", "-c"];
    let knock = || {
        let address = (injector_testbed::netns::VIP_SPLICE.v4, PORT);
        testbed.topology.client.run(|| {
            let deadline = Instant::now() + LIMIT;
            loop {
                match std::net::TcpStream::connect(address) {
                    Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(50)),
                    connected => return connected,
                }
            }
        })
    };
    let (first, injector) = std::thread::scope(|scope| {
        let first = scope.spawn(knock);
        let injector =
            injector_testbed::daemon::Injector::start_by(&testbed.topology.edge, &by, &config.text());
        (first.join(), injector)
    });
    let injector = injector?;
    let first = first.map_err(|_| anyhow::anyhow!("the client panicked"))???;
    // Who came before the daemon did is served, and so is everybody after that, whichever thread takes them.
    let mut first = crate::testbed::Client::new(first)?;
    first.greeted()?;
    first.quit()?;
    for _ in 0..10 {
        testbed.who_answers()?;
    }
    // What starts it writes to the same log, and not in JSON.
    let accepted = injector.status()?["listeners"][0]["accepted"].clone();
    ensure!(accepted == 11, "{accepted}");
    ensure!(!injector.log().contains("systemd listens there"), "{}", injector.log());
    Ok(())
}
