//! The benchmark: peers, work and figures, interleaved so that they can be compared.
//!
//! In reading order: [`peers`] are compared, [`work`] is what they do, on a [`stage`] with the load generator at its
//! [`ends`]; [`run`] measures every peer at every work, again and again, into a [`record`], and [`report`] makes of it
//! what people read, with the arithmetic of [`stats`]. Apart from all that, [`instructions`] are counted, not timed.

pub mod ends;
pub mod instructions;
pub mod mail_sink;
pub mod peers;
pub mod record;
pub mod report;
pub mod spinners;
pub mod stage;
pub mod stats;
pub mod work;

use std::fmt::Write as _;
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use injector_load::cpu::{Cpu, background};

use self::peers::{Peer, Programs};
use self::record::{Machine, Measurement, PeerNote, Record, Settings, WorkNote};
use self::spinners::Spinners;
use self::stage::Stage;
use self::work::{Scene, Work};

/// The share of the machine that others may use before a run.
const MOST_BACKGROUND: f64 = 0.05;

/// How long the machine is watched before a run.
const WATCH: Duration = Duration::from_secs(2);

/// How long a peer may settle after its start, and the kernel needs to do away with the stage before.
const SETTLE: Duration = Duration::from_millis(400);

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Names of peers, or what their names begin with; all if empty.
    pub peers: Vec<String>,
    /// The same of works.
    pub works: Vec<String>,
    /// Times everything is measured.
    pub repeats: usize,
    /// Length of a measurement.
    pub seconds: f64,
    /// Run on a machine that others use; the figures are worth little then, and the record says so.
    pub noisy: bool,
    /// Keep the processors awake.
    pub spinners: bool,
    /// Compare rules of enrolment instead of engines.
    pub enrolment: bool,
    /// Programs that were found.
    pub programs: Programs,
    /// The machine, with the versions that the caller knows.
    pub machine: Machine,
}

/// Those who are measured, and what they do.
pub type Choice = (Vec<Peer>, Vec<Box<dyn Work>>);

/// The peers and works that the options name.
///
/// # Errors
/// When a name is of none.
pub fn choose(options: &Options) -> anyhow::Result<Choice> {
    let mut peers = peers::all(&options.programs);
    if options.enrolment {
        peers.extend(peers::enrolments());
    }
    let works = work::all();
    let peers = pick(peers, &options.peers, |peer| peer.name.clone()).context("--only")?;
    let works = pick(works, &options.works, |work| work.name()).context("--work")?;
    Ok((peers, works))
}

/// Those whose name is among `wanted`, or else begins with one of them.
fn pick<T>(all: Vec<T>, wanted: &[String], name: impl Fn(&T) -> String) -> anyhow::Result<Vec<T>> {
    if wanted.is_empty() {
        return Ok(all);
    }
    let names: Vec<_> = all.iter().map(&name).collect();
    let mut chosen = Vec::new();
    for word in wanted {
        let exact: Vec<_> = names.iter().filter(|name| *name == word).collect();
        let begins = names.iter().filter(|name| name.starts_with(word));
        let found = if exact.is_empty() { begins.collect() } else { exact };
        ensure!(!found.is_empty(), "{word} is none of {}", names.join(", "));
        chosen.extend(found.into_iter().cloned());
    }
    Ok(all.into_iter().filter(|one| chosen.contains(&name(one))).collect())
}

/// Measures everything; `tell` gets a line for each measurement, and the record so far. Those that fail are in it.
///
/// # Errors
/// When nothing can be measured here, the machine is busy, or `tell` fails.
pub fn run(
    options: &Options,
    tell: &mut dyn FnMut(&Record, &str) -> anyhow::Result<()>,
) -> anyhow::Result<Record> {
    let (peers, works) = choose(options)?;
    let others = background(WATCH)?;
    ensure!(
        options.noisy || others.load() <= MOST_BACKGROUND,
        "others use {:.0} % of this machine, and figures are worth nothing above {:.0} %; wait, or say --noisy",
        others.load() * 100.0,
        MOST_BACKGROUND * 100.0
    );
    let spinners = options.spinners.then(Spinners::start).transpose()?;
    let mut record = begin(options, &peers, &works, others);
    let total = options.repeats * peers.len() * works.len();
    for repeat in 0..options.repeats {
        for work in &works {
            for turn in 0..peers.len() {
                // Whoever begins in one repeat comes later in the next.
                let peer = &peers[(turn + repeat) % peers.len()];
                let measurement = measure(peer, work.as_ref(), repeat, options.seconds);
                let number = record.measurements.len() + 1;
                let told = format!("[{number}/{total}] {}", line(work.as_ref(), &measurement));
                record.measurements.push(measurement);
                tell(&record, &told)?;
            }
        }
    }
    // They are no work, and would leave the machine nothing to be idle with.
    drop(spinners);
    record.settings.background_after = background(WATCH)?.load();
    Ok(record)
}

