//! `[splice]`: the header's way, backlog limits, and when a direction is handed to the kernel.

use std::time::Duration;

use super::section::{Section, Zero};

/// `[splice]`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Splice {
    /// How much may wait in the kernel; `low < high` and `total_high < total_limit`.
    pub marks: Marks,
    /// When a direction is handed to the kernel.
    pub pays: Pays,
    /// Who puts the header in front.
    pub header: HeaderBy,
}

/// Who puts the header in front of what the backend reads first, in the splice engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeaderBy {
    /// The program `inject`, in the kernel.
    #[default]
    Program,
    /// One sendmsg(2), as in the relay engine: less work for short sessions.
    Send,
}

impl HeaderBy {
    const CHOICES: [(&'static str, Self); 2] = [("program", Self::Program), ("send", Self::Send)];
}

/// Limits in bytes. `low < high`, `total_high < total_limit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Above this, one direction is held.
    pub high: u64,
    /// What one direction may have waiting in any case.
    pub low: u64,
    /// Above this over all connections, every direction above `low` is held.
    pub total_high: u64,
    /// Above this over all connections, directions above `low` are reset.
    pub total_limit: u64,
}

impl Default for Marks {
    fn default() -> Self {
        // 200 stalled readers had 191 MiB waiting with 1 MiB, 17 to 47 MiB with 256 KiB (`limits/200 stalled readers`).
        Self { high: 256 << 10, low: 64 << 10, total_high: 256 << 20, total_limit: 512 << 20 }
    }
}

impl Marks {
    /// How often a long stream is looked at: so that it is held before it is far above `high`.
    #[must_use]
    pub fn notify_step(&self) -> u64 {
        (self.high / 2).max(1)
    }

    /// What one direction may have waiting where nobody looks in time: then the kernel stops by itself.
    #[must_use]
    pub fn credit(&self) -> u64 {
        self.high.saturating_mul(8)
    }
}

/// When the kernel's plane pays off. Enrolling costs as much as carrying some payloads in user space does: short sessions
/// stay there, and so does bulk, which a pipe carries faster (measured in `docs/benchmarks.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pays {
    /// After so many payloads in user space that were not bulk,
    pub messages: u64,
    /// or so many bytes,
    pub bytes: Option<u64>,
    /// or, with the next payload, when the connection has lasted so long.
    pub age: Option<Duration>,
}

impl Default for Pays {
    fn default() -> Self {
        Self { messages: 16, bytes: None, age: None }
    }
}

/// Water marks and the like: more than any machine has, and sums of it still fit.
const MOST_BYTES: u64 = 1 << 40;

pub(super) fn read(section: Section<'_>) -> Splice {
    let mut splice = Splice::default();
    let Splice { marks, pays, header } = &mut splice;
    *header = section.choice("header", &HeaderBy::CHOICES).unwrap_or_default();
    for (field, least, value) in [
        ("high_water", 1, &mut marks.high),
        ("low_water", 0, &mut marks.low),
        ("total_high_water", 1, &mut marks.total_high),
        ("total_limit", 1, &mut marks.total_limit),
        ("enrol_after_messages", 1, &mut pays.messages),
    ] {
        *value = section.integer(field, least, MOST_BYTES).map_or(*value, |(_, given)| given);
    }
    pays.bytes = section.integer("enrol_after_bytes", 1, MOST_BYTES).map(|(_, given)| given);
    pays.age = section.duration("enrol_after", Zero::Allowed).map(|(_, given)| given);
    for (lower, higher, names) in [
        (marks.low, marks.high, ["low_water", "high_water"]),
        (marks.total_high, marks.total_limit, ["total_high_water", "total_limit"]),
    ] {
        if lower >= higher {
            let [low, high] = names;
            section
                .problem(section.at(), format!("splice.{low} = {lower} must be less than {high} = {higher}"));
        }
    }
    section.finish();
    splice
}
