//! Instructions that the daemon executes per session and per message, counted by callgrind and
//! compared with ceilings.
//!
//! The daemon does the same job a few times and many times. The difference of both counts is
//! divided by the difference of the repetitions, so that start and shutdown cancel out. Counts
//! hardly depend on how busy the machine is, but they do depend on the compiler, the C library and
//! the processor's features, by which that library selects its memcpy.
//!
//! Callgrind counts user space alone: a system call is one instruction, whatever the kernel does in
//! it. The inline engine is not measured, because its connections do not pass through user space.

use std::fmt;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use injector_load::service::{ECHO, SHORT, Service};

use super::systems::{self, Programs, System};
use super::testbed::Testbed;
use injector_testbed::daemon::Injector;
use injector_testbed::netns;

/// Maximum instructions, for rustc 1.95 and glibc 2.36 on x86-64: the counts of four runs, plus the
/// spread of a busy machine (3.6 % per session, 1.2 % per message), plus 5 %.
pub const CEILINGS: [Ceiling; 4] = [
    // 30,405 to 30,724
    Ceiling { engine: "relay", per: Per::Session, max: 38_700 },
    // 2,967 to 2,994
    Ceiling { engine: "relay", per: Per::Message, max: 3_650 },
    // 30,626 to 31,741
    Ceiling { engine: "splice", per: Per::Session, max: 38_700 },
    // 0 to 12: the kernel carries messages; what remains is the daemon's periodic activity.
    Ceiling { engine: "splice", per: Per::Message, max: 60 },
];

/// Repetitions in a short run and in a long one.
const TIMES: [u64; 2] = [200, 1200];

/// Attempts to start the daemon for a run: under valgrind on a busy machine its self-test may miss
/// a deadline.
const STARTS: usize = 5;

/// Below this share of the ceiling, in percent, the ceiling could be lower,
const FAR_BELOW: u64 = 85;
/// unless that would save fewer instructions than this.
const MIN_SAVING: u64 = 100;

/// All sessions on one thread, so that every run is the same: replaces the head of the table.
const ONE_WORKER: [&str; 2] = ["[limits]\n", "[limits]\nworkers = 1\n"];

/// Bytes of each request and of each response.
const SIZE: usize = 64;

/// How long the daemon may take to connect or to respond; under callgrind it is many times slower
/// than natively.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What the instructions are divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Per {
    /// Connect, 64 bytes each way, the server closes; one after another.
    Session,
    /// 64 bytes in either direction, on one connection.
    Message,
}

impl Per {
    const fn name(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Message => "message",
        }
    }

    const fn service(self) -> &'static Service {
        match self {
            Self::Session => &SHORT,
            Self::Message => &ECHO,
        }
    }

    /// Connections for this many repetitions.
    const fn connections(self, times: u64) -> u64 {
        match self {
            Self::Session => times,
            Self::Message => 1,
        }
    }

    /// Sessions or messages in this many round trips.
    const fn count(self, times: u64) -> u64 {
        match self {
            Self::Session => times,
            Self::Message => 2 * times,
        }
    }

    /// Repeats the job this often.
    fn run(self, target: SocketAddr, times: u64) -> anyhow::Result<()> {
        match self {
            Self::Session => (0..times).try_for_each(|_| session(target)),
            Self::Message => dialogue(target, times),
        }
    }
}

/// The maximum for one engine and one unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ceiling {
    /// Name of the system.
    pub engine: &'static str,
    /// The unit.
    pub per: Per,
    /// Instructions.
    pub max: u64,
}

/// A measured value and its ceiling; displayed as one line that names the remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was measured, and its maximum.
    pub ceiling: Ceiling,
    /// Instructions.
    pub measured: u64,
}

/// The relation of a value to its ceiling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Too many instructions.
    Above,
    /// Within the limit.
    Below,
    /// So few that the ceiling does not detect a regression.
    FarBelow,
}

