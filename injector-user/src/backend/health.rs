//! Whether a backend gets connections, from its checks, clients' connections and the operator.
//! Pure.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::config::Ejection;

/// The state set by the operator. It overrides checks and ejection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdminState {
    /// None: checks and connections decide.
    #[default]
    Auto,
    /// It gets connections regardless of checks.
    Up,
    /// It gets no new connections. Established ones continue.
    Down,
}

/// Whether a backend gets connections, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    /// It gets connections.
    Up,
    /// Its checks fail.
    Down,
    /// It is ejected after failed connections.
    Ejected,
    /// The operator has forced it up.
    ForcedUp,
    /// The operator has disabled it.
    ForcedDown,
}

impl HealthState {
    /// Whether it gets connections.
    #[must_use]
    pub const fn is_up(self) -> bool {
        matches!(self, Self::Up | Self::ForcedUp)
    }

    /// The name in logs and output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::Ejected => "ejected",
            Self::ForcedUp => "forced up",
            Self::ForcedDown => "forced down",
        }
    }
}

/// The health of one backend.
#[derive(Clone, Debug)]
pub(super) struct Health {
    forced: AdminState,
    /// The result of the checks.
    up: bool,
    /// Checks in a row that contradict `up`; `None` before the first check.
    against: Option<u32>,
    /// Failed connections in a row.
    failures: u32,
    ejected_until: Option<Instant>,
}

impl Default for Health {
    /// Up until the first check: a daemon that has just started must not reject mail.
    fn default() -> Self {
        Self { forced: AdminState::Auto, up: true, against: None, failures: 0, ejected_until: None }
    }
}

impl Health {
    /// Records a check. Returns the new state if it changed.
    ///
    /// The first check decides alone, so that clients do not wait for `fall` checks if a backend is
    /// down from the start.
    pub(super) fn checked(&mut self, passed: bool, rise: u32, fall: u32) -> Option<bool> {
        let first = self.against.is_none();
        if passed == self.up {
            self.against = Some(0);
            return None;
        }
        let against = self.against.unwrap_or(0).saturating_add(1);
        let enough = if self.up { fall } else { rise };
        if !first && against < enough {
            self.against = Some(against);
            return None;
        }
        self.up = passed;
        self.against = Some(0);
        Some(passed)
    }

    /// Discards the results of checks, because the backend is no longer checked.
    pub(super) fn unchecked(&mut self) {
        self.up = true;
        self.against = None;
    }

    /// Records a successful connection.
    pub(super) fn connected(&mut self) {
        self.failures = 0;
        self.ejected_until = None;
    }

    /// Records a failed connection. Returns the ejection time if the backend is now ejected. After
    /// that time, one more failure is enough to eject it again.
    pub(super) fn failed(&mut self, now: Instant, ejection: &Ejection) -> Option<Duration> {
        self.failures = self.failures.saturating_add(1);
        if self.failures < ejection.after? {
            return None;
        }
        self.eject(now, ejection)
    }

    /// Ejects the backend at once. Returns the ejection time if it was not ejected before.
    pub(super) fn eject(&mut self, now: Instant, ejection: &Ejection) -> Option<Duration> {
        if ejection.after.is_none() || self.ejected(now) {
            return None;
        }
        self.ejected_until = Some(now + ejection.time);
        Some(ejection.time)
    }

    /// Sets the operator's state.
    pub(super) fn set_admin_state(&mut self, forced: AdminState) {
        self.forced = forced;
        if forced == AdminState::Auto {
            self.connected();
        }
    }

    /// The resulting state.
    #[must_use]
    pub(super) fn health_state(&self, now: Instant) -> HealthState {
        match self.forced {
            AdminState::Up => HealthState::ForcedUp,
            AdminState::Down => HealthState::ForcedDown,
            AdminState::Auto if !self.up => HealthState::Down,
            AdminState::Auto if self.ejected(now) => HealthState::Ejected,
            AdminState::Auto => HealthState::Up,
        }
    }

    fn ejected(&self, now: Instant) -> bool {
        self.ejected_until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EJECTION: Ejection = Ejection { after: Some(3), time: Duration::from_secs(30) };

    /// `+` is a passed check, `-` a failed one. Returns the state after each.
    fn after(checks: &str, rise: u32, fall: u32) -> String {
        let mut health = Health::default();
        let step = |check| {
            health.checked(check == '+', rise, fall);
            if health.health_state(Instant::now()).is_up() { 'U' } else { 'D' }
        };
        checks.chars().map(step).collect()
    }

    #[test]
    fn consecutive_checks_change_the_state() {
        for (checks, expected) in [
            // The first check decides alone.
            ("-", "D"),
            ("+", "U"),
            ("-+", "DD"),
            ("-++", "DDU"),
            ("+--", "UUU"),
            ("+---", "UUUD"),
            // A contradicting check restarts the count.
            ("+--+--", "UUUUUU"),
            ("+---+-+", "UUUDDDD"),
            ("+---++", "UUUDDU"),
        ] {
            assert_eq!(after(checks, 2, 3), expected, "{checks}");
        }
        assert_eq!(after("+-+-", 1, 1), "UDUD");
    }

    #[test]
    fn consecutive_failures_eject_and_one_more_ejects_again() {
        let mut health = Health::default();
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        assert_eq!([(); 2].map(|()| health.failed(start, &EJECTION)), [None, None]);
        health.connected();
        assert_eq!([(); 2].map(|()| health.failed(start, &EJECTION)), [None, None]);
        assert_eq!(health.failed(start, &EJECTION), Some(EJECTION.time));
        assert_eq!(health.health_state(later(29)), HealthState::Ejected);
        // If it is tried because no other is available, the ejection does not change.
        assert_eq!(health.failed(later(29), &EJECTION), None);
        assert_eq!(health.health_state(later(30)), HealthState::Up);
        assert_eq!(health.failed(later(30), &EJECTION), Some(EJECTION.time));
        health.connected();
        assert_eq!(health.health_state(later(30)), HealthState::Up);
    }

    #[test]
    fn no_backend_is_ejected_if_ejection_is_disabled() {
        let mut health = Health::default();
        let never = Ejection { after: None, ..EJECTION };
        assert!((0..1000).all(|_| health.failed(Instant::now(), &never).is_none()));
    }

    #[test]
    fn the_operators_state_overrides_checks_and_failures() {
        let mut health = Health::default();
        let now = Instant::now();
        health.set_admin_state(AdminState::Up);
        health.checked(false, 2, 3);
        assert!((0..3).any(|_| health.failed(now, &EJECTION).is_some()));
        assert_eq!(health.health_state(now), HealthState::ForcedUp);
        health.set_admin_state(AdminState::Down);
        health.checked(true, 1, 1);
        assert_eq!(health.health_state(now), HealthState::ForcedDown);
        // Afterwards only the checks count.
        health.set_admin_state(AdminState::Auto);
        assert_eq!(health.health_state(now), HealthState::Up);
    }

    #[test]
    fn an_unchecked_backend_is_up() {
        let mut health = Health::default();
        health.checked(false, 2, 3);
        health.unchecked();
        assert_eq!(health.health_state(Instant::now()), HealthState::Up);
    }
}
