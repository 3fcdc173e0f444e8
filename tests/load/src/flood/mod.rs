//! A flood of SYNs with forged sources, as an attacker sends it: whole frames on a device, past the
//! IP stack of the host that sends them.

mod frame;

use std::io::{self, BufRead as _, IoSlice, Write as _};
use std::mem::MaybeUninit;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rustix::io::Errno;
use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, sendmmsg};

use self::frame::{FRAME, Syn, Template};
pub use self::frame::{HardwareAddress, SOURCE_PREFIX, SOURCES};

/// The highest rate, in SYNs per second.
pub const MAX_RATE: f64 = 1e6;

/// The longest duration, in seconds.
pub const MAX_SECONDS: f64 = 600.0;

/// SYNs per system call.
const BATCH: usize = 64;

/// How long the thread sleeps when no SYN is due.
const NAP: Duration = Duration::from_micros(100);

/// Ports of the forged sources begin here.
const FIRST_PORT: u16 = 1024;

/// One flood.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Flood {
    /// The device that sends.
    pub device: String,
    /// Its hardware address.
    pub from: HardwareAddress,
    /// The hardware address of the next hop.
    pub next_hop: HardwareAddress,
    /// Where the SYNs go. Only an address reserved for documentation (RFC 5737) is accepted: the
    /// flood stays in the testbed.
    pub target: SocketAddrV4,
    /// SYNs per second, at most [`MAX_RATE`].
    pub rate: f64,
    /// Duration in seconds, at most [`MAX_SECONDS`], unless standard input ends before.
    pub seconds: f64,
}

/// The result of a flood.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct FloodOutcome {
    /// SYNs that the device took.
    pub sent: u64,
    /// SYNs that the device did not take, because a queue was full.
    pub refused: u64,
    /// Duration in seconds.
    pub seconds: f64,
}

impl FloodOutcome {
    /// SYNs per second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "at most a billion")]
        let sent = self.sent as f64;
        if self.seconds > 0.0 { sent / self.seconds } else { 0.0 }
    }
}

/// Sends a flood (one line of JSON) until its time is over or standard input ends, and prints the
/// outcome (another line).
///
/// # Errors
/// When `flood` is invalid or out of bounds, when the caller lacks CAP_NET_RAW, or the device fails.
pub fn run(flood: &str) -> anyhow::Result<()> {
    let flood: Flood = serde_json::from_str(flood).context("not a flood")?;
    let over = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&over);
    // This thread ends with the process.
    thread::spawn(move || {
        let mut line = String::new();
        // A line, the end, and an error all mean the same.
        let _ = io::stdin().lock().read_line(&mut line);
        ended.store(true, Ordering::Relaxed);
    });
    let outcome = execute(&flood, &over)?;
    let mut out = io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(&outcome)?)?;
    Ok(out.flush()?)
}

/// Sends until its time is over, or `over` is set.
///
/// # Errors
/// As [`run`].
pub fn execute(flood: &Flood, over: &AtomicBool) -> anyhow::Result<FloodOutcome> {
    check(flood)?;
    let template = Template::new(flood.from, flood.next_hop, flood.target)?;
    let socket = open(&flood.device)?;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut frames = vec![[0; FRAME]; BATCH];
    let mut outcome = FloodOutcome::default();
    let (begun, duration) = (Instant::now(), Duration::from_secs_f64(flood.seconds));
    loop {
        let elapsed = begun.elapsed();
        if elapsed >= duration || over.load(Ordering::Relaxed) {
            outcome.seconds = elapsed.as_secs_f64();
            return Ok(outcome);
        }
        let due = due(flood.rate, elapsed, outcome.sent + outcome.refused);
        if due == 0 {
            thread::sleep(NAP);
            continue;
        }
        let batch = &mut frames[..due];
        for frame in &mut *batch {
            template.write(&random(&mut rng), frame);
        }
        send(&socket, batch, &mut outcome)?;
    }
}

/// How many SYNs to send now: what is missing at this rate, and at most a batch.
fn due(rate: f64, elapsed: Duration, so_far: u64) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "at most MAX_RATE * MAX_SECONDS"
    )]
    let by_now = (rate * elapsed.as_secs_f64()) as u64;
    usize::try_from(by_now.saturating_sub(so_far)).unwrap_or(BATCH).min(BATCH)
}

fn check(flood: &Flood) -> anyhow::Result<()> {
    let Flood { target, rate, seconds, .. } = flood;
    ensure!(target.ip().is_documentation(), "{target} is not an address of a testbed (RFC 5737)");
    ensure!(
        *rate > 0.0 && *rate <= MAX_RATE,
        "{rate} SYNs per second: must be above 0 and at most {MAX_RATE}"
    );
    ensure!(
        *seconds > 0.0 && *seconds <= MAX_SECONDS,
        "{seconds} seconds: must be above 0 and at most {MAX_SECONDS}"
    );
    Ok(())
}

fn random(rng: &mut ChaCha8Rng) -> Syn {
    Syn { host: rng.next_u32(), port: rng.random_range(FIRST_PORT..=u16::MAX), sequence: rng.next_u32() }
}

