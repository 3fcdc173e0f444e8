//! Answers of a daemon, for tests.

use super::wire::{
    BackendStatus, ConfigStatus, EngineStatus, GuardDeviceStatus, GuardStatus, ListenerStatus, ServiceStatus,
    SessionRow, Sessions, Status,
};
use crate::backend::HealthState;

/// Two listeners, of which one is draining and one has two backends.
pub(super) fn status() -> Status {
    let backend = |name: &str, state, backup| BackendStatus {
        name: name.to_owned(),
        weight: 3,
        configured_weight: None,
        backup,
        state,
        addresses: Vec::new(),
        failing_addresses: Vec::new(),
        active: 2,
        sessions: 70,
        checks_passed: 40,
        checks_failed: 1,
        ejections: 0,
        headers_misread: 0,
        misreads_header: false,
    };
    let smtp = ListenerStatus {
        name: "smtp".to_owned(),
        protocol: "smtp".to_owned(),
        engine: "splice".to_owned(),
        bind: vec!["192.0.2.10:25".parse().unwrap()],
        virtual_addresses: vec!["198.51.100.10".parse().unwrap()],
        draining: false,
        abort_in_ms: None,
        active: 2,
        active_inline: 0,
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
        log_level: "info".to_owned(),
        connections: 3,
        inline_connections: 1,
        max_connections: 10_000,
        backlog_bytes: 0,
        services: vec![ServiceStatus {
            service: "mail/mailserver".to_owned(),
            resource: "endpointslices".to_owned(),
            endpoints: Some(
                [
                    ("ready", vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()]),
                    ("terminating", (2..8_u8).map(|host| [10, 0, 0, host].into()).collect()),
                    ("not_ready", Vec::new()),
                ]
                .map(|(state, addresses)| (state.to_owned(), addresses))
                .into(),
            ),
            answered_ms_ago: Some(12_000),
            error: None,
        }],
        guard: Some(GuardStatus {
            list: 1900,
            command: 3,
            max_bans: 262_144,
            dropped_packets: [("tc".to_owned(), 512), ("inline".to_owned(), 40)].into(),
            devices: vec![GuardDeviceStatus {
                name: "eth0".to_owned(),
                ingress: Some("tcx".to_owned()),
                xdp: Some("native".to_owned()),
                ..GuardDeviceStatus::default()
            }],
            ..GuardStatus::default()
        }),
        engines: vec![EngineStatus { name: "splice".to_owned(), failure: None }],
        listeners: vec![
            ListenerStatus {
                name: "imap".to_owned(),
                engine: "inline+splice".to_owned(),
                active: 3,
                active_inline: 1,
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

/// One session of each listener.
pub(super) fn sessions() -> Sessions {
    let row = SessionRow {
        id: "17".to_owned(),
        listener: "smtp".to_owned(),
        engine: "splice".to_owned(),
        client: "198.51.100.7:40000".parse().unwrap(),
        local: "192.0.2.10:25".parse().unwrap(),
        backend: Some("10.0.0.2:2525".parse().unwrap()),
        age_ms: 65_000,
        bytes_to_backend: 2048,
        bytes_to_client: 10,
    };
    Sessions { count: 2, rows: vec![row.clone(), SessionRow { listener: "imap".to_owned(), ..row }] }
}
