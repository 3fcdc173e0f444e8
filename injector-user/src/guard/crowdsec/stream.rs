//! The answer of `/v1/decisions/stream`, read as it arrives: `{"new": […], "deleted": […]}`, in either order.
//!
//! The LAPI is not trusted with this process's memory: what is kept, the number of entries and the size of each are
//! limited. The time is limited by the socket that the answer comes from.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashSet},
    fmt,
    io::{self, Read},
    sync::Arc,
};

use serde::de::{DeserializeSeed, Deserializer as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::decision::{Decision, Ignored, Remediation};
use crate::config::{Captcha, Network};

/// The most bytes between the ends of two decisions. One has about 250.
const MAX_ENTRY: usize = 64 << 10;
/// The most different reasons that are kept apart: there are as many scenarios.
const MAX_REASONS: usize = 4096;
/// The longest reason, in characters.
const MAX_REASON: usize = 120;
/// The most origins that are counted apart.
pub(super) const MAX_ORIGINS: usize = 64;

/// What an answer is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Whether it is the first answer: all decisions, and `deleted` does not matter.
    pub(super) full: bool,
    /// See `[guard.crowdsec] captcha`.
    pub(super) captcha: Captcha,
    /// The most decisions that are kept. Of others the kind is counted.
    pub(super) max_kept: usize,
    /// The most decisions that are read.
    pub(super) max_entries: usize,
    /// `CLOCK_BOOTTIME` in nanoseconds: the durations count from here.
    pub(super) now_ns: u64,
}

/// A new decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct New {
    pub(super) network: Network,
    pub(super) remediation: Remediation,
    /// When it ends, in nanoseconds of `CLOCK_BOOTTIME`.
    pub(super) until_ns: u64,
    pub(super) reason: Arc<str>,
}

/// Numbers of decisions by origin: of IPv4 and of IPv6.
pub(super) type Origins = BTreeMap<String, [u64; 2]>;

/// What was read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) new: Vec<New>,
    pub(super) deleted: Vec<(Network, Remediation)>,
    /// By [`Ignored`].
    pub(super) ignored: [u64; Ignored::ALL.len()],
    /// Of `new` and of `deleted`.
    pub(super) origins: [Origins; 2],
    /// The answer had more entries than are read.
    pub(super) cut: bool,
}

/// Why an answer cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum StreamError {
    /// It is something else than a list of decisions, or not all of it.
    #[error("the answer is not a list of decisions: {0}")]
    Json(#[from] serde_json::Error),
    /// A delta must be complete.
    #[error("the answer has more than {0} changes")]
    TooMany(usize),
}

/// Reads an answer to its end. `reader` should be buffered.
///
/// # Errors
/// [`StreamError`]; nothing of the answer may be used then.
pub(super) fn read(reader: impl Read, rules: &Rules) -> Result<Answer, StreamError> {
    let budget = Cell::new(MAX_ENTRY);
    let mut state =
        State { rules, budget: &budget, answer: Answer::default(), entries: 0, reasons: HashSet::new() };
    let mut json = serde_json::Deserializer::from_reader(Budgeted { reader, budget: &budget });
    let read = json.deserialize_map(Top(&mut state));
    let (mut answer, entries) = (state.answer, state.entries);
    if answer.cut {
        // The list is so long that it would be cut anyway, and the rest is not waited for.
        return if rules.full { Ok(answer) } else { Err(StreamError::TooMany(entries)) };
    }
    read?;
    json.end()?;
    answer.new.shrink_to_fit();
    Ok(answer)
}

/// A reader that fails when an entry is too long. `budget` is renewed after each.
struct Budgeted<'a, R> {
    reader: R,
    budget: &'a Cell<usize>,
}

impl<R: Read> Read for Budgeted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.budget.get();
        if left == 0 && !buffer.is_empty() {
            return Err(io::Error::other(format!("an entry has more than {MAX_ENTRY} bytes")));
        }
        let most = buffer.len().min(left);
        let count = self.reader.read(&mut buffer[..most])?;
        self.budget.set(left.saturating_sub(count));
        Ok(count)
    }
}

