//! The result of a soak.

use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use super::daemon_report::{DaemonReport, Line};
use super::endpoints::Shared;
use super::options::Options;
use super::plan::{Ending, Opening, Plan, Side};
use super::session_log::SessionRecord;
use super::testbed::Testbed;
use super::verdict::Failure;
use injector_testbed::bpf;
use injector_testbed::daemon::{
    BPF_EVENTS, BYTES, DIRECTION, Injector, PIPED, PLANE, RELAYED, SPLICED, TO_BACKEND, TO_CLIENT,
};
use injector_testbed::resource_usage::{self, Memory};

/// How many failures are printed in full.
const MAX_SHOWN: usize = 20;

/// What a daemon without sessions holds.
#[derive(Debug)]
pub(crate) struct ResourcesBefore {
    pub(crate) descriptors: usize,
    pub(crate) entries: Vec<(String, usize)>,
}

impl ResourcesBefore {
    /// The minimum of several readings: the readiness check's connection may still be open.
    pub(crate) fn settled(pid: u32) -> anyhow::Result<Self> {
        let mut descriptors = usize::MAX;
        for _ in 0..10 {
            descriptors = descriptors.min(resource_usage::descriptors(pid)?);
            thread::sleep(Duration::from_millis(50));
        }
        Ok(Self { descriptors, entries: bpf::map_entries(pid)? })
    }
}

/// What the daemon holds after the last session.
#[derive(Debug)]
pub(crate) struct ResourcesAfter {
    pub(crate) descriptors: usize,
    pub(crate) entries: Vec<(String, usize)>,
    pub(crate) active: f64,
}

impl ResourcesAfter {
    /// Reads until the values are as before, or time has passed.
    pub(crate) fn settled(injector: &Injector, before: &ResourcesBefore) -> anyhow::Result<Self> {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let active = injector
                .metrics()
                .map_or(f64::NAN, |metrics| metrics.sum("injector_connections_active", &[]) + 0.0);
            // The scrape's own connection is closed a moment later.
            thread::sleep(Duration::from_millis(100));
            let pid = injector.pid();
            let (descriptors, entries) = (resource_usage::descriptors(pid)?, bpf::map_entries(pid)?);
            let after = Self { descriptors, entries, active };
            if after.is_as(before) || Instant::now() > deadline {
                return Ok(after);
            }
        }
    }

    fn is_as(&self, before: &ResourcesBefore) -> bool {
        self.active < 0.5 && self.descriptors == before.descriptors && self.entries == before.entries
    }
}

/// Numbers of sessions by kind.
#[derive(Clone, Copy, Debug, Default)]
struct SessionCounts {
    clean: u64,
    half_closes: u64,
    resets_by_client: u64,
    resets_by_backend: u64,
    leavers: u64,
    speechless: u64,
    early_talkers: u64,
    stalls: u64,
}

impl SessionCounts {
    fn add(&mut self, plan: &Plan) {
        self.stalls += plan.stalls() as u64;
        self.early_talkers += u64::from(plan.opening == Opening::Server { early: true });
        self.clean += u64::from(plan.ending.clean());
        match plan.ending {
            Ending::ClosesFirst(_) => self.half_closes += 1,
            Ending::Together => {}
            Ending::Reset { by: Side::Client, .. } => self.resets_by_client += 1,
            Ending::Reset { by: Side::Backend, .. } => self.resets_by_backend += 1,
            Ending::ClientLeavesSilently { .. } => self.leavers += 1,
            Ending::BackendLeavesSilently { .. } => self.speechless += 1,
        }
    }
}

/// A session that failed.
#[derive(Debug)]
struct Failed {
    plan: Plan,
    failure: Failure,
    lines: Vec<Line>,
    record: SessionRecord,
}

/// The result of a soak, printed for readers.
#[derive(Debug)]
pub struct Report {
    options: Options,
    watermarks: Option<(u64, u64)>,
    sessions: u64,
    took: Duration,
    kinds: SessionCounts,
    daemon_report: DaemonReport,
    failed: Vec<Failed>,
    unmatched: Vec<String>,
    without_header: u64,
    memory: (Memory, Memory, Memory),
    resources: (ResourcesBefore, ResourcesAfter),
}

