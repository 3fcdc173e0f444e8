//! A job of a client and its outcome, each one line of JSON.

use std::net::SocketAddr;

use crate::cpu::Cpu;
use crate::latency::Summary;

/// Seconds of warm-up before the measured time, for slow start, enrolment and caches.
pub const WARM_UP: f64 = 0.3;

/// One job.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Job {
    /// Where to connect.
    pub target: SocketAddr,
    /// The load to make there.
    pub load: Load,
    /// Duration in seconds.
    pub seconds: f64,
}

/// The kinds of load.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Load {
    /// Bulk towards the server, at full speed.
    Upload {
        /// Connections.
        connections: usize,
    },
    /// Bulk towards the client, at full speed.
    Download {
        /// Connections.
        connections: usize,
    },
    /// Dialogues in a closed loop: each client starts the next one when the last has ended.
    Closed {
        /// The service's name; it must be a dialogue.
        service: String,
        /// Simultaneous connections.
        connections: usize,
    },
    /// Dialogues in an open loop: they start at a fixed rate, whether or not earlier ones have
    /// ended.
    Open {
        /// The service's name; it must be a dialogue that ends.
        service: String,
        /// Dialogues per second.
        rate: f64,
    },
    /// Connections that make one round trip and are then held open. The client prints a line when
    /// all are open, and closes them when a line arrives on its standard input.
    Idle {
        /// Connections.
        connections: usize,
    },
    /// Round trips on the target while an upload to `bulk` runs.
    Beside {
        /// Connections for round trips.
        connections: usize,
        /// Connections of the upload.
        bulk_connections: usize,
        /// Target of the upload.
        bulk: SocketAddr,
    },
}

/// The result of a job. Counts cover the measured time alone, unless they include the warm-up.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct JobOutcome {
    /// Length of the measured time.
    pub seconds: f64,
    /// Payload bytes that arrived, of bulk loads.
    pub bytes: u64,
    /// Requests that received a response.
    pub round_trips: u64,
    /// Dialogues that completed.
    pub sessions: u64,
    /// Dialogues of an open loop that did not complete within two seconds after the last start, or
    /// that were not started because thousands were pending: the system did not keep up.
    pub unfinished: u64,
    /// Connections made, warm-up included.
    pub connections: u64,
    /// Failures, warm-up included: connections refused, reset or truncated.
    pub failures: u64,
    /// The first failure.
    pub failure: Option<String>,
    /// Latency of round trips, or of sessions where each is a connection, from the scheduled start.
    pub latency: Option<Summary>,
    /// Processor time of the whole machine.
    pub cpu: Cpu,
}

/// What the server has counted since the last query.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ServerCounts {
    /// Connections on ports that require a header.
    pub proxied: u64,
    /// Headers that arrived complete in the first read, with the client's address.
    pub headers: u64,
    /// Connections on such ports that began with anything else.
    pub bad_headers: u64,
    /// Connections on such ports that ended without a byte.
    pub silent: u64,
    /// Connections on ports without a header.
    pub bare: u64,
    /// Payload bytes received.
    pub bytes_in: u64,
    /// Payload bytes that the kernel accepted for sending.
    pub bytes_out: u64,
    /// Connections that failed: reset, or against the script of the service.
    pub failures: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_survives_serialization() {
        let target = "192.0.2.10:7001".parse().unwrap();
        for load in [
            Load::Upload { connections: 16 },
            Load::Closed { service: "echo".into(), connections: 32 },
            Load::Beside { connections: 1, bulk_connections: 4, bulk: target },
        ] {
            let job = Job { target, load, seconds: 1.5 };
            let line = serde_json::to_string(&job).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Job>(&line).unwrap(), job);
        }
    }
}
