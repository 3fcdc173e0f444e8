//! The protocols of systemd, without systemd: a notification socket of the test, and
//! `systemd-socket-activate`.

use std::collections::VecDeque;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use anyhow::ensure;
use injector_testbed::netns;
use injector_testbed::sockets::LIMIT;

use crate::Run;
use crate::testbed::{Config, PORT, Testbed};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("notified of start, reload, liveness and stop", notified),
    ("a socket that systemd opened is adopted", taken_over),
];

/// The receiving side of the notification socket.
struct NotifySocket {
    socket: UnixDatagram,
    received: VecDeque<String>,
}

impl NotifySocket {
    /// Waits for a line.
    fn expect(&mut self, line: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            if let Some(at) = self.received.iter().position(|received| received.starts_with(line)) {
                self.received.drain(..=at);
                return Ok(());
            }
            let mut bytes = [0; 4096];
            if let Ok(count) = self.socket.recv(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
                self.received.extend(text.lines().map(str::to_owned));
            }
        }
        anyhow::bail!("{line:?} was not received, but {:?}", self.received)
    }
}

fn notified(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let dir = netns::scratch_dir("notify")?;
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut systemd = NotifySocket { socket, received: VecDeque::new() };
    let variables = format!("NOTIFY_SOCKET={} WATCHDOG_USEC=1000000 sh -c", path.display());
    let by: Vec<_> = ["env"].into_iter().chain(variables.split(' ')).collect();
    let config = Config::new(engine);
    let mut injector =
        injector_testbed::daemon::Injector::start_by(&testbed.topology.edge, &by, &config.text())?;
    systemd.expect("READY=1")?;
    systemd.expect("STATUS=serving")?;
    systemd.expect("WATCHDOG=1")?;
    systemd.expect("WATCHDOG=1")?;
    injector.command(&["reload"])?;
    systemd.expect("RELOADING=1")?;
    systemd.expect("MONOTONIC_USEC=")?;
    systemd.expect("READY=1")?;
    injector.ask_to_stop()?;
    systemd.expect("STOPPING=1")?;
    let (status, log) = injector.wait_stopped()?;
    ensure!(status.success(), "{log}");
    Ok(())
}

/// systemd puts the name into the environment of a service that it starts for its sockets.
fn taken_over(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let config = Config::new(engine);
    let address = format!("--listen={}:{PORT}", injector_testbed::netns::VIP_SPLICE.v4);
    // It starts the command when the first client connects.
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
    // Clients that connected before the daemon started are served, and so are all later ones, by
    // any thread.
    let mut first = crate::testbed::Client::new(first)?;
    first.greeted()?;
    first.quit()?;
    for _ in 0..10 {
        testbed.who_answers()?;
    }
    // `systemd-socket-activate` writes to the same log, but not in JSON.
    let accepted = injector.status()?["listeners"][0]["accepted"].clone();
    ensure!(accepted == 11, "{accepted}");
    ensure!(!injector.log().contains("systemd passed a socket"), "{}", injector.log());
    Ok(())
}
