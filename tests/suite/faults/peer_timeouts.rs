//! Peers that disappear: no FIN, no RST, no acknowledgement. The kernel times them out within the
//! configured time, on every data path, and the other side is reset.

use std::io::{ErrorKind, Write};
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::ensure;
use injector_testbed::netns::{EDGE_INSIDE, Family, Netns, VIP_SPLICE};
use injector_testbed::sockets::LIMIT;

use crate::Run;
use crate::testbed::{Ending, Testbed, ended, ending};
use crate::transfers::{joined, pattern};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("peer timeout/client, data in flight", |testbed, engine| with_data(testbed, engine, Side::Client)),
    ("peer timeout/backend, data in flight", |testbed, engine| with_data(testbed, engine, Side::Backend)),
    ("peer timeout/client, idle", |testbed, engine| while_idle(testbed, engine, Side::Client)),
    ("peer timeout/backend, idle", |testbed, engine| while_idle(testbed, engine, Side::Backend)),
    ("peer timeout/client alive, but reads nothing for too long", closed_window),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Backend,
}

impl Side {
    const fn end(self) -> &'static str {
        match self {
            Self::Client => "client_timed_out",
            Self::Backend => "backend_timed_out",
        }
    }
}

/// While this exists, no packet leaves the namespace towards an address, not even an
/// acknowledgement.
pub(crate) struct Silence<'a> {
    netns: &'a Netns,
    route: String,
}

impl<'a> Silence<'a> {
    fn of(netns: &'a Netns, towards: IpAddr) -> anyhow::Result<Self> {
        let route = format!("{towards}/32");
        netns.ip(&["route", "add", "blackhole", &route])?;
        Ok(Self { netns, route })
    }

    pub(crate) fn of_side(testbed: &'a Testbed, side: Side) -> anyhow::Result<Self> {
        match side {
            Side::Client => Self::of(&testbed.topology.client, VIP_SPLICE.of(Family::V4)),
            Side::Backend => Self::of(&testbed.topology.mail, EDGE_INSIDE.of(Family::V4)),
        }
    }
}

impl Drop for Silence<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.netns.ip(&["route", "del", "blackhole", &self.route]) {
            eprintln!("{error:#}");
        }
    }
}

/// The side that disappears, and the remaining side.
fn sides(side: Side, client: TcpStream, server: TcpStream) -> (TcpStream, TcpStream) {
    match side {
        Side::Client => (client, server),
        Side::Backend => (server, client),
    }
}

/// The remaining side is reset within this time.
fn check_reset(
    remaining: &mut TcpStream,
    since: Instant,
    after: Duration,
    before: Duration,
) -> anyhow::Result<()> {
    let end = ending(remaining)?;
    let took = since.elapsed();
    println!("  the other side was reset after {took:?}");
    ensure!(end == Ending::Reset(Vec::new()), "{end:?} in place of a reset");
    ensure!(took > after && took < before, "reset after {took:?}, not between {after:?} and {before:?}");
    Ok(())
}

/// Sent data is not acknowledged. Keepalive would detect the loss much later.
fn with_data(testbed: &Testbed, engine: &str, side: Side) -> anyhow::Result<()> {
    let extra = "[listener.timeouts]\nuser_timeout = \"1s\"\nkeepalive = \"1h\"";
    let (injector, client, server) = joined(testbed, engine, extra)?;
    let (gone, mut remaining) = sides(side, client, server);
    let silence = Silence::of_side(testbed, side)?;
    let start = Instant::now();
    remaining.write_all(&pattern(61, 10_000))?;
    check_reset(&mut remaining, start, Duration::from_millis(900), LIMIT)?;
    let session = ended(&injector, side.end())?;
    ensure!(session.field("error").is_some(), "{session:?}");
    drop(silence);
    drop(gone);
    Ok(())
}

/// Both sides are idle; the keepalive probes get no response.
fn while_idle(testbed: &Testbed, engine: &str, side: Side) -> anyhow::Result<()> {
    let extra = "[listener.timeouts]\nuser_timeout = \"2s\"\nkeepalive = \"1s\"";
    let (injector, client, server) = joined(testbed, engine, extra)?;
    let (gone, mut remaining) = sides(side, client, server);
    // While both sides respond, neither times out.
    std::thread::sleep(Duration::from_millis(2500));
    ensure!(injector.sessions()?.is_empty(), "given up although it answers");
    let silence = Silence::of_side(testbed, side)?;
    check_reset(&mut remaining, Instant::now(), Duration::from_millis(500), LIMIT)?;
    ended(&injector, side.end())?;
    drop(silence);
    drop(gone);
    Ok(())
}

/// A client that acknowledges, with a zero window, times out after the user timeout as well.
fn closed_window(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (injector, client, mut server) =
        joined(testbed, engine, "[listener.timeouts]\nuser_timeout = \"1s\"")?;
    let bytes = pattern(67, 1 << 20);
    let start = Instant::now();
    let error = loop {
        if let Err(error) = server.write_all(&bytes) {
            break error;
        }
    };
    println!("  the sender was reset after {:?}", start.elapsed());
    ensure!(error.kind() == ErrorKind::ConnectionReset, "{error}");
    ended(&injector, "client_timed_out")?;
    drop(client);
    Ok(())
}
