//! The open-file limit, and the connections that it allows.

use anyhow::bail;

use crate::{
    config::{Limits, Listener},
    listener,
    os::rlimit,
    server,
    telemetry::log::target,
};

/// The open-file limit of the process.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenFiles {
    /// The limit.
    pub(super) nofile: u64,
    /// How many connections it allows.
    pub(super) capacity: usize,
}

/// Raises the soft limit to the hard limit. Warns if it allows fewer connections than configured.
///
/// # Errors
/// When the limit is too low for one connection.
pub(super) fn raise_limit(limits: Limits, listeners: &[Listener]) -> anyhow::Result<OpenFiles> {
    let Limits { max_connections: wanted, workers } = limits;
    let nofile = rlimit::raise_nofile();
    let capacity = server::connection_capacity(workers, listeners, nofile);
    if capacity == 0 {
        bail!(
            "the open-file limit ({nofile}) is too low for even one connection: raise it (LimitNOFILE= in systemd, \
             ulimit -n)"
        );
    }
    if capacity < wanted {
        tracing::warn!(target: target::DAEMON,
            nofile,
            connections = capacity,
            wanted,
            "the open-file limit allows fewer connections than limits.max_connections; connections above it are \
             rejected: raise it to {} (LimitNOFILE= in systemd, ulimit -n)",
            listener::required_fds(wanted, server::listen_socket_count(workers, listeners), workers)
        );
    }
    Ok(OpenFiles { nofile, capacity })
}
