//! The targets of the daemon's log lines. They are part of its interface: filters and alerts name
//! them, so they stay the same wherever the code moves.

/// One line for each connection that has ended.
pub const ACCESS: &str = "access";
/// A session before and while it forwards.
pub const SESSION: &str = "session";
/// Listening sockets: bound, accepted from, drained, removed.
pub const LISTENER: &str = "listener";
/// Connections to backends.
pub const BACKEND: &str = "backend";
/// Health checks, ejection and the operator's `backend` command.
pub const HEALTH: &str = "health";
/// Names of backends and their addresses.
pub const RESOLVER: &str = "resolver";
/// Services of Kubernetes and their endpoints.
pub const KUBERNETES: &str = "kubernetes";
/// Self-tests and the choice of an engine.
pub const ENGINE: &str = "engine";
/// The splice engine.
pub const ENGINE_SPLICE: &str = "engine.splice";
/// The inline engine.
pub const ENGINE_INLINE: &str = "engine.inline";
/// Bans, lists of them, and limits per source.
pub const GUARD: &str = "guard";
/// Loading and reloading the configuration.
pub const CONFIG: &str = "config";
/// The control socket.
pub const CONTROL: &str = "control";
/// `/metrics`, `/healthz` and `/readyz`.
pub const METRICS: &str = "metrics";
/// The process: start, capabilities, limits, shutdown.
pub const DAEMON: &str = "daemon";

/// All of them.
pub const ALL: [&str; 15] = [
    ACCESS,
    SESSION,
    LISTENER,
    BACKEND,
    HEALTH,
    RESOLVER,
    KUBERNETES,
    ENGINE,
    ENGINE_SPLICE,
    ENGINE_INLINE,
    GUARD,
    CONFIG,
    CONTROL,
    METRICS,
    DAEMON,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_lists_every_target() {
        let page = include_str!("../../../docs/config.md");
        for target in ALL {
            assert!(page.contains(&format!("`{target}`")), "{target}");
        }
    }
}
