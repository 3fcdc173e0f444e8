//! Answers of a daemon, for tests.

use super::wire::{BackendStatus, ConfigStatus, EngineStatus, ListenerStatus, Status};
use crate::backend::HealthState;

pub(super) fn status() -> Status {
    let backend = |name: &str, state, backup| BackendStatus {
        name: name.to_owned(),
        weight: 3,
        backup,
        state,
        addresses: Vec::new(),
        active: 2,
        sessions: 70,
        checks_passed: 40,
        checks_failed: 1,
        ejections: 0,
    };
    let smtp = ListenerStatus {
        name: "smtp".to_owned(),
        protocol: "smtp".to_owned(),
        engine: "splice".to_owned(),
        bind: vec!["192.0.2.10:25".parse().unwrap()],
        draining: false,
        abort_in_ms: None,
        active: 2,
        accepted: 75,
        rejected: 5,
        headers_sent: 70,
        bytes_to_backend: 3 * 1024 * 1024,
        bytes_to_client: 900,
        backends: vec![
            backend("mail-1:2525", HealthState::Up, false),
            backend("192.0.2.21:2525", HealthState::Down, true),
        ],
    };
    Status {
        version: "0.1.0".to_owned(),
        pid: 7,
        uptime_ms: 3_723_000,
        readiness: "ready".to_owned(),
        config: ConfigStatus { file: "/etc/i.toml".into(), loaded_at: 0, reload_error: None },
        connections: 2,
        max_connections: 10_000,
        backlog_bytes: 0,
        engines: vec![EngineStatus { name: "splice".to_owned(), failure: None }],
        listeners: vec![
            ListenerStatus {
                name: "imap".to_owned(),
                draining: true,
                abort_in_ms: Some(90_000),
                backends: Vec::new(),
                ..smtp.clone()
            },
            smtp,
        ],
        removed_listeners: Vec::new(),
    }
}
