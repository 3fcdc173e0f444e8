//! The first packets of a connection lost, duplicated, delayed or reordered. The header is in no
//! host's retransmission queue: the programs must send it again.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure};
use injector_testbed::netns::Family;

use crate::WireRun;
use crate::wire::{Direction, Fate, Seen, Side};
use crate::wire_testbed::{FirstSpeaker, WireTestbed};

pub(crate) const TRIALS: &[(&str, WireRun)] = &[
    ("header lost once, client first", |testbed, family| {
        header_lost(testbed, family, FirstSpeaker::Client, 1, 200)
    }),
    ("header lost twice, client first", |testbed, family| {
        header_lost(testbed, family, FirstSpeaker::Client, 2, 700)
    }),
    ("header lost five times, client first", |testbed, family| {
        header_lost(testbed, family, FirstSpeaker::Client, 5, 4000)
    }),
    ("header lost once, server first", |testbed, family| {
        header_lost(testbed, family, FirstSpeaker::Server, 1, 1500)
    }),
    ("SYN lost", |testbed, family| {
        lost(testbed, family, FirstSpeaker::Server, 1, 1500, |seen| seen.is_syn())
    }),
    ("SYN-ACK lost before the edge", |testbed, family| {
        lost(testbed, family, FirstSpeaker::Server, 1, 1500, |seen| {
            seen.is_syn_ack() && seen.side == Side::Backend
        })
    }),
    ("SYN-ACK lost behind the edge", |testbed, family| {
        lost(testbed, family, FirstSpeaker::Client, 1, 1500, |seen| {
            seen.is_syn_ack() && seen.side == Side::Client
        })
    }),
    ("client's acknowledgement lost before the edge, client first", |testbed, family| {
        lost(testbed, family, FirstSpeaker::Client, 1, 200, |seen| {
            seen.at(Side::Client, Direction::ToBackend) && seen.is_bare_ack()
        })
    }),
    ("client's acknowledgement lost before the edge, server first", |testbed, family| {
        lost(testbed, family, FirstSpeaker::Server, 1, 1500, |seen| {
            seen.at(Side::Client, Direction::ToBackend) && seen.is_bare_ack()
        })
    }),
    ("acknowledgement of the header lost, client first", |testbed, family| {
        lost(testbed, family, FirstSpeaker::Client, 2, 200, from_backend_bare)
    }),
    ("acknowledgement of the header lost, server first", |testbed, family| {
        lost(testbed, family, FirstSpeaker::Server, 1, 200, from_backend_bare)
    }),
    ("everything twice", everything_twice),
    ("header late, client first", header_late),
    ("everything reordered", everything_reordered),
    ("10 % of all packets lost", a_tenth_lost),
    ("a backend that requests the header endlessly", asks_without_end),
    ("a backend that requests the header a thousand times at once", asks_at_once),
];

/// Enough for a few round trips of slow start.
const BYTES: usize = 256 << 10;

fn from_backend_bare(seen: &Seen<'_>) -> bool {
    seen.at(Side::Backend, Direction::ToClient) && seen.is_bare_ack()
}

/// Drops the first `times` matching packets; the transfer must complete, and its first byte must
/// arrive within `limit` milliseconds.
pub(crate) fn lost(
    testbed: &WireTestbed,
    family: Family,
    first: FirstSpeaker,
    times: u32,
    limit: u64,
    fits: impl Fn(&Seen<'_>) -> bool + Send + 'static,
) -> anyhow::Result<()> {
    let dropped = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&dropped);
    let _faulty = testbed.wire.faults(move |seen| {
        if fits(seen) && count.load(Ordering::Relaxed) < times {
            count.fetch_add(1, Ordering::Relaxed);
            return Fate::Drop;
        }
        Fate::Pass
    });
    let connection = testbed.connection(family, first)?;
    connection.finish(BYTES)?;
    let dropped = dropped.load(Ordering::Relaxed);
    ensure!(dropped == times, "{dropped} packets were there to be dropped");
    let took = connection.took;
    eprintln!("    first byte after {:.1} ms", took.as_secs_f64() * 1e3);
    ensure!(took < Duration::from_millis(limit), "the first byte came after {took:?}");
    Ok(())
}

fn header_lost(
    testbed: &WireTestbed,
    family: Family,
    first: FirstSpeaker,
    times: u32,
    limit: u64,
) -> anyhow::Result<()> {
    lost(testbed, family, first, times, limit, |seen| seen.is_header())
}