/// Sends all frames. The rest of a batch is tried again after an error, which concerns its first
/// frame.
fn send(socket: &socket2::Socket, frames: &[[u8; FRAME]], outcome: &mut FloodOutcome) -> anyhow::Result<()> {
    let mut rest = frames;
    while !rest.is_empty() {
        let slices: Vec<_> = rest.iter().map(|frame| [IoSlice::new(frame)]).collect();
        let mut controls: Vec<_> = rest.iter().map(|_| SendAncillaryBuffer::default()).collect();
        let mut messages: Vec<_> =
            slices.iter().zip(&mut controls).map(|(slice, control)| MMsgHdr::new(slice, control)).collect();
        match sendmmsg(socket, &mut messages, SendFlags::empty()) {
            Ok(count) => {
                outcome.sent += count as u64;
                rest = rest.get(count..).unwrap_or_default();
            }
            Err(Errno::INTR) => {}
            Err(Errno::NOBUFS | Errno::AGAIN) => {
                outcome.refused += 1;
                rest = &rest[1..];
            }
            Err(error) => return Err(error).context("sending SYNs"),
        }
    }
    Ok(())
}

/// A socket that writes frames to a device and receives none (packet(7)). They skip the device's
/// queueing discipline.
fn open(device: &str) -> anyhow::Result<socket2::Socket> {
    let socket = socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::RAW, None)
        .context("a packet socket needs CAP_NET_RAW")?;
    let index = rustix::net::netdevice::name_to_index(&socket, device)
        .with_context(|| format!("no device {device}"))?;
    // SAFETY: plain integers, for which zeros are valid.
    let mut address: libc::sockaddr_ll = unsafe { MaybeUninit::zeroed().assume_init() };
    address.sll_family = u16::try_from(libc::AF_PACKET)?;
    address.sll_ifindex = index.try_into()?;
    let length = libc::socklen_t::try_from(size_of_val(&address))?;
    let mut storage = socket2::SockAddrStorage::zeroed();
    // SAFETY: sockaddr_ll is an address, which storage has room for.
    *unsafe { storage.view_as() } = address;
    // SAFETY: the storage contains an address of this length.
    let address = unsafe { socket2::SockAddr::new(storage, length) };
    socket.bind(&address).with_context(|| format!("cannot bind to {device}"))?;
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is open, and the value lives for the call and has the size given.
    let result = unsafe {
        libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::SOL_PACKET,
            libc::PACKET_QDISC_BYPASS,
            (&raw const on).cast(),
            libc::socklen_t::try_from(size_of_val(&on))?,
        )
    };
    ensure!(result == 0, "PACKET_QDISC_BYPASS: {}", io::Error::last_os_error());
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flood() -> Flood {
        Flood {
            device: "lo".to_owned(),
            from: HardwareAddress([0; 6]),
            next_hop: HardwareAddress([0; 6]),
            target: "192.0.2.10:25".parse().unwrap(),
            rate: 1000.0,
            seconds: 0.2,
        }
    }

    #[test]
    fn what_is_missing_is_due_but_no_more_than_a_batch() {
        let at = |millis| Duration::from_millis(millis);
        assert_eq!(due(1000.0, at(0), 0), 0);
        assert_eq!(due(1000.0, at(10), 0), 10);
        assert_eq!(due(1000.0, at(10), 7), 3);
        assert_eq!(due(1000.0, at(10), 11), 0);
        assert_eq!(due(200_000.0, at(1000), 0), BATCH);
    }

    #[test]
    fn a_flood_is_bounded_and_stays_in_the_testbed() {
        assert!(check(&flood()).is_ok());
        for (out_of_bounds, why) in [
            (Flood { rate: 2e6, ..flood() }, "rate"),
            (Flood { rate: 0.0, ..flood() }, "no rate"),
            (Flood { rate: f64::NAN, ..flood() }, "not a rate"),
            (Flood { seconds: 601.0, ..flood() }, "duration"),
            (Flood { target: "10.25.0.1:25".parse().unwrap(), ..flood() }, "target"),
        ] {
            assert!(check(&out_of_bounds).is_err(), "{why}");
        }
        let line = serde_json::to_string(&flood()).unwrap();
        assert_eq!(serde_json::from_str::<Flood>(&line).unwrap(), flood());
    }

    #[test]
    fn a_flood_ends_after_its_time_and_keeps_its_rate() {
        let over = AtomicBool::new(false);
        let Ok(outcome) = execute(&flood(), &over) else {
            eprintln!("skipped: needs CAP_NET_RAW");
            return;
        };
        // A busy machine may keep it from its rate; it never exceeds it.
        assert!((1..=200 + BATCH as u64).contains(&outcome.sent), "{outcome:?}");
        assert!(outcome.rate() <= 1000.0 + 1e-6 && outcome.seconds >= 0.2, "{outcome:?}");
        over.store(true, Ordering::Relaxed);
        assert_eq!(execute(&Flood { seconds: 600.0, ..flood() }, &over).unwrap().sent, 0);
    }
}
