//! The sequence number of a peer's SYN.

use std::{fmt::Debug, sync::Arc};

use socket2::Socket;

/// Waits for the peer's SYN while a socket connects, until it is dropped.
pub trait SynObserver: Debug + Send + Sync {
    /// The sequence number of the peer's SYN, once it has arrived.
    fn peer_isn(&self) -> Option<u32>;
}

/// Starts a [`SynObserver`] on a socket before connect(2). `None` if none is needed or available.
pub type ObserveSyn<'a> = dyn Fn(&Arc<Socket>) -> Option<Box<dyn SynObserver>> + Send + Sync + 'a;

/// An [`ObserveSyn`] for sockets that the kernel never splices.
#[must_use]
pub fn no_observer(_: &Arc<Socket>) -> Option<Box<dyn SynObserver>> {
    None
}

/// The sequence number in a saved SYN: an IPv4 or IPv6 header, then the TCP header.
pub(super) fn parse_isn(syn: &[u8]) -> Option<u32> {
    const IPV6_HEADER: usize = 40;
    const NEXT_HEADER: usize = 6;
    let tcp = match syn.first()? >> 4 {
        4 => usize::from(syn.first()? & 0xF) * 4,
        6 if i32::from(*syn.get(NEXT_HEADER)?) == libc::IPPROTO_TCP => IPV6_HEADER,
        _ => return None,
    };
    syn.get(tcp + 4..tcp + 8)?.first_chunk().copied().map(u32::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_number_of_a_saved_syn() {
        let tcp = [0, 25, 0xC0, 0, 0xDE, 0xAD, 0xBE, 0xEF, 0, 0, 0, 0, 0x50, 2];
        let ipv4 = |first| [&[first][..], &[0; 19], &tcp].concat();
        let ipv6 = |next| [&[0x60, 0, 0, 0, 0, 20, next, 64][..], &[0; 32], &tcp].concat();
        assert_eq!(parse_isn(&ipv4(0x45)), Some(0xDEAD_BEEF));
        assert_eq!(parse_isn(&[&[0x46][..], &[0; 23], &tcp].concat()), Some(0xDEAD_BEEF));
        assert_eq!(parse_isn(&ipv6(6)), Some(0xDEAD_BEEF));
        // An extension header, an empty packet, a truncated packet.
        assert_eq!(parse_isn(&ipv6(0)), None);
        assert_eq!(parse_isn(&[]), None);
        assert_eq!(parse_isn(ipv4(0x45).get(..26).unwrap()), None);
    }
}
