//! What a client is asked to do and what it tells, both one line of JSON.

use std::net::SocketAddr;

use crate::cpu::Cpu;
use crate::latency::Summary;

/// One piece of work.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Order {
    /// Where to connect.
    pub target: SocketAddr,
    /// What to do there.
    pub work: Work,
    /// How long, in seconds.
    pub seconds: f64,
}

/// The kinds of work.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Work {
    /// As much as fits through so many connections, towards the server.
    Upload {
        /// Connections.
        connections: usize,
    },
    /// The same towards the client.
    Download {
        /// Connections.
        connections: usize,
    },
    /// A dialogue on each of so many connections, over and over: each client begins anew when it is done.
    Closed {
        /// The service's name; it must be a dialogue.
        service: String,
        /// Connections at one time.
        connections: usize,
    },
    /// Dialogues begun at a fixed rate, whether or not earlier ones are done.
    Open {
        /// The service's name; it must be a dialogue that ends.
        service: String,
        /// Dialogues a second.
        rate: f64,
    },
    /// Connections that have said one thing and are then held until a line comes on standard input, closed, and waited
    /// for. A line is printed when all are open.
    Idle {
        /// Connections.
        connections: usize,
    },
    /// Round trips on the target beside an upload to `bulk`.
    Beside {
        /// Connections for round trips.
        connections: usize,
        /// Connections of the upload.
        bulk_connections: usize,
        /// Where the upload goes.
        bulk: SocketAddr,
    },
}

/// What came of it. Counts are of the measured time alone.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Outcome {
    /// Measured seconds.
    pub seconds: f64,
    /// Bytes of payload that arrived, where bulk was moved.
    pub bytes: u64,
    /// Questions that were answered.
    pub round_trips: u64,
    /// Dialogues that came to their end.
    pub sessions: u64,
    /// Dialogues at a fixed rate that were not done two seconds after the last had begun, or not even begun because
    /// thousands were waiting before them: the peer did not keep up.
    pub unfinished: u64,
    /// Connections that were made, warm-up included.
    pub connections: u64,
    /// What failed, warm-up included: a connection refused, reset or cut short.
    pub failures: u64,
    /// The first failure.
    pub failure: Option<String>,
    /// Of round trips, or of sessions where each is a connection: from the (intended) start.
    pub latency: Option<Summary>,
    /// What the machine spent.
    pub cpu: Cpu,
}

/// What the server has counted since it was asked last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counts {
    /// Connections on ports that demand a header.
    pub proxied: u64,
    /// Headers that came whole, in the first read, with the client's address.
    pub headers: u64,
    /// Connections on such ports whose first bytes were anything else.
    pub bad_headers: u64,
    /// Connections on such ports that ended without a byte.
    pub silent: u64,
    /// Connections on ports without a header.
    pub bare: u64,
    /// Bytes of payload that came.
    pub bytes_in: u64,
    /// Bytes of payload that the kernel took.
    pub bytes_out: u64,
    /// Connections that failed: reset, or not as the service has it.
    pub failures: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_survive_the_line() {
        let target = "192.0.2.10:7001".parse().unwrap();
        for work in [
            Work::Upload { connections: 16 },
            Work::Closed { service: "echo".into(), connections: 32 },
            Work::Beside { connections: 1, bulk_connections: 4, bulk: target },
        ] {
            let order = Order { target, work, seconds: 1.5 };
            let line = serde_json::to_string(&order).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Order>(&line).unwrap(), order);
        }
    }
}
