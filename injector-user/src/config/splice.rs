//! `[splice]`: how the header is sent, backlog limits, and when a direction is enrolled.

use std::time::Duration;

use super::parse::section::{Section, Zero};

/// `[splice]`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Splice {
    /// Limits of the backlog in the kernel.
    pub watermarks: Watermarks,
    /// When a direction is enrolled in the kernel.
    pub enrolment: EnrolmentPolicy,
    /// How the header is sent.
    pub header: HeaderMethod,
}

/// How the splice engine sends the header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeaderMethod {
    /// The BPF program `inject` prepends it in the kernel.
    #[default]
    Program,
    /// One sendmsg(2), as in the relay engine: less work for short sessions.
    Send,
}

impl HeaderMethod {
    const CHOICES: [(&'static str, Self); 2] = [("program", Self::Program), ("send", Self::Send)];
}

/// Limits of the backlog in the kernel, in bytes: `low < high` and `total_high < total_limit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watermarks {
    /// A direction with more than this is paused.
    pub high: u64,
    /// A direction with at most this much is never paused or reset.
    pub low: u64,
    /// While all connections together have more than this, directions above `low` are paused.
    pub total_high: u64,
    /// While all connections together have more than this, directions above `low` are reset.
    pub total_limit: u64,
}

impl Default for Watermarks {
    fn default() -> Self {
        // With `high` = 1 MiB, 200 stalled readers had a backlog of 191 MiB; with 256 KiB they had
        // 17 to 47 MiB (`limits/200 stalled readers`).
        Self { high: 256 << 10, low: 64 << 10, total_high: 256 << 20, total_limit: 512 << 20 }
    }
}

impl Watermarks {
    /// `verdict` notifies the daemon after this many bytes of a direction, so that the direction is
    /// paused before it is far above `high`.
    #[must_use]
    pub fn notify_step(&self) -> u64 {
        (self.high / 2).max(1)
    }

    /// The backlog at which `verdict` stops redirecting even if the daemon has not checked it.
    #[must_use]
    pub fn credit(&self) -> u64 {
        self.high.saturating_mul(8)
    }
}

/// When a direction is enrolled in the kernel. Enrolling costs as much as forwarding some payloads
/// in user space. So short sessions stay in user space, and so does bulk data, which a pipe
/// forwards faster (see `docs/benchmarks.md`). Any one condition is enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnrolmentPolicy {
    /// The number of payloads forwarded in user space, without bulk data.
    pub messages: u64,
    /// The number of bytes forwarded in user space.
    pub bytes: Option<u64>,
    /// The age of the connection, checked with its next payload.
    pub age: Option<Duration>,
}

impl Default for EnrolmentPolicy {
    fn default() -> Self {
        Self { messages: 16, bytes: None, age: None }
    }
}

/// An upper bound of byte values: more than any machine has, and sums do not overflow.
const MAX_BYTES: u64 = 1 << 40;

pub(super) fn read(section: Section<'_>) -> Splice {
    let mut splice = Splice::default();
    let Splice { watermarks, enrolment, header } = &mut splice;
    *header = section.choice("header", &HeaderMethod::CHOICES).unwrap_or_default();
    for (field, min, value) in [
        ("high_water", 1, &mut watermarks.high),
        ("low_water", 0, &mut watermarks.low),
        ("total_high_water", 1, &mut watermarks.total_high),
        ("total_limit", 1, &mut watermarks.total_limit),
        ("enrol_after_messages", 1, &mut enrolment.messages),
    ] {
        *value = section.integer(field, min, MAX_BYTES).map_or(*value, |(_, given)| given);
    }
    enrolment.bytes = section.integer("enrol_after_bytes", 1, MAX_BYTES).map(|(_, given)| given);
    enrolment.age = section.duration("enrol_after", Zero::Allowed).map(|(_, given)| given);
    for (lower, higher, names) in [
        (watermarks.low, watermarks.high, ["low_water", "high_water"]),
        (watermarks.total_high, watermarks.total_limit, ["total_high_water", "total_limit"]),
    ] {
        if lower >= higher {
            let [low, high] = names;
            section
                .report(section.at(), format!("splice.{low} = {lower} must be less than {high} = {higher}"));
        }
    }
    section.finish();
    splice
}
