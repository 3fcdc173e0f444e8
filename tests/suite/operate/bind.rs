//! `[::]` is for both families, also where the host or systemd has it otherwise.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use injector_testbed::daemon::Injector;
use injector_testbed::netns::VIP_SPLICE;
use injector_testbed::sockets::LIMIT;

use crate::Run;
use crate::testbed::{Config, PORT, Testbed};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("[::] accepts IPv4 where net.ipv6.bindv6only is set", sysctl),
    ("a socket of systemd for IPv6 alone is complemented", complemented),
];

fn v4() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(VIP_SPLICE.v4), PORT)
}

fn v6() -> SocketAddr {
    SocketAddr::new(IpAddr::V6(VIP_SPLICE.v6), PORT)
}

/// net.ipv6.bindv6only of the edge host, until it is dropped.
struct BindV6Only<'a>(&'a Testbed);

impl<'a> BindV6Only<'a> {
    fn set(testbed: &'a Testbed) -> anyhow::Result<Self> {
        Self::write(testbed, "1")?;
        Ok(Self(testbed))
    }

    fn write(testbed: &Testbed, value: &str) -> anyhow::Result<()> {
        Ok(testbed.topology.edge.run(|| std::fs::write("/proc/sys/net/ipv6/bindv6only", value))??)
    }
}

impl Drop for BindV6Only<'_> {
    fn drop(&mut self) {
        if let Err(error) = Self::write(self.0, "0") {
            eprintln!("net.ipv6.bindv6only: {error:#}");
        }
    }
}

fn wildcard(engine: &str) -> String {
    Config::new(engine).text().replace(&format!("\"{}:{PORT}\"", VIP_SPLICE.v4), &format!("\"[::]:{PORT}\""))
}

fn served(testbed: &Testbed, address: SocketAddr) -> anyhow::Result<()> {
    let mut client = testbed.connect(address)?;
    client.greeted()?;
    client.quit()
}

fn sysctl(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let _set = BindV6Only::set(testbed)?;
    let injector = testbed.start(&wildcard(engine))?;
    served(testbed, v6())?;
    served(testbed, v4())?;
    // The socket has IPv4 addresses as `::ffff:192.0.2.10`.
    let sessions = injector.sessions_within(2)?;
    for address in [v6(), v4()] {
        let logged = sessions.iter().any(|session| {
            session.field("local") == Some(address.to_string())
                && session.client().is_some_and(|client| client.is_ipv4() == address.is_ipv4())
        });
        ensure!(logged, "no session of {address} in its own family: {}", injector.log());
    }
    Ok(())
}

fn complemented(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let _set = BindV6Only::set(testbed)?;
    let listen = format!("--listen=[::]:{PORT}");
    let by = ["systemd-socket-activate", listen.as_str(), "sh", "-c"];
    // It starts the command when the first client connects.
    let knock = || {
        testbed.topology.client.run(|| {
            let deadline = Instant::now() + LIMIT;
            loop {
                match TcpStream::connect(v6()) {
                    Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(50)),
                    connected => return connected,
                }
            }
        })
    };
    let (first, injector) = thread::scope(|scope| {
        let first = scope.spawn(knock);
        let injector = Injector::start_by(&testbed.topology.edge, &by, &wildcard(engine));
        (first.join(), injector)
    });
    let injector = injector?;
    let first = first.map_err(|_| anyhow::anyhow!("the client panicked"))???;
    let mut first = crate::testbed::Client::new(first)?;
    first.greeted()?;
    first.quit()?;
    for _ in 0..4 {
        served(testbed, v6())?;
        served(testbed, v4())?;
    }
    ensure!(injector.log().contains("set BindIPv6Only=both"), "{}", injector.log());
    Ok(())
}
