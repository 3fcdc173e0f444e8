//! Bans by CrowdSec: follows the decisions of a LAPI (`/v1/decisions/stream`).
//!
//! One thread asks and applies, at a low priority. While the LAPI is away, slow, or answers nonsense, the bans stay as they
//! are and end by their own time. An answer is applied as a whole or not at all.
//!
//! Reading order: `schedule` says when to ask for what, `client` asks, `stream` reads the answer within limits,
//! `decision` judges each entry, `bans` makes changes of the table of it, `usage` reports back.

mod bans;
mod client;
mod decision;
mod duration;
mod schedule;
mod stream;
mod usage;

use std::{
    fs, io,
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use injector_common::guard::Counter;

use self::{
    bans::Captchas,
    client::{Client, RequestError, Timeouts},
    decision::Ignored,
    schedule::Schedule,
    stream::{Answer, Rules},
    usage::Usage,
};
use super::{Applied, Guard, Origin, WantedBan};
use crate::{
    config::{CrowdSec, Network},
    os::clock,
    telemetry::{log::target, metrics::CrowdSecMetrics},
};

/// The priority (nice) of the thread: threads with mail come first.
const NICENESS: i32 = 10;
/// Entries of an answer that are read besides twice `max_bans`: others of all scopes and types, deleted ones.
const MORE_ENTRIES: usize = 65_536;

/// The thread that follows a LAPI. It ends with the handle, after its present request.
#[derive(Debug)]
pub struct Feed(Sender<Option<CrowdSec>>);

impl Feed {
    /// Starts the thread. Without settings it removes the decisions of an earlier daemon, and waits for settings.
    ///
    /// # Errors
    /// When no thread can be created.
    pub fn start(
        settings: Option<CrowdSec>,
        table: Guard,
        max_bans: usize,
        metrics: CrowdSecMetrics,
    ) -> io::Result<Self> {
        Self::start_with(settings, Follower { table, max_bans, metrics, timeouts: Timeouts::default() })
    }

    fn start_with(settings: Option<CrowdSec>, follower: Follower) -> io::Result<Self> {
        let (sender, inbox) = mpsc::channel();
        thread::Builder::new().name("crowdsec".to_owned()).spawn(move || follower.run(settings, &inbox))?;
        Ok(Self(sender))
    }

    /// Follows another LAPI, or the same in another way, or none. Does not block. The same settings only
    /// make it ask now.
    pub fn configure(&self, settings: Option<CrowdSec>) {
        // The thread ends with this handle only.
        let _ = self.0.send(settings);
    }
}

/// What the thread works with.
#[derive(Debug)]
struct Follower {
    table: Guard,
    max_bans: usize,
    metrics: CrowdSecMetrics,
    timeouts: Timeouts,
}

/// What comes after following a LAPI.
enum Next {
    Configure(Option<CrowdSec>),
    End,
}

impl Follower {
    fn run(&self, mut settings: Option<CrowdSec>, inbox: &Receiver<Option<CrowdSec>>) {
        // Of this thread alone (setpriority(2), "C library/kernel differences").
        if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
            tracing::debug!(target: target::GUARD, %error, "the priority of the thread for CrowdSec cannot be lowered");
        }
        loop {
            let next = match &settings {
                Some(settings) => self.follow(settings, inbox),
                None => {
                    self.metrics.disable();
                    self.table.replace(Origin::CrowdSec, Vec::new());
                    inbox.recv().map_or(Next::End, Next::Configure)
                }
            };
            match next {
                Next::Configure(next) => settings = next,
                Next::End => return,
            }
        }
    }

    fn follow(&self, settings: &CrowdSec, inbox: &Receiver<Option<CrowdSec>>) -> Next {
        let started = Instant::now();
        let mut schedule = Schedule::new(settings.interval);
        let mut captchas = Captchas::default();
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut usage = Usage::new(settings.usage_metrics, seconds, self.dropped().unwrap_or(0));
        let mut reported = String::new();
        self.metrics.enable(&Ignored::ALL.map(Ignored::label));
        tracing::info!(target: target::GUARD, url = %settings.url, "following the decisions of CrowdSec");
        loop {
            let all = schedule.asks_for_all(started.elapsed());
            let rules = self.rules(settings, all);
            let answer = Client::new(settings, self.timeouts).and_then(|client| client.decisions(&rules));
            // What the old settings brought is not wanted any more.
            match inbox.try_recv() {
                Ok(next) if next.as_ref() == Some(settings) => {}
                Ok(next) => return Next::Configure(next),
                Err(TryRecvError::Disconnected) => return Next::End,
                Err(TryRecvError::Empty) => {}
            }
            match answer {
                Ok(answer) => {
                    if schedule.is_failing() {
                        tracing::info!(target: target::GUARD, url = %settings.url, "CrowdSec answers again");
                    }
                    reported.clear();
                    self.apply(all, answer, &mut captchas, &mut usage);
                    schedule.succeeded(all, started.elapsed());
                    self.metrics.succeeded();
                    if usage.is_due(started.elapsed()) {
                        self.report(settings, &mut usage, started.elapsed());
                    }
                }
                Err(error) => {
                    schedule.failed();
                    self.metrics.failed();
                    note(settings, &error, &mut reported);
                }
            }
            match inbox.recv_timeout(schedule.delay(fastrand::f64())) {
                Ok(next) if next.as_ref() == Some(settings) => {}
                Ok(next) => return Next::Configure(next),
                Err(RecvTimeoutError::Disconnected) => return Next::End,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn rules(&self, settings: &CrowdSec, full: bool) -> Rules {
        Rules {
            full,
            captcha: settings.captcha,
            max_kept: self.max_bans,
            max_entries: self.max_bans.saturating_mul(2).saturating_add(MORE_ENTRIES),
            now_ns: clock::boottime_ns(),
        }
    }

    fn apply(&self, all: bool, answer: Answer, captchas: &mut Captchas, usage: &mut Usage) {
        for (why, count) in Ignored::ALL.into_iter().zip(answer.ignored) {
            self.metrics.ignored(why.label(), count);
        }
        let (read, deleted) = (answer.new.len(), answer.deleted.len());
        let applied = if all {
            self.table.replace(Origin::CrowdSec, captchas.all(answer.new))
        } else if read + deleted > 0 {
            let present = |network| self.present(network);
            let change = captchas.change(&answer.deleted, &answer.new, present, clock::boottime_ns());
            self.table.change(Origin::CrowdSec, change.set, change.remove)
        } else {
            Applied::default()
        };
        usage.count(all, answer.origins);
        self.metrics.set_decisions(usage.decisions());
        let Applied { added, removed, protected, full } = applied;
        self.metrics.ignored(Ignored::Full.label(), u64::try_from(full).unwrap_or(u64::MAX));
        let ignored: u64 = answer.ignored.iter().sum();
        if all {
            tracing::info!(target: target::GUARD, bans = read, added, removed, protected, ignored, "all decisions of CrowdSec read");
        } else if added + removed > 0 {
            tracing::debug!(target: target::GUARD, added, removed, protected, ignored, "decisions of CrowdSec changed");
        }
        if answer.cut || full > 0 {
            tracing::warn!(target: target::GUARD, max_bans = self.max_bans, "CrowdSec has more decisions than guard.max_bans, and not all of them are bans: raise it, or choose origins with guard.crowdsec.origins");
        }
    }

    /// The ban of exactly this network that came from CrowdSec.
    fn present(&self, network: Network) -> Option<WantedBan> {
        let bans = self.table.bans_around(network).into_iter();
        bans.filter(|listed| listed.origin == Origin::CrowdSec)
            .map(|listed| listed.ban)
            .find(|ban| ban.network == network)
    }

    /// Sends usage metrics. A failure only makes the next report longer.
    fn report(&self, settings: &CrowdSec, usage: &mut Usage, now: Duration) {
        let dropped = self.dropped();
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let payload = usage.report(now, dropped, kernel.trim());
        match Client::new(settings, self.timeouts).and_then(|client| client.usage(&payload)) {
            Ok(true) => usage.reported(now, dropped),
            Ok(false) => {
                usage.turn_off();
                tracing::info!(target: target::GUARD, "this CrowdSec does not know usage metrics (it is older than 1.6.3); none are sent until a restart");
            }
            Err(error) => {
                tracing::debug!(target: target::GUARD, %error, "usage metrics could not be sent to CrowdSec; they are part of the next report");
            }
        }
    }

    /// Packets that the programs dropped.
    fn dropped(&self) -> Option<u64> {
        Counter::ALL.into_iter().map(|counter| self.table.dropped(counter)).sum()
    }
}

/// Logs a failure, unless the last one was the same.
fn note(settings: &CrowdSec, error: &RequestError, reported: &mut String) {
    let text = error.to_string();
    if *reported == text {
        tracing::debug!(target: target::GUARD, url = %settings.url, error = text, "no decisions of CrowdSec yet");
        return;
    }
    tracing::warn!(target: target::GUARD, url = %settings.url, error = text, "no decisions of CrowdSec; the bans stay until they end, and it is tried again");
    *reported = text;
}

#[cfg(test)]
mod tests;
