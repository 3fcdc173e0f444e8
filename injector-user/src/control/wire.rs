//! What goes over the socket, in JSON.

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::backend::HealthState;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// How everything stands.
    Status,
    /// Who is connected.
    Sessions {
        /// Of this listener only.
        listener: Option<String>,
        /// At most so many, the oldest.
        limit: Option<usize>,
    },
    /// Let nobody new in.
    Drain {
        /// This listener only.
        listener: Option<String>,
        /// Cut who is left after so many milliseconds, in place of what is configured.
        deadline_ms: Option<u64>,
    },
    /// Let clients in again.
    Resume {
        /// This listener only.
        listener: Option<String>,
    },
    /// Take a backend out, or put it back.
    Backend {
        /// Which of it.
        action: BackendAction,
        /// Of this listener only.
        listener: Option<String>,
        /// As configured.
        backend: String,
    },
    /// Read the configuration again.
    Reload,
}

/// The state that an operator gives a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum BackendAction {
    /// Use it, whatever its health checks report
    Up,
    /// Disable it: no new connections, established ones continue
    Down,
    /// Let its health checks decide again
    Auto,
}

/// What comes back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It was done.
    Ok(Answer),
    /// It was not, and why.
    Error(String),
}

/// What was done, or found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Sessions`].
    Sessions(Sessions),
    /// To [`Request::Drain`].
    Drained {
        /// Which.
        listeners: Vec<String>,
    },
    /// To [`Request::Resume`].
    Resumed {
        /// Which of them had been drained.
        listeners: Vec<String>,
    },
    /// To [`Request::Backend`].
    BackendSet {
        /// Of which.
        listeners: Vec<String>,
    },
    /// To [`Request::Reload`].
    Reloaded(Reloaded),
}

/// What is different from here on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// Listeners that are new.
    pub added: Vec<String>,
    /// Listeners that are different.
    pub changed: Vec<String>,
    /// Listeners that are gone; their sessions may finish.
    pub removed: Vec<String>,
    /// Sections of the file that take effect with a restart only.
    pub restart_needed_for: Vec<String>,
}

/// How everything stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Of the daemon.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Since its start.
    pub uptime_ms: u64,
    /// As `/readyz` says.
    pub readiness: String,
    /// What runs.
    pub config: ConfigStatus,
    /// Connections of the engines that end TCP.
    pub connections: u64,
    /// How many of them fit.
    pub max_connections: u64,
    /// Bytes that wait in the kernel for peers that do not keep up.
    pub backlog_bytes: u64,
    /// Which engines could run here.
    pub engines: Vec<EngineStatus>,
    /// In the order of the configuration.
    pub listeners: Vec<ListenerStatus>,
    /// No longer configured, with sessions left.
    pub removed_listeners: Vec<RemovedListenerStatus>,
}

/// Where the configuration comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigStatus {
    /// The file.
    pub file: PathBuf,
    /// When the configuration in effect was loaded, in seconds since 1970.
    pub loaded_at: u64,
    /// Why the last reload failed, if it did.
    pub reload_error: Option<String>,
}

/// An engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineStatus {
    /// Its name.
    pub name: String,
    /// Why it cannot run, or was not tried.
    pub failure: Option<String>,
}

/// A listener.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListenerStatus {
    /// Its name.
    pub name: String,
    /// What is spoken.
    pub protocol: String,
    /// What moves its bytes.
    pub engine: String,
    /// Where clients connect.
    pub bind: Vec<SocketAddr>,
    /// New clients are turned away.
    pub draining: bool,
    /// When sessions from before the drain are cut.
    pub abort_in_ms: Option<u64>,
    /// Sessions now.
    pub active: u64,
    /// Connections so far.
    pub accepted: u64,
    /// Connections rejected so far.
    pub rejected: u64,
    /// Headers sent so far.
    pub headers_sent: u64,
    /// Payload so far, as last counted.
    pub bytes_to_backend: u64,
    /// The other way.
    pub bytes_to_client: u64,
    /// Where its connections go.
    pub backends: Vec<BackendStatus>,
}

/// A backend of a listener.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackendStatus {
    /// As configured.
    pub name: String,
    /// Its share.
    pub weight: u32,
    /// Waits until no other can.
    pub backup: bool,
    /// Whether it gets connections, and if not, why.
    pub state: HealthState,
    /// What its name resolved to.
    pub addresses: Vec<SocketAddr>,
    /// Sessions now.
    pub active: u64,
    /// Sessions so far.
    pub sessions: u64,
    /// Checks that it passed.
    pub checks_passed: u64,
    /// Checks that it failed.
    pub checks_failed: u64,
    /// How often it was left out because connections failed.
    pub ejections: u64,
}

/// A listener that is no longer configured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovedListenerStatus {
    /// Its name.
    pub name: String,
    /// Those that are left.
    pub sessions: u64,
    /// When they are cut.
    pub abort_in_ms: u64,
}

/// Who is connected, by the engines that end TCP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sessions {
    /// How many there are, listed or not.
    pub count: u64,
    /// The oldest first.
    pub rows: Vec<SessionRow>,
}

/// A session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRow {
    /// The listener's name.
    pub listener: String,
    /// What moves its bytes.
    pub engine: String,
    /// The client.
    pub client: SocketAddr,
    /// Where it connected to.
    pub local: SocketAddr,
    /// Once one was reached.
    pub backend: Option<SocketAddr>,
    /// Since it was accepted.
    pub age_ms: u64,
    /// Payload so far; at most five seconds old.
    pub bytes_to_backend: u64,
    /// The other way.
    pub bytes_to_client: u64,
}
