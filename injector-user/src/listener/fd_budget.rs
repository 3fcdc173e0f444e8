//! How many connections the file descriptors allow.

use crate::{net::splice_pipe::MAX_PIPES, telemetry::operator_connections::MAX_OPERATOR_CONNECTIONS};

/// File descriptors of the daemon itself: maps, programs, devices, logs, pipes, and what connects to
/// the addresses of metrics and health and to the control socket.
const DAEMON_FDS: u64 = 96 + 3 * MAX_OPERATOR_CONNECTIONS as u64 + 2 * MAX_PIPES as u64;
/// A listening socket and its reserve descriptor.
const FDS_PER_LISTEN_SOCKET: u64 = 2;
/// Epoll instances, their wake-ups and the hang-up monitor.
const FDS_PER_WORKER: u64 = 6;
/// A connection has two sockets: the client's and the backend's.
const FDS_PER_CONNECTION: u64 = 2;

/// How many connections `nofile` file descriptors allow besides the listening sockets and workers.
#[must_use]
pub fn connection_capacity(nofile: u64, listen_sockets: usize, workers: usize) -> usize {
    let connections = nofile.saturating_sub(overhead(listen_sockets, workers)) / FDS_PER_CONNECTION;
    usize::try_from(connections).unwrap_or(usize::MAX)
}

/// How many file descriptors this many connections need.
#[must_use]
pub fn required_fds(connections: usize, listen_sockets: usize, workers: usize) -> u64 {
    overhead(listen_sockets, workers).saturating_add((connections as u64).saturating_mul(FDS_PER_CONNECTION))
}

fn overhead(listen_sockets: usize, workers: usize) -> u64 {
    DAEMON_FDS + FDS_PER_LISTEN_SOCKET * listen_sockets as u64 + FDS_PER_WORKER * workers as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_descriptors_limit_the_connections() {
        for (nofile, connections) in [(0, 0), (208, 0), (216, 0), (217, 0), (218, 1), (20_216, 10_000)] {
            assert_eq!(connection_capacity(nofile, 1, 1), connections, "{nofile}");
        }
        // Eight addresses, two workers.
        assert_eq!((required_fds(10_000, 16, 2), connection_capacity(20_252, 16, 2)), (20_252, 10_000));
    }
}
