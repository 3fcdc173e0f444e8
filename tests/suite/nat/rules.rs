//! Where connections go.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use injector_testbed::netns::{CLIENT, EDGE_OUTSIDE, Family, MAIL, VIP_INLINE, VIP_RELAY};
use injector_user::engine::inline::nat::{Change, Service};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::testbed::{
    BACKEND_PORT, OTHER_MAIL, PORT, Testbed, backend, edge_inside, elsewhere, greeted, rules, service,
    socket, vip,
};

pub(crate) fn reaches(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let before = testbed.ask(vip(family));
    ensure!(before.is_err(), "somebody answers before there is a rule: {before:?}");
    testbed.apply(&[service()])?;
    let greeting = testbed.ask(vip(family))?;
    ensure!(greeting.server == SocketAddr::new(MAIL.of(family), BACKEND_PORT), "{greeting:?}");
    ensure!(greeting.client.ip() == CLIENT.of(family), "{greeting:?}");
    let other_port = SocketAddr::new(vip(family).ip(), PORT + 1);
    ensure!(testbed.ask(other_port).is_err(), "another port is sent on as well");
    let other_address = SocketAddr::new(VIP_RELAY.of(family), PORT);
    ensure!(testbed.ask(other_address).is_err(), "another address is sent on as well");
    Ok(())
}

/// A wildcard matches every address of the host, except addresses with their own rule, and no
/// forwarded traffic.
pub(crate) fn any_address(testbed: &Testbed) -> anyhow::Result<()> {
    let any = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    let any = Service { listen: any.map(|ip| SocketAddr::new(ip, PORT)).into(), ..elsewhere() };
    testbed.apply(&[any, service()])?;
    for family in Family::ALL {
        let cases = [
            (VIP_INLINE.of(family), MAIL),
            (VIP_RELAY.of(family), OTHER_MAIL),
            (EDGE_OUTSIDE.of(family), OTHER_MAIL),
        ];
        for (to, place) in cases {
            let greeting = testbed.ask(SocketAddr::new(to, PORT))?;
            ensure!(greeting.server.ip() == place.of(family), "{to}: {greeting:?}");
        }
        let standard = SocketAddr::new(MAIL.of(family), PORT);
        testbed.serve(&testbed.topology.mail, standard)?;
        let passing = testbed.ask(standard)?;
        ensure!(passing.server == standard, "{passing:?}");
    }
    Ok(())
}

/// 400 connections: 300 expected for the first backend, with a standard deviation of 8.7; the
/// limits are seven of those away.
pub(crate) fn weights(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backends = vec![backend(MAIL, family, 30), backend(OTHER_MAIL, family, 10)];
    testbed.apply(&[Service { listen: vec![vip(family)], backends, ..service() }])?;
    let mut first = 0;
    for _ in 0..400 {
        let greeting = testbed.ask(vip(family))?;
        ensure!(
            greeting.server.port() == BACKEND_PORT && greeting.client.ip() == CLIENT.of(family),
            "{greeting:?}"
        );
        first += u32::from(greeting.server.ip() == MAIL.of(family));
    }
    ensure!((240..=360).contains(&first), "{first} of 400 instead of about 300");
    Ok(())
}

/// Only where it is configured, with one backend and with several, at single addresses and at the
/// wildcard.
pub(crate) fn masquerade(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let any: IpAddr = match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let one = vec![backend(MAIL, family, 1)];
    let two = vec![backend(MAIL, family, 1), backend(OTHER_MAIL, family, 1)];
    for listen in [vip(family), SocketAddr::new(any, PORT)] {
        for backends in [&one, &two] {
            for masquerade in [true, false] {
                let service =
                    Service { listen: vec![listen], backends: backends.clone(), masquerade, ..service() };
                testbed.apply(&[service])?;
                let expected = if masquerade { edge_inside(family) } else { CLIENT.of(family) };
                for _ in 0..4 {
                    let greeting = testbed.ask(vip(family))?;
                    ensure!(
                        greeting.client.ip() == expected,
                        "{listen}, masquerade {masquerade}: {greeting:?}"
                    );
                }
            }
        }
    }
    testbed.apply(&[Service { masquerade: true, listen: vec![vip(family)], backends: two, ..service() }])?;
    let direct = testbed.ask(SocketAddr::new(MAIL.of(family), BACKEND_PORT))?;
    ensure!(
        direct.client.ip() == CLIENT.of(family),
        "a connection that was not sent on is masqueraded: {direct:?}"
    );
    Ok(())
}

