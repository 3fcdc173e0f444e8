//! When a direction is enrolled in the kernel, and the outcome.

use std::{io, time::Duration};

use crate::{config::EnrolmentPolicy, engine::EnrolmentRefusal};

/// Whether enrolment is worth its cost after user space has read this much. Before the first byte
/// it never is, because user space checks that for a forged header.
pub(super) fn should_enrol(
    policy: &EnrolmentPolicy,
    messages: u64,
    bytes: u64,
    age: impl FnOnce() -> Duration,
) -> bool {
    bytes > 0
        && (messages >= policy.messages
            || policy.bytes.is_some_and(|enough| bytes >= enough)
            || policy.age.is_some_and(|enough| age() >= enough))
}

/// The outcome of an enrolment.
#[derive(Debug)]
pub(super) enum Enrolment {
    /// It is too early, or the engine never enrols.
    NotNow,
    /// The kernel forwards the direction.
    Done,
    /// The kernel refused; the direction stays in user space.
    Refused(EnrolmentRefusal),
    /// The kernel's counts are lost; the connection cannot continue.
    Lost(io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_one_threshold_is_enough_but_not_before_the_first_byte() {
        let second = Duration::from_secs(1);
        let policy = EnrolmentPolicy { messages: 3, bytes: Some(100), age: Some(second) };
        for (messages, bytes, age, expected) in [
            (2, 99, Duration::ZERO, false),
            (3, 99, Duration::ZERO, true),
            (0, 100, Duration::ZERO, true),
            (0, 1, second, true),
            (0, 0, second, false),
        ] {
            assert_eq!(
                should_enrol(&policy, messages, bytes, || age),
                expected,
                "{messages} {bytes} {age:?}"
            );
        }
        assert!(!should_enrol(
            &EnrolmentPolicy { bytes: None, age: None, ..policy },
            2,
            u64::MAX,
            || panic!("the age is not needed")
        ));
    }
}