impl Report {
    #[expect(clippy::too_many_arguments, reason = "each part of the run hands in its own result, once")]
    pub(crate) fn new(
        options: &Options,
        shared: &Shared,
        testbed: &Testbed,
        sessions: u64,
        took: Duration,
        daemon_report: DaemonReport,
        memory: (Memory, Memory),
        resources: (ResourcesBefore, ResourcesAfter),
    ) -> anyhow::Result<Self> {
        let log = shared.log.lock();
        let mut kinds = SessionCounts::default();
        for number in log.sessions.keys() {
            kinds.add(&Plan::draw(options.seed, *number));
        }
        let failed = daemon_report.failures.iter().map(|(number, (failure, lines))| Failed {
            plan: Plan::draw(options.seed, *number),
            failure: failure.clone(),
            lines: lines.clone(),
            record: log.sessions.get(number).cloned().unwrap_or_default(),
        });
        Ok(Self {
            options: *options,
            watermarks: testbed.watermarks,
            sessions,
            took,
            kinds,
            failed: failed.collect(),
            unmatched: log.unmatched.clone(),
            without_header: log.without_header,
            daemon_report,
            memory: (memory.0, memory.1, Memory::now(testbed.injector.pid())),
            resources,
        })
    }

    /// Whether all checks passed.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.checks().iter().all(|(good, _)| *good)
    }

    /// The number of sessions.
    #[must_use]
    pub fn sessions(&self) -> u64 {
        self.sessions
    }

    fn failures(&self, kind: &str) -> usize {
        self.failed.iter().filter(|failed| failed.failure.kind() == kind).count()
    }

    fn checks(&self) -> Vec<(bool, String)> {
        let Self { sessions, daemon_report, resources: (before, after), .. } = self;
        let planned = if self.options.only.is_some() { 1 } else { self.options.planned };
        let [lost, duplicated, reordered, foreign] =
            ["lost", "duplicated", "reordered", "foreign"].map(|kind| self.failures(kind));
        let others = self.failed.len() - lost - duplicated - reordered - foreign;
        let (in_lines, in_metrics) = daemon_report.bytes;
        // Exact: payloads of a run are far below 2^53 bytes.
        #[expect(clippy::cast_precision_loss, reason = "below 2^53")]
        let same_bytes = (in_lines as f64 - in_metrics).abs() < 0.5;
        let entries = |entries: &[(String, usize)]| {
            let each = entries.iter().map(|(name, count)| format!("{name} {count}"));
            each.collect::<Vec<_>>().join(", ")
        };
        let unmatched = self.unmatched.len() as u64 + daemon_report.unmatched;
        vec![
            (*sessions >= planned, format!("{sessions} sessions, {planned} planned")),
            (
                lost + duplicated + reordered + foreign == 0,
                format!("{lost} lost, {duplicated} duplicated, {reordered} reordered, {foreign} foreign"),
            ),
            (others == 0, format!("{others} sessions failed otherwise")),
            (unmatched == 0, format!("{unmatched} connections or log lines without a session")),
            (
                daemon_report.metrics_error.is_none(),
                format!("/metrics: {}", daemon_report.metrics_error.as_deref().unwrap_or("responded")),
            ),
            (same_bytes, format!("bytes in the daemon's log lines {in_lines}, in its metrics {in_metrics}")),
            (after.active < 0.5, format!("connections still active: {}", after.active)),
            (
                before.descriptors == after.descriptors,
                format!(
                    "the daemon's descriptors: {} before, {} after",
                    before.descriptors, after.descriptors
                ),
            ),
            (
                after.entries == before.entries,
                format!(
                    "map entries: {} before, {} after",
                    entries(&before.entries),
                    entries(&after.entries)
                ),
            ),
        ]
    }

    fn show_sessions(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kinds, sessions, .. } = self;
        let rate = *sessions as u128 * 1000 / self.took.as_millis().max(1);
        writeln!(f, "sessions      {sessions} in {:.0} s, {rate} per second", self.took.as_secs_f64())?;
        writeln!(f, "  completed   {}, half-closed {}", kinds.clean, kinds.half_closes)?;
        writeln!(
            f,
            "  resets      {} by clients, {} by backends",
            kinds.resets_by_client, kinds.resets_by_backend
        )?;
        writeln!(
            f,
            "  early ends  {} silent clients, {} silent backends; {} connections got no header",
            kinds.leavers, kinds.speechless, self.without_header
        )?;
        writeln!(
            f,
            "  also        {} early-talking clients, {} stalls of readers",
            kinds.early_talkers, kinds.stalls
        )?;
        let reasons = self.daemon_report.ends.iter().map(|(end, count)| format!("{end} {count}"));
        writeln!(f, "  reasons     {}", reasons.collect::<Vec<_>>().join(", "))
    }

    fn show_planes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let metrics = &self.daemon_report.metrics;
        for (name, direction) in [("to backends", TO_BACKEND), ("to clients", TO_CLIENT)] {
            let [spliced, piped, relayed] = [SPLICED, PIPED, RELAYED]
                .map(|plane| whole(metrics.sum(BYTES, &[(DIRECTION, direction), (PLANE, plane)])));
            writeln!(f, "{name:<13} {spliced} by the kernel, {piped} by pipe, {relayed} by buffer")?;
        }
        // Without a sample the sum is minus zero.
        let count = |name| metrics.sum(name, &[]) + 0.0;
        write!(
            f,
            "planes        {} enrolments, {} failed",
            count("injector_enrolments_total"),
            count("injector_enrolment_failures_total"),
        )?;
        for change in ["paused", "moved_to_user_space", "resumed"] {
            write!(
                f,
                ", {} {change}",
                metrics.sum("injector_plane_changes_total", &[("change", change)]) + 0.0
            )?;
        }
        let trimmed = metrics.sum(BPF_EVENTS, &[("event", "trimmed")]) + 0.0;
        write!(f, ", {trimmed} segments trimmed")?;
        match self.watermarks {
            Some((high, low)) => writeln!(f, " (water marks {high} and {low})"),
            None => writeln!(f, " (this daemon has no water marks)"),
        }
    }

    fn show_memory(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (before, peak, after) = self.memory;
        let row = |f: &mut fmt::Formatter<'_>, name, [before, peak, after]: [u64; 3]| {
            let [before, peak, after] = [before, peak, after].map(bytes);
            writeln!(f, "  {name:<11} {before} before, {peak} at peak, {after} after")
        };
        let used = before.available.saturating_sub(peak.available);
        writeln!(
            f,
            "memory        {} less available at worst; other processes on this machine count as well",
            bytes(used)
        )?;
        row(f, "available", [before.available, peak.available, after.available])?;
        row(f, "slab", [before.slab, peak.slab, after.slab])?;
        row(f, "TCP", [before.tcp, peak.tcp, after.tcp])?;
        row(f, "the daemon", [before.daemon, peak.daemon, after.daemon])
    }

    fn show_failures(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Options { seed, engine, .. } = self.options;
        for Failed { plan, failure, lines, record } in self.failed.iter().take(MAX_SHOWN) {
            writeln!(f, "\nFAILED {plan}\n  {failure}")?;
            for (side, seen) in [(Side::Client, &record.client), (Side::Backend, &record.backend)] {
                match seen {
                    Some(seen) => writeln!(
                        f,
                        "  {side:<7} sent {}{}, received {}, then {:?}{}",
                        seen.sent,
                        if seen.finished { " and FIN" } else { "" },
                        seen.received,
                        seen.end,
                        seen.write_error.map_or_else(String::new, |error| format!(", writing: {error}"))
                    )?,
                    None => writeln!(f, "  {side:<7} never saw the session")?,
                }
            }
            for Line { end, error, to_backend, to_client } in lines {
                writeln!(
                    f,
                    "  daemon  {to_backend} to the backend, {to_client} to the client, then {end} {error}"
                )?;
            }
            let number = plan.number;
            writeln!(f, "  repeat: cargo xtask soak --engine {engine} --seed {seed} --only {number}")?;
        }
        if self.failed.len() > MAX_SHOWN {
            let rest = self.failed.iter().skip(MAX_SHOWN).map(|failed| failed.plan.number.to_string());
            writeln!(f, "\nalso failed: {}", rest.collect::<Vec<_>>().join(", "))?;
        }
        for unmatched in self.unmatched.iter().take(MAX_SHOWN) {
            writeln!(f, "FAILED at the backend: {unmatched}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.show_failures(f)?;
        let Options { seed, engine, at_once, .. } = self.options;
        writeln!(f, "\nsoak          engine {engine}, seed {seed}, {at_once} sessions at once")?;
        self.show_sessions(f)?;
        self.show_planes(f)?;
        self.show_memory(f)?;
        for (good, what) in self.checks() {
            writeln!(f, "{} {what}", if good { "ok    " } else { "FAILED" })?;
        }
        f.write_str(if self.passed() { "all checks passed" } else { "NOT all checks passed" })
    }
}

/// A number of bytes with a unit.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["B", "KiB", "MiB", "GiB"];
    let mut unit = 0;
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = count as f64;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or_default();
    if unit == 0 { format!("{count} {name}") } else { format!("{value:.1} {name}") }
}

/// A metric that counts bytes.
fn whole(value: f64) -> String {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "counters are whole and positive"
    )]
    bytes(value as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_with_a_unit() {
        let shown = [0, 1023, 1536, 5 << 20, 3 << 30, 4 << 40].map(bytes);
        assert_eq!(shown, ["0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.0 GiB", "4096.0 GiB"]);
    }

    #[test]
    fn leftovers_are_detected() {
        let before = ResourcesBefore { descriptors: 20, entries: vec![("FLOWS".into(), 0)] };
        let after = |descriptors, flows, active| ResourcesAfter {
            descriptors,
            entries: vec![("FLOWS".into(), flows)],
            active,
        };
        assert!(after(20, 0, 0.0).is_as(&before));
        for left in [after(21, 0, 0.0), after(20, 1, 0.0), after(20, 0, 1.0)] {
            assert!(!left.is_as(&before), "{left:?}");
        }
    }
}
