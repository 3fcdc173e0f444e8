//! Requests and replies on the control socket, in JSON.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

pub use super::guard::{GuardDeviceStatus, GuardStatus, ListFileStatus};
use crate::backend::HealthState;

/// A command to the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Report the state of the daemon.
    Status,
    /// List the sessions.
    Sessions {
        /// Only of this listener.
        listener: Option<String>,
        /// The maximum number of sessions; the oldest are listed.
        limit: Option<usize>,
    },
    /// End sessions.
    EndSessions {
        /// An id, an address or a network.
        target: String,
        /// Only of this listener.
        listener: Option<String>,
    },
    /// Reject new clients.
    Drain {
        /// Only this listener.
        listener: Option<String>,
        /// Abort the remaining sessions after this time instead of the configured one.
        deadline_ms: Option<u64>,
    },
    /// Accept new clients again.
    Resume {
        /// Only this listener.
        listener: Option<String>,
    },
    /// Disable or enable a backend.
    Backend {
        /// Its new state.
        action: BackendAction,
        /// Only of this listener.
        listener: Option<String>,
        /// Its configured address.
        backend: String,
    },
    /// Change a backend's share of new connections until the next reload.
    BackendWeight {
        /// 0 to 1000.
        weight: u32,
        /// Only of this listener.
        listener: Option<String>,
        /// Its configured address.
        backend: String,
    },
    /// Log at other levels until the next reload.
    LogLevel {
        /// `LEVEL` or `TARGET=LEVEL`; they replace those of an earlier request.
        levels: Vec<String>,
    },
    /// Ban a source.
    Ban {
        /// An address or a network.
        network: String,
        /// How long; without end if not given.
        duration_ms: Option<u64>,
        /// Why.
        reason: Option<String>,
        /// Also a very large network.
        #[serde(default)]
        force: bool,
    },
    /// Lift a ban of [`Request::Ban`].
    Unban {
        /// An address or a network.
        network: String,
    },
    /// List the bans.
    Bans {
        /// Only of this origin.
        origin: Option<BanOrigin>,
        /// The maximum number of bans.
        limit: Option<usize>,
    },
    /// Reload the configuration.
    Reload,
    /// Report what a reload would do, and change nothing.
    DryRun,
}

/// The state that an operator gives a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackendAction {
    /// Enable it regardless of its health checks.
    Up,
    /// Disable it: no new connections, established ones continue.
    Down,
    /// Let its health checks decide again.
    Auto,
}

/// Who wants a ban.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum BanOrigin {
    /// guard.deny, or a file of guard.deny_files
    List,
    /// `injector ban`
    Command,
    /// A decision of CrowdSec
    CrowdSec,
}

/// The reply to a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The result.
    Ok(Answer),
    /// Why the daemon rejected it.
    Error(String),
}

/// The result of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Sessions`].
    Sessions(Sessions),
    /// To [`Request::EndSessions`].
    SessionsEnded {
        /// How many.
        count: u64,
    },
    /// To [`Request::Drain`].
    Drained {
        /// Their names.
        listeners: Vec<String>,
    },
    /// To [`Request::Resume`].
    Resumed {
        /// The names of those that were draining.
        listeners: Vec<String>,
    },
    /// To [`Request::Backend`].
    BackendSet {
        /// The names of the listeners that have the backend.
        listeners: Vec<String>,
    },
    /// To [`Request::BackendWeight`].
    BackendWeightSet {
        /// The names of the listeners that have the backend.
        listeners: Vec<String>,
        /// Its weight now.
        weight: u32,
    },
    /// To [`Request::LogLevel`].
    LogLevelSet {
        /// What is logged now.
        levels: String,
    },
    /// To [`Request::Ban`].
    Banned {
        /// Whom.
        network: String,
        /// It was banned by command before: the ban has the new end and reason.
        renewed: bool,
        /// When it ends, in seconds since 1970; never if not given.
        until: Option<u64>,
        /// How many sessions of the source were ended.
        sessions_ended: u64,
    },
    /// To [`Request::Unban`].
    Unbanned {
        /// Whom.
        network: String,
        /// Whether exactly this network was banned by command.
        was_banned: bool,
        /// Bans that still hold for all of it.
        remaining: Vec<BanRow>,
    },
    /// To [`Request::Bans`].
    Bans(Bans),
    /// To [`Request::Reload`].
    Reloaded(Reloaded),
    /// To [`Request::DryRun`].
    DryRun(DryRun),
}