/// A connection that starts on the edge reaches the edge's own listener, over `lo`.
pub(crate) fn own_connections(testbed: &Testbed) -> anyhow::Result<()> {
    let any = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    let any =
        Service { listen: any.map(|ip| SocketAddr::new(ip, PORT)).into(), masquerade: true, ..elsewhere() };
    testbed.apply(&[any, Service { masquerade: true, ..service() }])?;
    for family in Family::ALL {
        testbed.serve(&testbed.topology.edge, vip(family))?;
        let greeting = testbed.ask_from(&testbed.topology.edge, vip(family))?;
        ensure!(greeting.server == vip(family), "{greeting:?}");
        let greeting = testbed.ask(vip(family))?;
        ensure!(greeting.server.ip() == MAIL.of(family), "{greeting:?}");
    }
    Ok(())
}

/// All bytes come back from the first mail host, while the rules and finally the whole table
/// change.
pub(crate) fn during_a_transfer(testbed: &Testbed) -> anyhow::Result<()> {
    const PIECE: usize = 1 << 20;
    const PIECES: usize = 64;
    testbed.apply(&[service()])?;
    for family in Family::ALL {
        let socket = socket(&testbed.topology.client, vip(family))?;
        let (greeting, stream) = testbed.runtime.block_on(greeted(socket, vip(family)))?;
        ensure!(greeting.server.ip() == MAIL.of(family), "{greeting:?}");
        let transfer = testbed.runtime.spawn(async move {
            let (mut read, mut write) = tokio::io::split(stream);
            let mut pieces = 0;
            for number in 0..PIECES {
                let sent: Vec<u8> = (0..251_u8).cycle().skip(number).take(PIECE).collect();
                let mut back = vec![0; PIECE];
                tokio::try_join!(write.write_all(&sent), read.read_exact(&mut back))?;
                ensure!(sent == back, "piece {number} came back different");
                pieces += 1;
                // Slow enough to be in progress during every change below.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Ok(pieces)
        });
        for round in 0..10 {
            testbed.apply(&[if round % 2 == 0 { elsewhere() } else { service() }])?;
        }
        testbed.nft(&["add chain inet injector-test extra"])?;
        let remade = rules(&[elsewhere()])?;
        let change = testbed.on_edge(|| remade.apply())??;
        ensure!(change == Change::Remade, "{change:?}");
        ensure!(!transfer.is_finished(), "the transfer was over before the last change");
        let greeting = testbed.ask(vip(family))?;
        ensure!(greeting.server.ip() == OTHER_MAIL.of(family), "{greeting:?}");
        let end = async { timeout(Duration::from_secs(60), transfer).await.context("it stalls") };
        let pieces = testbed.runtime.block_on(end)???;
        ensure!(pieces == PIECES);
        testbed.apply(&[service()])?;
    }
    Ok(())
}

/// No server listens on the edge, so a connection that matches no rule would be refused.
pub(crate) fn no_gap(testbed: &Testbed) -> anyhow::Result<()> {
    const CLIENTS: usize = 8;
    const CHANGES: usize = 100;
    testbed.apply(&[service()])?;
    let over = Arc::new(AtomicBool::new(false));
    let client = testbed.topology.client.handle();
    let connecting: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (over, client) = (Arc::clone(&over), client.clone());
            let family = Family::ALL[number % 2];
            std::thread::spawn(move || client.run(|| connect_until(&over, vip(family)))?)
        })
        .collect();
    let (to_mail, to_other) = (rules(&[service()])?, rules(&[elsewhere()])?);
    let changes = testbed.on_edge(|| {
        for _ in 0..CHANGES / 2 {
            for rules in [&to_other, &to_mail] {
                let change = rules.apply()?;
                ensure!(change == Change::Replaced, "{change:?}");
            }
        }
        Ok(())
    });
    over.store(true, Ordering::Relaxed);
    let mut connections = 0;
    for thread in connecting {
        connections += thread.join().map_err(|_| anyhow!("a client panicked"))??;
    }
    changes??;
    ensure!(connections > CHANGES, "only {connections} connections, too few to have met a gap");
    Ok(())
}

/// One connection after another, in the calling thread's namespace; returns their number.
fn connect_until(over: &AtomicBool, to: SocketAddr) -> anyhow::Result<usize> {
    let mut connections = 0;
    while !over.load(Ordering::Relaxed) {
        let stream = std::net::TcpStream::connect_timeout(&to, Duration::from_secs(5))
            .with_context(|| format!("connection {connections} to {to}"))?;
        // Reset instead of TIME_WAIT, so that the client's ports suffice.
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        connections += 1;
    }
    Ok(connections)
}