/// Only the backend's SYN-ACK timer causes a retransmission here: after 1, 2, 4, 8 and 16 seconds,
/// as when the last packet of any handshake is lost. Hence both families at once.
pub(crate) fn header_lost_server_first(testbed: &WireTestbed, times: u32) -> anyhow::Result<()> {
    let mut dropped = HashMap::<SocketAddr, u32>::new();
    let _faulty = testbed.wire.faults(move |seen| {
        if !seen.is_header() {
            return Fate::Pass;
        }
        let before = dropped.entry(seen.source()).or_default();
        *before += 1;
        if *before <= times { Fate::Drop } else { Fate::Pass }
    });
    let run = |family| {
        let connection = testbed.connection_within(family, FirstSpeaker::Server, Duration::from_secs(40))?;
        connection.finish(BYTES)?;
        anyhow::Ok(connection.took)
    };
    let took = std::thread::scope(|scope| {
        let v4 = scope.spawn(|| run(Family::V4));
        let v6 = run(Family::V6)?;
        anyhow::Ok([v4.join().map_err(|_| anyhow!("panicked"))??, v6])
    })?;
    eprintln!("    first byte after {took:.1?}");
    let asked = Duration::from_secs((1 << times) - 1);
    ensure!(took.iter().all(|took| *took > asked), "were they dropped?");
    ensure!(took.iter().all(|took| *took < asked + Duration::from_secs(1)), "after {took:?}");
    Ok(())
}

fn everything_twice(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let _faulty = testbed.wire.faults(|_| Fate::Twice);
    FirstSpeaker::ALL.into_iter().try_for_each(|first| testbed.connection(family, first)?.finish(BYTES))
}

/// The data overtakes the header.
fn header_late(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let _faulty = testbed
        .wire
        .faults(|seen| if seen.is_header() { Fate::Late(Duration::from_millis(30)) } else { Fate::Pass });
    testbed.connection(family, FirstSpeaker::Client)?.finish(BYTES)
}

fn everything_reordered(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let mut random = Random(7);
    let _faulty =
        testbed.wire.faults(move |_| Fate::Late(Duration::from_micros(u64::from(random.below(3000)))));
    FirstSpeaker::ALL.into_iter().try_for_each(|first| testbed.connection(family, first)?.finish(BYTES))
}

fn a_tenth_lost(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    for first in [FirstSpeaker::Client, FirstSpeaker::ClientByProtocol] {
        // The same packets every time; enough of the handshake is among them.
        let mut random = Random(11);
        let _faulty = testbed.wire.faults(move |seen| {
            if !seen.is_syn() && random.below(10) == 0 { Fate::Drop } else { Fate::Pass }
        });
        testbed.connection(family, first)?.finish(64 << 10)?;
    }
    Ok(())
}

/// While it does not get the header, a backend requests it with every segment that arrives; the
/// responses stay few.
fn asks_without_end(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    const BLIND: Duration = Duration::from_millis(500);
    let before = testbed.counted("header_retransmitted")?;
    let start = Instant::now();
    let _faulty = testbed.wire.faults(move |seen| {
        if seen.is_header() && start.elapsed() < BLIND { Fate::Drop } else { Fate::Pass }
    });
    let connection = testbed.connection(family, FirstSpeaker::Client)?;
    connection.finish(BYTES)?;
    let answered = testbed.counted("header_retransmitted")? - before;
    eprintln!("    first byte after {:.1} ms, {answered} answers", connection.took.as_secs_f64() * 1e3);
    ensure!((1..100).contains(&answered), "{answered} answers");
    Ok(())
}

/// The same request a thousand times, as fast as possible, and no header arrives: at most one
/// response per half millisecond.
fn asks_at_once(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let before = (testbed.counted("header_retransmitted")?, testbed.counted("too_soon")?);
    let mut left = 1;
    let mut headers = 0;
    let _faulty = testbed.wire.faults(move |seen| {
        if seen.is_header() && headers < 3 {
            headers += 1;
            return Fate::Drop;
        }
        if from_backend_bare(seen) && left > 0 {
            left -= 1;
            return Fate::Between(vec![seen.frame.to_vec(); 1000], Vec::new());
        }
        Fate::Pass
    });
    let start = Instant::now();
    testbed.connection(family, FirstSpeaker::Client)?.finish(BYTES)?;
    let passed = start.elapsed();
    let (answered, soon) =
        (testbed.counted("header_retransmitted")? - before.0, testbed.counted("too_soon")? - before.1);
    eprintln!("    {answered} answers, {soon} questions not answered");
    ensure!(answered + soon >= 900, "the questions did not arrive");
    ensure!(u128::from(answered) <= passed.as_micros() / 500 + 1, "{answered} answers within {passed:?}");
    ensure!(answered < 200, "{answered} answers");
    Ok(())
}

/// Pseudo-random numbers, the same in every run (xorshift32).
pub(crate) struct Random(pub(crate) u32);

impl Random {
    pub(crate) fn below(&mut self, limit: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0 % limit
    }
}
