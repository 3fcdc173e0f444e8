//! When a direction is enrolled in the kernel, and what becomes of that.

use std::{io, time::Duration};

use crate::{config::EnrolmentPolicy, engine::EnrolmentRefusal};

/// Whether a direction of which user space has read so much is worth enrolling. Without a byte it never is: the first
/// payload is examined.
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

/// What became of an enrolment.
#[derive(Debug)]
pub(super) enum Enrolment {
    /// Too early, or the engine never does.
    NotNow,
    /// The kernel carries the direction.
    Done,
    /// User space keeps it.
    Refused(EnrolmentRefusal),
    /// The kernel does not say what it has carried: the connection cannot go on.
    Lost(io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_of_messages_bytes_and_age_pays_but_nothing_before_the_first_byte() {
        let second = Duration::from_secs(1);
        let policy = EnrolmentPolicy { messages: 3, bytes: Some(100), age: Some(second) };
        for (messages, bytes, age, off) in [
            (2, 99, Duration::ZERO, false),
            (3, 99, Duration::ZERO, true),
            (0, 100, Duration::ZERO, true),
            (0, 1, second, true),
            (0, 0, second, false),
        ] {
            assert_eq!(should_enrol(&policy, messages, bytes, || age), off, "{messages} {bytes} {age:?}");
        }
        assert!(!should_enrol(
            &EnrolmentPolicy { bytes: None, age: None, ..policy },
            2,
            u64::MAX,
            || panic!("not asked for")
        ));
    }
}
