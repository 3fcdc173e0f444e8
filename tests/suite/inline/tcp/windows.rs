//! Zero windows and keep-alive probes.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use injector_testbed::netns::Family;
use socket2::{SockRef, TcpKeepalive};

use crate::wire::{Direction, Fate, Side};
use crate::wire_testbed::{FirstSpeaker, WireTestbed};

/// Neither side reads until both windows have been zero for a second; then no byte is missing.
pub(super) fn zero_window(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    const MUCH: usize = 12 << 20;
    let connection = testbed.connection(family, FirstSpeaker::Server)?;
    let (client, server) = (&connection.client, &connection.server);
    for socket in [client, server] {
        SockRef::from(socket).set_recv_buffer_size(64 << 10)?;
        SockRef::from(socket).set_send_buffer_size(64 << 10)?;
    }

    let send = |mut from: &TcpStream| {
        let bytes: Vec<u8> = (0_u8..251).cycle().take(MUCH).collect();
        from.write_all(&bytes).and_then(|()| from.shutdown(Shutdown::Write))
    };
    let receive = |mut to: &TcpStream| {
        std::thread::sleep(Duration::from_millis(1000));
        let mut seen = Vec::new();
        to.read_to_end(&mut seen)?;
        io::Result::Ok(seen)
    };
    std::thread::scope(|scope| {
        let sending = [scope.spawn(|| send(client)), scope.spawn(|| send(server))];
        let receiving = [scope.spawn(|| receive(client)), scope.spawn(|| receive(server))];
        for sending in sending {
            sending.join().map_err(|_| anyhow!("panicked"))?.context("sending")?;
        }
        let expected: Vec<u8> = (0_u8..251).cycle().take(MUCH).collect();
        for receiving in receiving {
            let seen = receiving.join().map_err(|_| anyhow!("panicked"))?.context("receiving")?;
            ensure!(seen == expected, "{} bytes of {MUCH}, or not the same", seen.len());
        }

        Ok(())
    })
}

/// Probes have a number before the next byte; they are acknowledged, and the connection stays open.
pub(super) fn keepalive(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let probes = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&probes);
    let mut last = None;
    let _faulty = testbed.wire.faults(move |seen| {
        if seen.at(Side::Backend, Direction::ToBackend) && seen.is_bare_ack() {
            let number = seen.tcp.sequence_number();
            if last.is_some_and(|last: u32| last.wrapping_sub(number) == 1) {
                count.fetch_add(1, Ordering::Relaxed);
            } else {
                last = Some(number);
            }
        }
        Fate::Pass
    });
    let often = TcpKeepalive::new()
        .with_time(Duration::from_secs(1))
        .with_interval(Duration::from_secs(1))
        .with_retries(1);
    let connection = testbed.connection(family, FirstSpeaker::Server)?;
    SockRef::from(&connection.client).set_tcp_keepalive(&often)?;
    SockRef::from(&connection.server).set_tcp_keepalive(&often)?;
    // An unacknowledged probe would end it a second later.
    std::thread::sleep(Duration::from_millis(2600));
    connection.finish(10_000)?;
    ensure!(probes.load(Ordering::Relaxed) >= 1, "no probe was seen");
    Ok(())
}
