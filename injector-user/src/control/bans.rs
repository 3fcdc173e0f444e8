//! `injector ban`, `unban` and `bans`: how the daemon carries them out, and the answers as text.

use std::{
    fmt::{self, Write as _},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, anyhow};
use injector_common::guard::Ban;

use super::{
    text::{age, write_more, write_table},
    wire::{Answer, BanOrigin, BanRow, Bans},
};
use crate::{
    config::Network,
    guard::{BanCommand, Guard, ListedBan, Origin, Service},
    os::clock,
    server::Server,
    telemetry::log::target,
};

/// Bans a source, and ends its sessions.
pub(super) async fn ban(
    service: Option<&Service>,
    network: &str,
    duration_ms: Option<u64>,
    reason: Option<String>,
    force: bool,
    end_banned_sessions: impl Future<Output = usize>,
) -> anyhow::Result<Answer> {
    let service = configured(service)?.clone();
    let network = parse(network)?;
    let duration = duration_ms.map(Duration::from_millis);
    let command = BanCommand { network, duration, reason: reason.unwrap_or_default(), force };
    let renewed = tokio::task::spawn_blocking(move || service.ban(command)).await??;
    let sessions_ended = end_banned_sessions.await as u64;
    tracing::info!(target: target::GUARD, %network, duration = duration.map(tracing::field::debug), renewed, sessions_ended, "banned by command");
    let until = duration.map(|time| unix_seconds(SystemTime::now() + time));
    Ok(Answer::Banned { network: network.to_string(), renewed, until, sessions_ended })
}

/// Lifts a ban.
pub(super) async fn unban(service: Option<&Service>, network: &str) -> anyhow::Result<Answer> {
    let service = configured(service)?.clone();
    let network = parse(network)?;
    let lifted = tokio::task::spawn_blocking(move || service.unban(network)).await?;
    if lifted.was_banned {
        tracing::info!(target: target::GUARD, %network, "ban lifted by command");
    }
    let remaining = lifted.remaining.iter().map(row).collect();
    Ok(Answer::Unbanned { network: network.to_string(), was_banned: lifted.was_banned, remaining })
}

/// The bans of an origin, or of all.
pub(super) fn list(
    service: Option<&Service>,
    origin: Option<BanOrigin>,
    limit: Option<usize>,
) -> anyhow::Result<Answer> {
    let guard = configured(service)?.guard();
    let snapshot = guard.snapshot(origin.map(Origin::from), limit.unwrap_or(usize::MAX));
    Ok(Answer::Bans(Bans { count: snapshot.count as u64, rows: snapshot.bans.iter().map(row).collect() }))
}

/// Ends the sessions of sources that are banned now, and returns their number.
pub(super) fn end_sessions(server: &Server, guard: &Guard) -> usize {
    let count = server.end_sessions(
        |_, client, _| guard.is_banned(client.ip()),
        |connection| guard.is_banned(connection.client.ip()),
    );
    if count > 0 {
        tracing::info!(target: target::GUARD, count, "sessions of banned sources ended");
    }
    count
}

fn configured(service: Option<&Service>) -> anyhow::Result<&Service> {
    service.context("bans need a [guard] table in the configuration, which may be empty, and a restart")
}

fn parse(network: &str) -> anyhow::Result<Network> {
    network.parse().map_err(|advice| anyhow!("{network:?}: {advice}"))
}

fn row(listed: &ListedBan) -> BanRow {
    let ListedBan { origin, ban } = listed;
    let left = (ban.until_ns != Ban::FOREVER)
        .then(|| Duration::from_nanos(ban.until_ns.saturating_sub(clock::boottime_ns())));
    BanRow {
        network: ban.network.to_string(),
        origin: (*origin).into(),
        until: left.map(|left| unix_seconds(SystemTime::now() + left)),
        remaining_ms: left.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
        reason: ban.reason.to_string(),
    }
}

pub(super) fn unix_seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl From<BanOrigin> for Origin {
    fn from(origin: BanOrigin) -> Self {
        match origin {
            BanOrigin::List => Self::List,
            BanOrigin::Command => Self::Command,
            BanOrigin::CrowdSec => Self::CrowdSec,
        }
    }
}

impl From<Origin> for BanOrigin {
    fn from(origin: Origin) -> Self {
        match origin {
            Origin::List => Self::List,
            Origin::Command => Self::Command,
            Origin::CrowdSec => Self::CrowdSec,
        }
    }
}

