//! SIGTERM: no new connections, active ones finish, and the process exits successfully.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use injector_testbed::daemon::{self, Injector};
use injector_testbed::forward::Forward;
use injector_testbed::netns::Family;
use injector_testbed::service::SMTP;

use crate::external::{HARMLESS_ENDS, LIMIT};
use crate::testbed::{Front, Testbed};

/// A port on the public address that the shared instance does not use.
const PORT: u16 = 8025;
/// Metrics of the stopped instance.
const METRICS_PORT: u16 = 9199;

/// A session that has received its banner continues after SIGTERM, while the port is closed to
/// others.
pub(crate) fn sessions_finish(testbed: &Testbed, front: Front) -> anyhow::Result<()> {
    let mut forward = Forward::to_mail(front.vip, SMTP, Family::V4);
    forward.bind.set_port(PORT);
    let address = forward.bind;
    let metrics = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), METRICS_PORT);
    let config = daemon::configuration(&[forward], front.engine, metrics);
    let mut injector = Injector::start(&testbed.topology.edge, &config)?;

    let client = testbed.topology.client.run(|| -> anyhow::Result<SocketAddr> {
        let mut session = BufReader::new(TcpStream::connect(address)?);
        session.get_ref().set_read_timeout(Some(LIMIT))?;
        expect(&mut session, "220")?;
        injector.ask_to_stop()?;
        wait_refused(address)?;
        session.get_ref().write_all(b"QUIT\r\n")?;
        expect(&mut session, "221")?;
        Ok(session.get_ref().local_addr()?)
    });
    // Whatever the client saw, the log has more.
    let (status, log) = injector.wait_stopped()?;
    let client = client?.with_context(|| format!("the injector logged:\n{log}"))?;
    ensure!(status.success(), "ended with {status} and logged:\n{log}");
    let sessions = daemon::parse_sessions(&log)?;
    let ends: Vec<_> = sessions.iter().filter(|session| session.client() == Some(client)).collect();
    let [session] = ends[..] else { bail!("not one line for {client} in:\n{log}") };
    let end = session.field("reason").unwrap_or_default();
    ensure!(HARMLESS_ENDS.contains(&end.as_str()), "ended with {end:?}: {session:?}");
    Ok(())
}

/// Reads one line of a reply.
fn expect(session: &mut BufReader<TcpStream>, code: &str) -> anyhow::Result<()> {
    let mut line = String::new();
    session.read_line(&mut line)?;
    ensure!(line.starts_with(code), "{line:?} where {code} was expected");
    Ok(())
}

fn wait_refused(address: SocketAddr) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        if TcpStream::connect(address).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{address} still takes connections {LIMIT:?} after SIGTERM");
        thread::sleep(Duration::from_millis(50));
    }
}
