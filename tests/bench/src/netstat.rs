//! What TCP of a namespace has counted: the line `TcpExt` of /proc/net/netstat.

use std::fs;

use anyhow::Context as _;
use injector_testbed::netns::Netns;

/// Packets of TCP, since the namespace was made or between two readings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpCounts {
    /// SYNs that were answered by a cookie, because the queue of handshakes was full.
    pub cookies_sent: u64,
    /// Clients whose cookie was accepted.
    pub cookies_received: u64,
    /// SYNs, and last packets of handshakes, that a listen socket dropped.
    pub dropped: u64,
}

impl TcpCounts {
    /// # Errors
    /// When the kernel has no such counters.
    pub fn of(netns: &Netns) -> anyhow::Result<Self> {
        let text = netns.run(|| fs::read_to_string("/proc/thread-self/net/netstat"))??;
        Self::parse(&text).context("/proc/net/netstat lacks a counter")
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt:"));
        let (names, values) = (lines.next()?, lines.next()?);
        let value = |name: &str| {
            let mut pairs = names.split_whitespace().zip(values.split_whitespace());
            pairs.find(|(other, _)| *other == name)?.1.parse().ok()
        };
        Some(Self {
            cookies_sent: value("SyncookiesSent")?,
            cookies_received: value("SyncookiesRecv")?,
            dropped: value("ListenDrops")?,
        })
    }

    /// What was counted since.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self {
            cookies_sent: self.cookies_sent - earlier.cookies_sent,
            cookies_received: self.cookies_received - earlier.cookies_received,
            dropped: self.dropped - earlier.dropped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_name() {
        let text = "TcpExt: SyncookiesSent SyncookiesRecv SyncookiesFailed ListenOverflows ListenDrops\n\
                    TcpExt: 12 3 4 5 6\nIpExt: InNoRoutes\nIpExt: 9\n";
        let counts = TcpCounts::parse(text).unwrap();
        assert_eq!(counts, TcpCounts { cookies_sent: 12, cookies_received: 3, dropped: 6 });
        assert_eq!(counts.since(counts), TcpCounts::default());
        assert_eq!(TcpCounts::parse("TcpExt: SyncookiesSent\nTcpExt: 1\n"), None);
        assert!(TcpCounts::parse(&fs::read_to_string("/proc/net/netstat").unwrap()).is_some());
    }
}
