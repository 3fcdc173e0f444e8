//! Resets connections: both ends get an RST that they take.

use std::{io, net::SocketAddr};

use injector_common::{
    SeqNumber,
    inline::{Flag, Flow},
};

use super::maps::tuple;
use crate::os::tcp_reset;

/// An RST.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reset {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) sequence: SeqNumber,
    pub(super) acknowledgement: SeqNumber,
}

/// Which end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Client,
    Backend,
}

/// The RSTs for one end of a connection. It takes the one whose number it expects next: that is
/// what it acknowledged last, or a later one if its acknowledgement has not passed here.
pub(super) fn resets(flow: &Flow, end: End) -> Vec<Reset> {
    let (side, numbers, acknowledgement) = match end {
        // The client expects the backend's own numbers.
        End::Client => (&flow.client_side, vec![flow.backend.acked, flow.backend.end], flow.client.end),
        // The backend expects the client's, behind the header.
        End::Backend => {
            let shifted = [flow.client.acked, flow.client.end].map(|number| number + flow.shift());
            let mut numbers = shifted.to_vec();
            if !flow.is(Flag::Acknowledged) {
                // The header may be lost, or on its way.
                numbers.insert(0, flow.first + flow.offset);
            }
            (&flow.backend_side, numbers, flow.backend.end)
        }
    };
    let (source, destination) = tuple(&side.tuple);
    let mut resets: Vec<Reset> = Vec::new();
    for sequence in numbers {
        if resets.iter().all(|reset| reset.sequence != sequence) {
            resets.push(Reset { source, destination, sequence, acknowledgement });
        }
    }
    resets
}

/// Resets these ends of a connection.
///
/// # Errors
/// The first failure, as [`tcp_reset::send`]. The other end is reset all the same.
pub(super) fn reset(flow: &Flow, ends: &[End]) -> io::Result<()> {
    let mut outcome = Ok(());
    for Reset { source, destination, sequence, acknowledgement } in
        ends.iter().flat_map(|end| resets(flow, *end))
    {
        let sent = tcp_reset::send(source, destination, sequence.0, acknowledgement.0);
        outcome = outcome.and(sent);
    }
    outcome
}

#[cfg(test)]
mod tests {
    use injector_common::inline::{Direction, SeqState, Tuple};

    use super::*;

    fn addresses(source: ([u8; 4], u16), destination: ([u8; 4], u16)) -> Direction {
        let word = |ip| [u32::from_ne_bytes(ip), 0, 0, 0];
        let tuple = Tuple {
            source: word(source.0),
            destination: word(destination.0),
            ports: Tuple::ports(source.1, destination.1),
            ipv6: 0,
        };
        Direction { tuple, ..Direction::default() }
    }

    fn flow() -> Flow {
        Flow {
            first: SeqNumber(1000),
            offset: 500_000,
            header_len: 28,
            backend_side: addresses(([10, 0, 0, 1], 2000), ([10, 0, 0, 2], 2525)),
            client_side: addresses(([198, 51, 100, 1], 25), ([203, 0, 113, 9], 40_000)),
            client: SeqState { acked: SeqNumber(1010), end: SeqNumber(1020), ..SeqState::default() },
            backend: SeqState { acked: SeqNumber(77), end: SeqNumber(77), ..SeqState::default() },
            ..Flow::default()
        }
    }

    fn sent(flow: &Flow, end: End) -> (String, Vec<u32>, u32) {
        let resets = resets(flow, end);
        let Reset { source, destination, acknowledgement, .. } = resets[0];
        let numbers = resets.iter().map(|reset| reset.sequence.0).collect();
        (format!("{source} {destination}"), numbers, acknowledgement.0)
    }

    #[test]
    fn each_end_gets_the_numbers_that_it_expects() {
        let mut flow = flow();
        flow.set(Flag::Acknowledged);
        let client = ("198.51.100.1:25 203.0.113.9:40000".to_owned(), vec![77], 1020);
        assert_eq!(sent(&flow, End::Client), client);
        let backend = ("10.0.0.1:2000 10.0.0.2:2525".to_owned(), vec![501_038, 501_048], 77);
        assert_eq!(sent(&flow, End::Backend), backend);
    }

    #[test]
    fn a_backend_without_the_header_expects_its_first_byte() {
        let mut flow = flow();
        flow.client = SeqState::new(SeqNumber(1000));
        assert_eq!(sent(&flow, End::Backend).1, [501_000, 501_028]);
        flow.set(Flag::Acknowledged);
        assert_eq!(sent(&flow, End::Backend).1, [501_028]);
    }
}