/// The answers as text.
pub(super) fn write(out: &mut String, answer: &Answer) -> fmt::Result {
    match answer {
        Answer::Banned { network, renewed, until, sessions_ended } => {
            let again = if *renewed { " again" } else { "" };
            write!(out, "{network} is banned{again}, {}", end(*until))?;
            match sessions_ended {
                0 => writeln!(out),
                1 => writeln!(out, "; 1 session ended"),
                count => writeln!(out, "; {count} sessions ended"),
            }
        }
        Answer::Unbanned { network, was_banned, remaining } => {
            match was_banned {
                true => writeln!(out, "{network}: ban lifted")?,
                false => writeln!(out, "{network} was not banned by command")?,
            }
            for ban in remaining {
                writeln!(out, "still banned: {}", how_to_lift(ban))?;
            }
            Ok(())
        }
        Answer::Bans(bans) => {
            let cells = |row: &BanRow| {
                let left = row.remaining_ms.map_or_else(|| "-".to_owned(), age);
                [row.network.clone(), name(row.origin).to_owned(), left, row.reason.clone()]
            };
            let rows: Vec<_> = bans.rows.iter().map(cells).collect();
            write_table(out, ["NETWORK", "ORIGIN", "LEFT", "REASON"], &rows)?;
            write_more(out, bans.count, rows.len())
        }
        _ => Ok(()),
    }
}

fn how_to_lift(ban: &BanRow) -> String {
    let BanRow { network, reason, .. } = ban;
    match ban.origin {
        BanOrigin::Command => format!("{network} by command: `injector unban {network}`"),
        BanOrigin::List => {
            format!("{network} by {reason}: remove it there, or add an exception to guard.allow")
        }
        BanOrigin::CrowdSec => format!(
            "{network} by CrowdSec ({reason}): `cscli decisions delete`, or add an exception to guard.allow"
        ),
    }
}

fn name(origin: BanOrigin) -> &'static str {
    Origin::from(origin).name()
}

fn end(until: Option<u64>) -> String {
    until.map_or_else(
        || "without end".to_owned(),
        |at| format!("until {}", humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(at))),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(answer: &Answer) -> String {
        let mut out = String::new();
        write(&mut out, answer).unwrap();
        out
    }

    fn ban(network: &str, origin: BanOrigin, remaining_ms: Option<u64>, reason: &str) -> BanRow {
        let (network, reason) = (network.to_owned(), reason.to_owned());
        BanRow { network, origin, until: remaining_ms, remaining_ms, reason }
    }

    #[test]
    fn answers_are_plain_sentences() {
        let network = "192.0.2.7/32".to_owned();
        let banned = |renewed, until, sessions_ended| {
            text(&Answer::Banned { network: network.clone(), renewed, until, sessions_ended })
        };
        assert_eq!(banned(false, None, 0), "192.0.2.7/32 is banned, without end\n");
        assert_eq!(
            banned(true, Some(3600), 2),
            "192.0.2.7/32 is banned again, until 1970-01-01T01:00:00Z; 2 sessions ended\n"
        );
        let remaining = vec![
            ban("192.0.2.0/24", BanOrigin::List, None, "/etc/deny.txt"),
            ban("192.0.0.0/16", BanOrigin::Command, None, ""),
            ban("192.0.0.0/15", BanOrigin::CrowdSec, Some(5000), "http-probing"),
        ];
        assert_eq!(
            text(&Answer::Unbanned { network: network.clone(), was_banned: false, remaining }),
            "192.0.2.7/32 was not banned by command\n\
             still banned: 192.0.2.0/24 by /etc/deny.txt: remove it there, or add an exception to guard.allow\n\
             still banned: 192.0.0.0/16 by command: `injector unban 192.0.0.0/16`\n\
             still banned: 192.0.0.0/15 by CrowdSec (http-probing): `cscli decisions delete`, or add an exception to guard.allow\n"
        );
    }

    #[test]
    fn bans_are_a_table() {
        let rows = vec![
            ban("192.0.2.0/24", BanOrigin::List, None, "/etc/deny.txt"),
            ban("2001:db8::/64", BanOrigin::Command, Some(90_000), "fail2ban postfix"),
        ];
        assert_eq!(
            text(&Answer::Bans(Bans { count: 3, rows })),
            "NETWORK        ORIGIN   LEFT    REASON\n\
             192.0.2.0/24   list     -       /etc/deny.txt\n\
             2001:db8::/64  command  1m 30s  fail2ban postfix\n\
             and 1 more\n"
        );
    }
}
