//! TCP options and SYN cookies, with losses.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::ensure;
use etherparse::TcpOptionElement;
use injector_testbed::netns::Family;

use super::BYTES;
use crate::losses::Random;
use crate::wire::{Direction, Fate, Seen, Side};
use crate::wire_testbed::{FirstSpeaker, SysctlGuard, WireTestbed};

/// With these settings on both sides: the header is lost once, and packets in mid-stream.
pub(super) fn with(
    testbed: &WireTestbed,
    family: Family,
    settings: &[(&'static str, &str)],
) -> anyhow::Result<()> {
    let mut kept = Vec::new();
    for (key, value) in settings {
        for netns in [testbed.client_side(), testbed.backend_side()] {
            kept.push(SysctlGuard::new(netns, key, value)?);
        }
    }
    for first in [FirstSpeaker::Client, FirstSpeaker::Server] {
        let (mut random, mut headers) = (Random(5), 0);
        let _faulty = testbed.wire.faults(move |seen| {
            headers += u32::from(seen.is_header());
            let header = seen.is_header() && headers == 1 && first == FirstSpeaker::Client;
            let data =
                seen.is_data() && !seen.is_header() && seen.side == Side::Backend && random.below(100) == 0;
            if header || data { Fate::Drop } else { Fate::Pass }
        });
        testbed.connection(family, first)?.finish(BYTES)?;
    }
    Ok(())
}

/// The backend stores nothing about the SYN: the header's segment must carry the numbers that prove
/// it.
pub(super) fn syn_cookies(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let _always = SysctlGuard::new(testbed.backend_side(), "net/ipv4/tcp_syncookies", "2")?;
    FirstSpeaker::ALL.into_iter().try_for_each(|first| testbed.connection(family, first)?.finish(BYTES))
}

/// Every SACK block that the client receives covers bytes that it has sent and that are not yet
/// acknowledged.
pub(super) fn sack(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let seen_blocks = Arc::new(AtomicU32::new(0));
    let wrong = Arc::new(Mutex::new(Vec::new()));
    let mut random = Random(3);
    let mut sent = None;
    let (blocks, complaints) = (Arc::clone(&seen_blocks), Arc::clone(&wrong));
    let _faulty = testbed.wire.faults(move |seen| {
        let tcp = seen.tcp;
        if seen.at(Side::Client, Direction::ToBackend) {
            let len = u32::try_from(tcp.payload().len()).unwrap_or(0) + u32::from(tcp.fin());
            let end = tcp.sequence_number().wrapping_add(len);
            let furthest = sent.get_or_insert(end);
            if end.wrapping_sub(*furthest) < 1 << 31 {
                *furthest = end;
            }
        }
        if let (true, Some(sent)) = (seen.at(Side::Client, Direction::ToClient), sent) {
            for (start, end) in sack_blocks(seen) {
                blocks.fetch_add(1, Ordering::Relaxed);
                let fits = end.wrapping_sub(start) < 1 << 20
                    && sent.wrapping_sub(end) < 1 << 31
                    && start.wrapping_sub(tcp.acknowledgment_number().wrapping_sub(1 << 20)) < 1 << 22;
                if !fits {
                    let at = (start, end, tcp.acknowledgment_number(), sent);
                    complaints.lock().unwrap_or_else(PoisonError::into_inner).push(at);
                }
            }
        }
        let far = seen.is_data() && !seen.is_header() && seen.side == Side::Backend;
        if far && random.below(50) == 0 { Fate::Drop } else { Fate::Pass }
    });
    let connection = testbed.connection(family, FirstSpeaker::Server)?;
    connection.finish(2 * BYTES)?;
    let sack = seen_blocks.load(Ordering::Relaxed);
    let wrong = wrong.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(wrong.is_empty(), "blocks (start, end), acknowledged and sent: {wrong:?}");
    ensure!(sack > 0, "no SACK block was seen");
    Ok(())
}

fn sack_blocks(seen: &Seen<'_>) -> Vec<(u32, u32)> {
    let element = |element| match element {
        Ok(TcpOptionElement::SelectiveAcknowledgement(first, rest)) => {
            std::iter::once(first).chain(rest.into_iter().flatten()).collect()
        }
        _ => Vec::new(),
    };
    seen.tcp.options_iterator().flat_map(element).collect()
}
