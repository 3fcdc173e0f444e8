//! Whether a backend gets connections: what its checks, clients' connections and the operator say of it. Pure.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::config::Ejection;

/// What the operator has said, which goes before all else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdminState {
    /// Nothing: checks and connections decide.
    #[default]
    Auto,
    /// It gets connections whatever checks say.
    Up,
    /// It gets none. Established ones go on.
    Down,
}

/// Why a backend gets connections or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    /// It does.
    Up,
    /// Its checks fail.
    Down,
    /// Clients' connections have not reached it.
    Ejected,
    /// The operator says that it is up.
    ForcedUp,
    /// The operator has taken it out.
    ForcedDown,
}

impl HealthState {
    /// Whether it gets connections.
    #[must_use]
    pub const fn is_up(self) -> bool {
        matches!(self, Self::Up | Self::ForcedUp)
    }

    /// As in logs and on the terminal.
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

/// What is known of a backend.
#[derive(Clone, Debug)]
pub(super) struct Health {
    forced: AdminState,
    /// As the checks have it.
    up: bool,
    /// Checks in a row that say the opposite; `None` before the first check.
    against: Option<u32>,
    /// Connections in a row that failed.
    failures: u32,
    ejected_until: Option<Instant>,
}

impl Default for Health {
    /// Up until something is known: a daemon that has just started must not turn mail away.
    fn default() -> Self {
        Self { forced: AdminState::Auto, up: true, against: None, failures: 0, ejected_until: None }
    }
}

impl Health {
    /// A check is over. Returns what it has changed: the backend is up, or down, from here on.
    ///
    /// The first check of all decides alone: with a backend that is down from the start nobody should have to wait for
    /// `fall` checks.
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

    /// It is not checked any more: what the checks said is void.
    pub(super) fn unchecked(&mut self) {
        self.up = true;
        self.against = None;
    }

    /// A client's connection has reached it.
    pub(super) fn connected(&mut self) {
        self.failures = 0;
        self.ejected_until = None;
    }

    /// A client's connection has not reached it. Returns for how long it is left out from now on, if it is. When that time is
    /// over a single failure is enough for the next.
    pub(super) fn failed(&mut self, now: Instant, ejection: &Ejection) -> Option<Duration> {
        self.failures = self.failures.saturating_add(1);
        let after = ejection.after?;
        if self.failures < after || self.ejected(now) {
            return None;
        }
        self.ejected_until = Some(now + ejection.time);
        Some(ejection.time)
    }

    /// The operator decides.
    pub(super) fn set_admin_state(&mut self, forced: AdminState) {
        self.forced = forced;
        if forced == AdminState::Auto {
            self.connected();
        }
    }

    /// How it stands.
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

    /// `+` a good check, `-` a bad one; what became of it after each.
    fn after(checks: &str, rise: u32, fall: u32) -> String {
        let mut health = Health::default();
        let step = |check| {
            health.checked(check == '+', rise, fall);
            if health.health_state(Instant::now()).is_up() { 'U' } else { 'D' }
        };
        checks.chars().map(step).collect()
    }

    #[test]
    fn checks_in_a_row_decide() {
        for (checks, expected) in [
            // The first decides alone.
            ("-", "D"),
            ("+", "U"),
            ("-+", "DD"),
            ("-++", "DDU"),
            ("+--", "UUU"),
            ("+---", "UUUD"),
            // Any other in between begins the row anew.
            ("+--+--", "UUUUUU"),
            ("+---+-+", "UUUDDDD"),
            ("+---++", "UUUDDU"),
        ] {
            assert_eq!(after(checks, 2, 3), expected, "{checks}");
        }
        assert_eq!(after("+-+-", 1, 1), "UDUD");
    }

    #[test]
    fn failures_in_a_row_eject_and_the_next_one_after_that_again() {
        let mut health = Health::default();
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        assert_eq!([(); 2].map(|()| health.failed(start, &EJECTION)), [None, None]);
        health.connected();
        assert_eq!([(); 2].map(|()| health.failed(start, &EJECTION)), [None, None]);
        assert_eq!(health.failed(start, &EJECTION), Some(EJECTION.time));
        assert_eq!(health.health_state(later(29)), HealthState::Ejected);
        // Tried all the same, because there is no other: it stays at that.
        assert_eq!(health.failed(later(29), &EJECTION), None);
        assert_eq!(health.health_state(later(30)), HealthState::Up);
        assert_eq!(health.failed(later(30), &EJECTION), Some(EJECTION.time));
        health.connected();
        assert_eq!(health.health_state(later(30)), HealthState::Up);
    }

    #[test]
    fn nobody_is_ejected_where_that_is_off() {
        let mut health = Health::default();
        let never = Ejection { after: None, ..EJECTION };
        assert!((0..1000).all(|_| health.failed(Instant::now(), &never).is_none()));
    }

    #[test]
    fn the_operator_goes_before_checks_and_failures() {
        let mut health = Health::default();
        let now = Instant::now();
        health.set_admin_state(AdminState::Up);
        health.checked(false, 2, 3);
        assert!((0..3).any(|_| health.failed(now, &EJECTION).is_some()));
        assert_eq!(health.health_state(now), HealthState::ForcedUp);
        health.set_admin_state(AdminState::Down);
        health.checked(true, 1, 1);
        assert_eq!(health.health_state(now), HealthState::ForcedDown);
        // And leaves nothing behind but what the checks say.
        health.set_admin_state(AdminState::Auto);
        assert_eq!(health.health_state(now), HealthState::Up);
    }

    #[test]
    fn what_is_not_checked_any_more_is_up() {
        let mut health = Health::default();
        health.checked(false, 2, 3);
        health.unchecked();
        assert_eq!(health.health_state(Instant::now()), HealthState::Up);
    }
}
