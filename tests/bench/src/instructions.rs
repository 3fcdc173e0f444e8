//! Instructions that the daemon spends on a session and on a message, counted by callgrind and held against ceilings.
//!
//! The daemon does the same work a few times and many times; the difference of both counts is divided by the difference of
//! the times, so that neither start nor stop is in it. Counts hardly depend on how busy the machine is, but they do depend
//! on the compiler, the C library and the processor's features, by which that library chooses its memcpy.
//!
//! Callgrind counts user space alone: a system call is one instruction, whatever the kernel does in it. The inline engine is
//! left out, as its connections do not pass through user space.

use std::fmt;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use injector_load::service::{ECHO, SHORT, Service};

use super::peers::{self, Peer, Programs};
use super::stage::Stage;
use injector_testbed::daemon::Injector;
use injector_testbed::netns;

/// At most so many instructions, by rustc 1.95 and glibc 2.36 on x86-64: what four runs counted, the spread of a busy machine
/// on top (3.6 % per session, 1.2 % per message), and 5 %.
pub const CEILINGS: [Ceiling; 4] = [
    // 30,405 to 30,724
    Ceiling { engine: "relay", per: Per::Session, most: 33_400 },
    // 2,967 to 2,994
    Ceiling { engine: "relay", per: Per::Message, most: 3_200 },
    // 30,626 to 31,741
    Ceiling { engine: "splice", per: Per::Session, most: 34_500 },
    // 0 to 12: the kernel carries messages, and what is left is what the daemon does as time goes by.
    Ceiling { engine: "splice", per: Per::Message, most: 60 },
];

/// How often the work is done in a short run and in a long one.
const TIMES: [u64; 2] = [200, 1200];

/// How often the daemon may be started for a run: under valgrind on a busy machine its self-test may miss a deadline.
const STARTS: usize = 5;

/// Below this share of the ceiling, in percent, the ceiling could be lower,
const FAR_BELOW: u64 = 85;
/// unless that would save fewer instructions than this.
const WORTH_SAYING: u64 = 100;

/// In front of a peer's configuration: all sessions on one thread, so that every run does the same.
const ONE_WORKER: &str = "[limits]\nworkers = 1\n\n";

/// Bytes of each question and of each answer.
const SIZE: usize = 64;

/// How long the daemon may take to connect or to answer; under callgrind it is many times slower than by itself.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the instructions are divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Per {
    /// Connect, 64 bytes there, 64 back, the server closes; one after another.
    Session,
    /// 64 bytes there or back, on one connection.
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

    /// Connections that it takes to do the work so often.
    const fn connections(self, times: u64) -> u64 {
        match self {
            Self::Session => times,
            Self::Message => 1,
        }
    }

    /// Sessions or messages in so many questions with their answers.
    const fn count(self, times: u64) -> u64 {
        match self {
            Self::Session => times,
            Self::Message => 2 * times,
        }
    }

    /// Does the work so often.
    fn work(self, target: SocketAddr, times: u64) -> anyhow::Result<()> {
        match self {
            Self::Session => (0..times).try_for_each(|_| session(target)),
            Self::Message => dialogue(target, times),
        }
    }
}

/// The most that one engine may spend on one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ceiling {
    /// Name of the peer.
    pub engine: &'static str,
    /// On what.
    pub per: Per,
    /// Instructions.
    pub most: u64,
}

/// A measured value beside its ceiling; displayed as one line that says what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was measured, and the most that it may be.
    pub ceiling: Ceiling,
    /// Instructions.
    pub measured: u64,
}

/// How a value lies to its ceiling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Too many instructions.
    Above,
    /// As it should be.
    Below,
    /// So few that the ceiling guards nothing.
    FarBelow,
}