/// What a reload changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// New listeners.
    pub added: Vec<String>,
    /// Listeners with other settings.
    pub changed: Vec<String>,
    /// Listeners that are no longer configured; their sessions may finish.
    pub removed: Vec<String>,
    /// Sections whose changes need a restart.
    pub restart_needed_for: Vec<String>,
}

/// What a reload would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DryRun {
    /// Why the whole configuration would be rejected. Then the rest is empty.
    pub error: Option<String>,
    /// In the order of the new configuration.
    pub listeners: Vec<ListenerDryRun>,
    /// Listeners that are no longer configured.
    pub removed: Vec<String>,
    /// Sections whose changes need a restart.
    pub restart_needed_for: Vec<String>,
    /// What is valid and probably a mistake.
    pub warnings: Vec<String>,
}

impl DryRun {
    /// Whether the reload would be rejected. Backends that do not answer are no reason.
    #[must_use]
    pub fn is_rejected(&self) -> bool {
        self.error.is_some() || self.listeners.iter().any(|listener| listener.error.is_some())
    }
}

/// What a reload would do to a listener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerDryRun {
    /// Its name.
    pub name: String,
    /// Whether it changes.
    pub change: ListenerChange,
    /// Its engines, as in [`ListenerStatus::engine`].
    pub engine: Option<String>,
    /// Why the reload would be rejected: an engine or an address.
    pub error: Option<String>,
    /// Its backends, as the daemon reaches them now.
    pub backends: Vec<BackendDryRun>,
}

/// How a reload changes a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ListenerChange {
    /// It is new.
    Added,
    /// It has other settings.
    Changed,
    /// It stays as it is.
    Unchanged,
}

/// A backend, as the daemon reaches it now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendDryRun {
    /// Its configured address.
    pub name: String,
    /// Why its name has no address.
    pub error: Option<String>,
    /// Its addresses.
    pub addresses: Vec<AddressDryRun>,
}

/// An address of a backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressDryRun {
    /// The address.
    pub address: SocketAddr,
    /// Why its check failed.
    pub error: Option<String>,
}

/// The state of the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Time since its start.
    pub uptime_ms: u64,
    /// As `/readyz` reports it.
    pub readiness: String,
    /// The configuration in effect.
    pub config: ConfigStatus,
    /// What is logged: a level, and targets with a level of their own.
    #[serde(default)]
    pub log_level: String,
    /// Connections of all engines.
    pub connections: u64,
    /// Those of them that the inline engine carries.
    #[serde(default)]
    pub inline_connections: u64,
    /// The limit of all together.
    pub max_connections: u64,
    /// Bytes that the kernel holds for receivers that do not keep up.
    pub backlog_bytes: u64,
    /// The engines, and whether they can run here.
    pub engines: Vec<EngineStatus>,
    /// Bans, if there is a `[guard]`.
    #[serde(default)]
    pub guard: Option<GuardStatus>,
    /// The Services of Kubernetes that are followed.
    #[serde(default)]
    pub services: Vec<ServiceStatus>,
    /// In the order of the configuration.
    pub listeners: Vec<ListenerStatus>,
    /// Listeners that are no longer configured, with sessions left.
    pub removed_listeners: Vec<RemovedListenerStatus>,
}

/// A Service of Kubernetes that is followed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Its namespace and name.
    pub service: String,
    /// The kind of objects that are watched: `endpointslices` or `services`.
    pub resource: String,
    /// The endpoints by their state, once they are known: `ready`, `terminating`, `not_ready`.
    pub endpoints: Option<BTreeMap<String, Vec<IpAddr>>>,
    /// How long ago the API last answered. `None`: it never did.
    pub answered_ms_ago: Option<u64>,
    /// Why the last request failed, if it did.
    pub error: Option<String>,
}