fn begin(options: &Options, peers: &[Peer], works: &[Box<dyn Work>], others: Cpu) -> Record {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let peer = |peer: &Peer| PeerNote {
        name: peer.name.clone(),
        about: peer.about.clone(),
        config: peer.config.clone(),
    };
    Record {
        begun: since.map_or(0, |since| since.as_secs()),
        machine: options.machine.clone(),
        settings: Settings {
            repeats: options.repeats,
            seconds: options.seconds,
            spinners: options.spinners,
            noisy: options.noisy,
            background: others.load(),
            background_steal: others.stolen(),
            background_after: 0.0,
        },
        peers: peers.iter().map(peer).collect(),
        works: works.iter().map(|work| note(work.as_ref())).collect(),
        measurements: Vec::new(),
    }
}

fn note(work: &dyn Work) -> WorkNote {
    WorkNote { name: work.name(), about: work.about(), figures: work.figures() }
}

/// One measurement, from the making of the stage to its end.
///
/// Each has a stage of its own: connections of one peer that the server still remembers (TIME_WAIT) would meet those of the
/// next under the same addresses, with the timestamps of another clock, and be asked to begin again (a challenge ACK).
fn measure(peer: &Peer, work: &dyn Work, repeat: usize, seconds: f64) -> Measurement {
    let mut measurement =
        Measurement { repeat, work: work.name(), peer: peer.name.clone(), ..Measurement::default() };
    let started = Stage::new().and_then(|stage| Ok((peer.start(&stage)?, stage)));
    // The peer goes before its stage.
    let (mut stage, mut running) = match started {
        Ok((running, stage)) => (stage, running),
        Err(error) => return Measurement { failed: Some(format!("{error:#}")), ..measurement },
    };
    thread::sleep(SETTLE);
    let mut scene = Scene { stage: &mut stage, peer, running: running.as_mut(), seconds };
    let measured = work.measure(&mut scene).and_then(|measured| Ok((measured, running.proof()?)));
    match measured {
        Ok((measured, proof)) => {
            Measurement { figures: measured.figures, cpu: measured.cpu, proof, ..measurement }
        }
        Err(error) => {
            measurement.failed = Some(format!("{error:#}{}", quote(&running.said())));
            measurement
        }
    }
}

/// The last lines of what a peer said, set off.
fn quote(said: &str) -> String {
    const SHOWN: usize = 20;
    let lines: Vec<_> = said.lines().collect();
    let last = &lines[lines.len().saturating_sub(SHOWN)..];
    last.iter().map(|line| format!("\n  | {line}")).collect()
}

/// A measurement in one line.
fn line(work: &dyn Work, measurement: &Measurement) -> String {
    let mut text = format!("{:<24} {:<22}", measurement.work, measurement.peer);
    if let Some(why) = &measurement.failed {
        // Writing to a String cannot fail.
        let _ = write!(text, " FAILED: {}", why.lines().next().unwrap_or_default());
    }
    for figure in work.figures() {
        if let Some(value) = measurement.figures.get(&figure.key) {
            let _ = write!(text, "  {} {}", report::digits(*value), figure.unit);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picked(wanted: &[&str]) -> anyhow::Result<Vec<&'static str>> {
        let wanted: Vec<_> = wanted.iter().map(|&word| word.to_owned()).collect();
        pick(vec!["nat", "splice", "splice-never", "relay"], &wanted, |name| (*name).to_owned())
    }

    #[test]
    fn a_name_is_itself_before_it_is_a_beginning() {
        assert_eq!(picked(&[]).unwrap().len(), 4);
        assert_eq!(picked(&["splice"]).unwrap(), ["splice"]);
        assert_eq!(picked(&["splice-", "nat"]).unwrap(), ["nat", "splice-never"]);
        assert!(picked(&["nginx"]).unwrap_err().to_string().contains("splice-never"));
    }

    #[test]
    fn peers_have_distinct_names() {
        let build = |series: &str| peers::Build {
            series: series.to_owned(),
            version: String::new(),
            command: vec!["haproxy".into()],
        };
        let programs = Programs {
            haproxies: vec![build("3.0"), build("2.6")],
            nginx: Some(("nginx".into(), "/usr/lib/nginx/modules".into())),
        };
        let options = Options { programs, enrolment: true, ..Options::default() };
        let (peers, _) = choose(&options).unwrap();
        let mut names: Vec<_> = peers.iter().map(|peer| peer.name.as_str()).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        for name in [peers::DIRECT, peers::NAT, "haproxy-3.0-splice-2t", "nginx", "splice", "relay"] {
            assert!(names.contains(&name), "{name}");
        }
    }
}
