//! When the dialogues of an open loop start.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

/// Start times of dialogues: a Poisson process, on a timerfd, which has no timer slack, unlike
/// `epoll_wait`.
#[derive(Debug)]
pub(super) struct ArrivalTimer {
    pub(super) timer: OwnedFd,
    rate: f64,
    rng: ChaCha8Rng,
    next: Instant,
}

impl ArrivalTimer {
    pub(super) fn new(rate: f64, seed: u64) -> anyhow::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let mut timer = Self { timer, rate, rng: ChaCha8Rng::seed_from_u64(seed), next: Instant::now() };
        timer.advance();
        timer.arm()?;
        Ok(timer)
    }

    /// The next start time that has passed; `None`, with the timer armed, if none has.
    pub(super) fn due(&mut self) -> anyhow::Result<Option<Instant>> {
        if self.next > Instant::now() {
            self.arm()?;
            return Ok(None);
        }
        let due = self.next;
        self.advance();
        Ok(Some(due))
    }

    fn advance(&mut self) {
        let uniform: f64 = self.rng.random();
        self.next += Duration::from_secs_f64(-(1.0 - uniform).ln() / self.rate);
    }

    /// Arming the timer also clears its pending expiration.
    fn arm(&self) -> anyhow::Result<()> {
        // Zero would disarm the timer.
        let left = self.next.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let (once, left) = (Duration::ZERO.try_into()?, left.try_into().context("the rate is too low")?);
        let spec = Itimerspec { it_interval: once, it_value: left };
        Ok(timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec).map(drop)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dialogues_start_at_the_rate_and_at_reproducible_times() {
        let gaps = || {
            let mut timer = ArrivalTimer::new(1000.0, 7).unwrap();
            let mut last = timer.next;
            let mut gap = || {
                timer.advance();
                let gap = timer.next - last;
                last = timer.next;
                gap
            };
            (0..10_000).map(|_| gap()).collect::<Vec<_>>()
        };
        let first = gaps();
        assert_eq!(first, gaps());
        let total: Duration = first.iter().sum();
        assert!((9.5..10.5).contains(&total.as_secs_f64()), "{total:?}");
    }
}
