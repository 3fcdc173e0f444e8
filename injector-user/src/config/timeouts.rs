//! `[listener.timeouts]`

use std::time::Duration;

use super::parse::section::{Section, Zero};
use crate::protocol::{FirstSpeaker, Protocol};

/// Dovecot waits 3 seconds for the header (postscreen 5), then closes.
const MAX_HEADER_WAIT: Duration = Duration::from_secs(3);
/// `MAX_TCP_KEEPIDLE`, include/net/tcp.h.
const MAX_KEEPALIVE: Duration = Duration::from_secs(32_767);

/// Half a minute after it connected, an SMTP client still waits for its greeting (RFC 5321, section 4.5.3.2.1: 5 minutes).
const QUEUE: Duration = Duration::from_secs(30);

/// `[listener.timeouts]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For all attempts to connect to a backend together.
    pub connect: Duration,
    /// How long a client waits for a backend that has reached its `max_connections`.
    pub queue: Duration,
    /// Idle time in both directions.
    pub idle: Duration,
    /// How long the header waits for the client's first bytes before it is sent alone; below 3 s.
    /// Zero: not at all, as where the server speaks first.
    pub header_wait: Duration,
    /// Idle time of the open direction after one side has sent its FIN.
    pub half_closed: Duration,
    /// How long a client may stay after its backend has finished and every byte was delivered.
    pub client_fin: Duration,
    /// How long a peer may leave data or keepalive probes unacknowledged, or its window closed.
    pub user_timeout: Duration,
    /// Idle time before the first keepalive probe; whole seconds, 1 to 32767.
    pub keepalive: Duration,
    /// How long sessions may continue once their listener is drained or removed.
    pub drain: Duration,
}

pub(super) fn read(section: Option<Section<'_>>, protocol: Protocol, protocol_known: bool) -> Timeouts {
    let default = protocol.timeouts();
    let mut timeouts = Timeouts {
        connect: default.connect,
        queue: QUEUE,
        idle: default.idle,
        header_wait: default.header_wait,
        half_closed: default.half_closed,
        client_fin: default.client_fin,
        user_timeout: default.user_timeout,
        keepalive: default.keepalive,
        drain: default.drain,
    };
    let Some(section) = section else { return timeouts };
    let set = |field, value: &mut Duration| {
        if let Some((_, duration)) = section.duration(field, Zero::Rejected) {
            *value = duration;
        }
    };
    set("connect", &mut timeouts.connect);
    set("queue", &mut timeouts.queue);
    set("idle", &mut timeouts.idle);
    set("half_closed", &mut timeouts.half_closed);
    set("client_fin", &mut timeouts.client_fin);
    set("user_timeout", &mut timeouts.user_timeout);
    set("drain", &mut timeouts.drain);
    if let Some((at, keepalive)) = section.duration("keepalive", Zero::Rejected) {
        if keepalive.subsec_nanos() != 0 || keepalive > MAX_KEEPALIVE {
            let written = humantime::format_duration(keepalive);
            let what = format!(
                " \"{written}\": must be whole seconds, at most 9h 6m 7s (the limit of the kernel's TCP_KEEPIDLE)"
            );
            section.report_field(at, "keepalive", &what);
        }
        timeouts.keepalive = keepalive;
    }
    if let Some((at, wait)) = section.duration("header_wait", Zero::Allowed) {
        let written = humantime::format_duration(wait);
        if protocol_known && protocol.speaks_first() == FirstSpeaker::Server {
            let what =
                format!(": has no effect with protocol {:?}: the server speaks first", protocol.name());
            section.report_field(at, "header_wait", &what);
        } else if wait >= MAX_HEADER_WAIT {
            let what =
                format!(" \"{written}\": must be less than 3s: Dovecot waits at most 3s for the header");
            section.report_field(at, "header_wait", &what);
        }
        timeouts.header_wait = wait;
    }
    section.finish();
    timeouts
}