impl Finding {
    /// How the value lies to its ceiling.
    #[must_use]
    pub const fn verdict(&self) -> Verdict {
        let (measured, most) = (self.measured, self.ceiling.most);
        if measured > most {
            Verdict::Above
        } else if measured < most * FAR_BELOW / 100 && most - measured >= WORTH_SAYING {
            Verdict::FarBelow
        } else {
            Verdict::Below
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ceiling { engine, per, most } = self.ceiling;
        write!(f, "{engine}: {} instructions per {}, ceiling {most}", self.measured, per.name())?;
        match self.verdict() {
            Verdict::Below => Ok(()),
            Verdict::FarBelow => write!(f, "; lower it in {}, so that this stays", file!()),
            Verdict::Above => write!(
                f,
                "; if the work is worth it, or a new compiler or C library is the reason, raise the ceiling in {} and say \
                 why in the commit",
                file!()
            ),
        }
    }
}

/// Measures everything that has a ceiling; `tell` gets each finding as it is made.
///
/// Callgrind's files stay in `keep`, if given: `relay-session-1200.callgrind` and so on.
///
/// # Errors
/// When the daemon does not run under valgrind, or a session fails. A value above its ceiling is no error here.
pub fn run(
    daemon: &Path,
    keep: Option<&Path>,
    tell: &mut dyn FnMut(&Finding),
) -> anyhow::Result<Vec<Finding>> {
    let scratch = netns::scratch_dir("callgrind")?;
    let folder = keep.unwrap_or(scratch.path());
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let measure = |ceiling: Ceiling| {
        let measured = measure(ceiling, daemon, folder);
        let measured = measured.with_context(|| format!("{}, per {}", ceiling.engine, ceiling.per.name()))?;
        let finding = Finding { ceiling, measured };
        tell(&finding);
        Ok(finding)
    };
    CEILINGS.into_iter().map(measure).collect()
}

fn measure(ceiling: Ceiling, daemon: &Path, folder: &Path) -> anyhow::Result<u64> {
    let Ceiling { engine, per, .. } = ceiling;
    let peer = peers::all(&Programs::default()).into_iter().find(|peer| peer.name == engine);
    let peer = peer.with_context(|| format!("{engine} is no peer"))?;
    let mut counted = TIMES.into_iter().map(|times| {
        let file = folder.join(format!("{engine}-{}-{times}.callgrind", per.name()));
        count(&peer, per, times, daemon, &file).with_context(|| format!("{times} times"))
    });
    let mut next = || counted.next().context("two runs")?;
    let instructions = [next()?, next()?];
    Ok(quotient(instructions, TIMES.map(|times| per.count(times))))
}

/// Instructions for one more; 0 where more were counted for fewer, which is to say that it takes next to none.
const fn quotient([few, many]: [u64; 2], [fewer, more]: [u64; 2]) -> u64 {
    many.saturating_sub(few) / (more - fewer)
}

/// Instructions from start to stop of a daemon that does a work so often. Each has a stage of its own, as in the benchmark.
fn count(peer: &Peer, per: Per, times: u64, daemon: &Path, file: &Path) -> anyhow::Result<u64> {
    let mut stage = Stage::new()?;
    let out = format!("--callgrind-out-file={}", file.display());
    let valgrind = ["valgrind", "--quiet", "--tool=callgrind", &out];
    let config = format!("{ONE_WORKER}{}", peer.config);
    let start = || Injector::start_under(&stage.topology.edge, &valgrind, daemon, &config);
    let injector = (1..STARTS).find_map(|_| start().ok()).map_or_else(start, Ok)?;
    let target = peer.target(per.service());
    let worked = stage.topology.client.run(|| per.work(target, times))?;
    let (status, log) = injector.stop()?;
    worked.with_context(|| format!("the injector logged:\n{log}"))?;
    ensure!(status.success(), "the injector ended with {status} and logged:\n{log}");
    let served = stage.server.take()?;
    ensure!(
        served.headers == per.connections(times) && served.bad_headers == 0 && served.failures == 0,
        "the server saw {served:?}"
    );
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    total(&text).with_context(|| format!("no line `totals:` in {}", file.display()))
}

/// The count of the whole run in callgrind's output, whose one event is `Ir` ("Callgrind Format Specification").
fn total(text: &str) -> Option<u64> {
    text.lines().rev().find_map(|line| line.strip_prefix("totals:"))?.trim().parse().ok()
}

fn session(target: SocketAddr) -> anyhow::Result<()> {
    let mut stream = connect(target)?;
    stream.write_all(&[b'x'; SIZE])?;
    let mut answer = Vec::with_capacity(SIZE);
    stream.read_to_end(&mut answer).context("reading the answer")?;
    ensure!(answer.len() == SIZE, "an answer of {} bytes", answer.len());
    Ok(())
}

fn dialogue(target: SocketAddr, times: u64) -> anyhow::Result<()> {
    let mut stream = connect(target)?;
    for _ in 0..times {
        stream.write_all(&[b'x'; SIZE])?;
        stream.read_exact(&mut [0; SIZE]).context("reading an answer")?;
    }
    Ok(())
}

fn connect(target: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, PATIENCE).context("connecting")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "# callgrind format\nversion: 1\nevents: Ir\nfl=(1) a.c\nfn=(1) main\n16 400\n\n\
                          totals: 9740013\n";

    fn finding(measured: u64, most: u64) -> Finding {
        Finding { ceiling: Ceiling { engine: "relay", per: Per::Session, most }, measured }
    }

    #[test]
    fn the_total_is_found_at_the_end() {
        assert_eq!(total(OUTPUT), Some(9_740_013));
        // Of a run that was cut short there is a file without it.
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
    fn a_value_may_reach_its_ceiling_and_no_more() {
        for (measured, most, verdict) in [
            (41_001, 41_000, Verdict::Above),
            (41_000, 41_000, Verdict::Below),
            (34_850, 41_000, Verdict::Below),
            (34_849, 41_000, Verdict::FarBelow),
            // Few instructions are far below few in percent alone.
            (0, 99, Verdict::Below),
        ] {
            assert_eq!(finding(measured, most).verdict(), verdict, "{measured} of {most}");
        }
    }

    #[test]
    fn a_line_says_what_is_above_what_and_where_to_go() {
        let line = finding(45_000, 41_000).to_string();
        for word in ["relay", "45000", "per session", "ceiling 41000", "raise", file!(), "commit"] {
            assert!(line.contains(word), "{word}: {line}");
        }
        assert_eq!(
            finding(40_000, 41_000).to_string(),
            "relay: 40000 instructions per session, ceiling 41000"
        );
        assert!(finding(30_000, 41_000).to_string().contains("lower it"));
    }
}