struct State<'a> {
    rules: &'a Rules,
    budget: &'a Cell<usize>,
    answer: Answer,
    entries: usize,
    reasons: HashSet<Arc<str>>,
}

impl State<'_> {
    fn ignore(&mut self, why: Ignored) {
        if let Some(at) = Ignored::ALL.iter().position(|reason| *reason == why) {
            self.answer.ignored[at] += 1;
        }
    }

    fn add(&mut self, list: List, decision: &Decision) -> Result<(), Ignored> {
        if list == List::Deleted && self.rules.full {
            return Ok(());
        }
        let (network, remediation) = decision.target(self.rules.captcha)?;
        if list == List::Deleted {
            // The number of entries limits them.
            self.answer.deleted.push((network, remediation));
        } else {
            let remaining_ns = decision.remaining_ns()?;
            if self.answer.new.len() >= self.rules.max_kept {
                return Err(Ignored::Full);
            }
            let until_ns = self.rules.now_ns.saturating_add(remaining_ns);
            let reason = self.reason(decision);
            self.answer.new.push(New { network, remediation, until_ns, reason });
        }
        count(&mut self.answer.origins[list as usize], decision, network);
        Ok(())
    }

    /// The origin and the scenario, shared by all decisions of the same.
    fn reason(&mut self, decision: &Decision) -> Arc<str> {
        let mut text = label(decision.origin.as_deref().unwrap_or("crowdsec"));
        if let Some(scenario) = decision.scenario.as_deref().filter(|text| !text.is_empty()) {
            text = label(&format!("{text}: {scenario}"));
        }
        if let Some(known) = self.reasons.get(text.as_str()) {
            return Arc::clone(known);
        }
        if self.reasons.len() >= MAX_REASONS {
            text = "crowdsec".to_owned();
        }
        let reason: Arc<str> = text.into();
        self.reasons.insert(Arc::clone(&reason));
        reason
    }
}

/// A text for logs and lists: of limited length, without control characters.
fn label(text: &str) -> String {
    text.chars().filter(|char| !char.is_control()).take(MAX_REASON).collect()
}

/// Counts a decision by its origin, as usage metrics name it (`lists:NAME` for lists).
fn count(origins: &mut Origins, decision: &Decision, network: Network) {
    let origin = decision.origin.as_deref().unwrap_or_default();
    let name = match (origin, decision.scenario.as_deref()) {
        ("lists", Some(list)) => label(&format!("lists:{list}")),
        _ => label(origin),
    };
    of_origin(origins, name)[usize::from(network.address().is_ipv6())] += 1;
}

/// The numbers of an origin. Beyond [`MAX_ORIGINS`], all others are one.
pub(super) fn of_origin(origins: &mut Origins, name: String) -> &mut [u64; 2] {
    let is_new = !origins.contains_key(&name);
    let name = if is_new && origins.len() >= MAX_ORIGINS { "other".to_owned() } else { name };
    origins.entry(name).or_default()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum List {
    New = 0,
    Deleted = 1,
}

struct Top<'a, 's>(&'s mut State<'a>);

impl<'de> Visitor<'de> for Top<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with the lists \"new\" and \"deleted\"")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut lists = 0;
        while let Some(key) = map.next_key::<String>()? {
            let list = match key.as_str() {
                "new" => List::New,
                "deleted" => List::Deleted,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            map.next_value_seed(Entries { state: &mut *self.0, list })?;
            lists += 1;
        }
        if lists == 0 {
            return Err(serde::de::Error::custom("it has neither \"new\" nor \"deleted\""));
        }
        Ok(())
    }
}

struct Entries<'a, 's> {
    state: &'s mut State<'a>,
    list: List,
}

impl<'de> DeserializeSeed<'de> for Entries<'_, '_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of decisions, or null")
    }

    /// An empty list of Go.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        while let Some(decision) = entries.next_element::<Decision>()? {
            self.state.budget.set(MAX_ENTRY);
            self.state.entries += 1;
            if self.state.entries > self.state.rules.max_entries {
                self.state.answer.cut = true;
                return Err(serde::de::Error::custom("too many decisions"));
            }
            if let Err(why) = self.state.add(self.list, &decision) {
                self.state.ignore(why);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