/// Bans.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bans {
    /// Their number, listed or not.
    pub count: u64,
    /// In the order of addresses.
    pub rows: Vec<BanRow>,
}

/// A ban.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BanRow {
    /// Whom.
    pub network: String,
    /// Who wants it.
    pub origin: BanOrigin,
    /// When it ends, in seconds since 1970; never if not given.
    pub until: Option<u64>,
    /// The time that is left.
    pub remaining_ms: Option<u64>,
    /// Why.
    pub reason: String,
}

/// The configuration in effect.
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
    /// Why it cannot run, or was not tested.
    pub failure: Option<String>,
}

/// A listener.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListenerStatus {
    /// Its name.
    pub name: String,
    /// The mail protocol.
    pub protocol: String,
    /// The engine of its sockets, after `inline+` if inline takes what it can.
    pub engine: String,
    /// The addresses that it listens on.
    pub bind: Vec<SocketAddr>,
    /// Addresses that are not this host's and lead to it.
    #[serde(default)]
    pub virtual_addresses: Vec<IpAddr>,
    /// Whether new clients are rejected.
    pub draining: bool,
    /// Time until sessions from before the drain are aborted.
    pub abort_in_ms: Option<u64>,
    /// Current connections.
    pub active: u64,
    /// Those of them that the inline engine carries.
    #[serde(default)]
    pub active_inline: u64,
    /// Connections so far.
    pub accepted: u64,
    /// Connections rejected so far.
    pub rejected: u64,
    /// Headers sent so far.
    pub headers_sent: u64,
    /// Payload so far, as last counted.
    pub bytes_to_backend: u64,
    /// Payload to the client so far.
    pub bytes_to_client: u64,
    /// Its backends.
    pub backends: Vec<BackendStatus>,
}

/// A backend of a listener.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackendStatus {
    /// Its configured address.
    pub name: String,
    /// Its share of the connections.
    pub weight: u32,
    /// Its share by the configuration, if the operator has changed it.
    #[serde(default)]
    pub configured_weight: Option<u32>,
    /// Whether it is used only when no other backend is eligible.
    pub backup: bool,
    /// Its health.
    pub state: HealthState,
    /// The addresses of its name.
    pub addresses: Vec<SocketAddr>,
    /// Those of them that failed when they were last tried. They are tried after all others.
    #[serde(default)]
    pub failing_addresses: Vec<SocketAddr>,
    /// Current sessions.
    pub active: u64,
    /// Sessions so far.
    pub sessions: u64,
    /// Health checks passed.
    pub checks_passed: u64,
    /// Health checks failed.
    pub checks_failed: u64,
    /// How often it was ejected because connections failed.
    pub ejections: u64,
    /// Headers that it answered as commands.
    #[serde(default)]
    pub headers_misread: u64,
    /// It answered the last one so: its port does not expect a header.
    #[serde(default)]
    pub misreads_header: bool,
}

/// A listener that is no longer configured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovedListenerStatus {
    /// Its name.
    pub name: String,
    /// Its remaining connections.
    pub sessions: u64,
    /// Time until they are aborted.
    pub abort_in_ms: u64,
}

/// Connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sessions {
    /// Their number, listed or not.
    pub count: u64,
    /// The oldest first.
    pub rows: Vec<SessionRow>,
}

/// A session of splice or relay, or a connection that inline carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRow {
    /// Its id, for `sessions end`.
    #[serde(default)]
    pub id: String,
    /// The listener's name.
    pub listener: String,
    /// The engine that forwards its data.
    pub engine: String,
    /// The client's address.
    pub client: SocketAddr,
    /// The address that the client connected to.
    pub local: SocketAddr,
    /// The backend's address, once connected.
    pub backend: Option<SocketAddr>,
    /// Time since it was accepted.
    pub age_ms: u64,
    /// Payload to the backend so far; at most five seconds old.
    pub bytes_to_backend: u64,
    /// Payload to the client so far.
    pub bytes_to_client: u64,
}