impl Finding {
    /// The relation of the value to its ceiling.
    #[must_use]
    pub const fn verdict(&self) -> Verdict {
        let (measured, max) = (self.measured, self.ceiling.max);
        if measured > max {
            Verdict::Above
        } else if measured < max * FAR_BELOW / 100 && max - measured >= MIN_SAVING {
            Verdict::FarBelow
        } else {
            Verdict::Below
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ceiling { engine, per, max } = self.ceiling;
        write!(f, "{engine}: {} instructions per {}, ceiling {max}", self.measured, per.name())?;
        match self.verdict() {
            Verdict::Below => Ok(()),
            Verdict::FarBelow => write!(f, "; lower the ceiling in {} to keep the gain", file!()),
            Verdict::Above => write!(
                f,
                "; if the change is worth it, or a new compiler or C library is the reason, raise the ceiling in {} and give the \
                 reason in the commit",
                file!()
            ),
        }
    }
}

/// Measures everything that has a ceiling; calls `on_finding` with each result.
///
/// Keeps callgrind's files in `keep`, if given: `relay-session-1200.callgrind` and so on.
///
/// # Errors
/// When the daemon does not run under valgrind, or a session fails. A value above its ceiling is
/// not an error here.
pub fn run(
    daemon: &Path,
    keep: Option<&Path>,
    on_finding: &mut dyn FnMut(&Finding),
) -> anyhow::Result<Vec<Finding>> {
    let scratch = netns::scratch_dir("callgrind")?;
    let folder = keep.unwrap_or(scratch.path());
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let measure = |ceiling: Ceiling| {
        let measured = measure(ceiling, daemon, folder);
        let measured = measured.with_context(|| format!("{}, per {}", ceiling.engine, ceiling.per.name()))?;
        let finding = Finding { ceiling, measured };
        on_finding(&finding);
        Ok(finding)
    };
    CEILINGS.into_iter().map(measure).collect()
}

fn measure(ceiling: Ceiling, daemon: &Path, folder: &Path) -> anyhow::Result<u64> {
    let Ceiling { engine, per, .. } = ceiling;
    let system = systems::all(&Programs::default()).into_iter().find(|system| system.name == engine);
    let system = system.with_context(|| format!("unknown system {engine}"))?;
    let mut counted = TIMES.into_iter().map(|times| {
        let file = folder.join(format!("{engine}-{}-{times}.callgrind", per.name()));
        count(&system, per, times, daemon, &file).with_context(|| format!("{times} times"))
    });
    let mut next = || counted.next().context("two runs")?;
    let instructions = [next()?, next()?];
    Ok(quotient(instructions, TIMES.map(|times| per.count(times))))
}

/// Instructions per unit; 0 if the longer run took fewer, because a unit then takes next to none.
const fn quotient([few, many]: [u64; 2], [fewer, more]: [u64; 2]) -> u64 {
    many.saturating_sub(few) / (more - fewer)
}

/// Instructions from start to exit of a daemon that repeats a job. Each run has its own testbed, as
/// in the benchmark.
fn count(system: &System, per: Per, times: u64, daemon: &Path, file: &Path) -> anyhow::Result<u64> {
    let mut testbed = Testbed::new()?;
    let out = format!("--callgrind-out-file={}", file.display());
    let valgrind = ["valgrind", "--quiet", "--tool=callgrind", &out];
    let [limits, one_worker] = ONE_WORKER;
    let config = system.config.replacen(limits, one_worker, 1);
    ensure!(config.contains(one_worker), "no table [limits]: {config}");
    let start = || Injector::start_under(&testbed.topology.edge, &valgrind, daemon, &config);
    let injector = (1..STARTS).find_map(|_| start().ok()).map_or_else(start, Ok)?;
    let target = system.target(per.service());
    let result = testbed.topology.client.run(|| per.run(target, times))?;
    let (status, log) = injector.stop()?;
    result.with_context(|| format!("the injector logged:\n{log}"))?;
    ensure!(status.success(), "the injector ended with {status} and logged:\n{log}");
    let served = testbed.server.take_counts()?;
    ensure!(
        served.headers == per.connections(times) && served.bad_headers == 0 && served.failures == 0,
        "the server saw {served:?}"
    );
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    total(&text).with_context(|| format!("no line `totals:` in {}", file.display()))
}

/// The total in callgrind's output, whose one event is `Ir` ("Callgrind Format Specification").
fn total(text: &str) -> Option<u64> {
    text.lines().rev().find_map(|line| line.strip_prefix("totals:"))?.trim().parse().ok()
}

fn session(target: SocketAddr) -> anyhow::Result<()> {
    let mut stream = connect(target)?;
    stream.write_all(&[b'x'; SIZE])?;
    let mut response = Vec::with_capacity(SIZE);
    stream.read_to_end(&mut response).context("reading the response")?;
    ensure!(response.len() == SIZE, "a response of {} bytes", response.len());
    Ok(())
}

fn dialogue(target: SocketAddr, times: u64) -> anyhow::Result<()> {
    let mut stream = connect(target)?;
    for _ in 0..times {
        stream.write_all(&[b'x'; SIZE])?;
        stream.read_exact(&mut [0; SIZE]).context("reading a response")?;
    }
    Ok(())
}

fn connect(target: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, TIMEOUT).context("connecting")?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "# callgrind format\nversion: 1\nevents: Ir\nfl=(1) a.c\nfn=(1) main\n16 400\n\n\
                          totals: 9740013\n";

    fn finding(measured: u64, max: u64) -> Finding {
        Finding { ceiling: Ceiling { engine: "relay", per: Per::Session, max }, measured }
    }

    #[test]
    fn the_total_is_found_at_the_end() {
        assert_eq!(total(OUTPUT), Some(9_740_013));
        // The file of a truncated run lacks the line.
        assert_eq!(total(&OUTPUT.replace("totals:", "summary:")), None);
        assert_eq!(total(&OUTPUT.replace("9740013", "")), None);
    }

    #[test]
    fn start_and_stop_cancel_out() {
        let start_and_stop = 8_000_000;
        let counted = TIMES.map(|times| start_and_stop + 39_000 * times);
        assert_eq!(quotient(counted, TIMES), 39_000);
        assert_eq!(quotient([9_000_100, 9_000_000], TIMES), 0);
    }

    #[test]
    fn a_message_is_half_a_round_trip() {
        assert_eq!((Per::Message.count(200), Per::Message.connections(200)), (400, 1));
        assert_eq!((Per::Session.count(200), Per::Session.connections(200)), (200, 200));
    }

    #[test]
    fn a_value_may_equal_its_ceiling() {
        for (measured, max, verdict) in [
            (41_001, 41_000, Verdict::Above),
            (41_000, 41_000, Verdict::Below),
            (34_850, 41_000, Verdict::Below),
            (34_849, 41_000, Verdict::FarBelow),
            // A few instructions below a low ceiling are many in percent alone.
            (0, 99, Verdict::Below),
        ] {
            assert_eq!(finding(measured, max).verdict(), verdict, "{measured} of {max}");
        }
    }

    #[test]
    fn a_finding_names_the_ceiling_and_the_remedy() {
        let line = finding(45_000, 41_000).to_string();
        for word in ["relay", "45000", "per session", "ceiling 41000", "raise", file!(), "commit"] {
            assert!(line.contains(word), "{word}: {line}");
        }
        assert_eq!(
            finding(40_000, 41_000).to_string(),
            "relay: 40000 instructions per session, ceiling 41000"
        );
        assert!(finding(30_000, 41_000).to_string().contains("lower the ceiling"));
    }
}
