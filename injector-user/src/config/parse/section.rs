//! Reads one table of the file, field by field, and reports invalid, missing and unknown fields.
//!
//! `serde` stops at the first error and does not know the listener. This reader continues to the
//! end of the file.

use std::{cell::RefCell, path::PathBuf, time::Duration};

use toml::{
    Spanned as TomlSpanned,
    de::{DeTable, DeValue},
};

use super::{
    diagnostic::{Diagnostics, closest},
    duration::{DurationError, parse_duration},
};

/// No machine holds more connections than this.
pub(crate) const MAX_CONNECTIONS: usize = 1 << 30;

/// A value and its byte offset.
pub(crate) type Spanned<T> = (usize, T);

/// Whether a duration may be zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Zero {
    Allowed,
    Rejected,
}

/// An item of [`Section::entries`].
#[derive(Debug)]
pub(crate) enum Entry<'t> {
    Text(Spanned<&'t str>),
    Table(Section<'t>),
}

/// A table of the file.
#[derive(Debug)]
pub(crate) struct Section<'t> {
    table: &'t DeTable<'t>,
    /// The offset of the table, for missing fields.
    at: usize,
    /// The prefix of its fields in messages: empty, or with a final dot.
    prefix: String,
    listener: Option<String>,
    diagnostics: &'t Diagnostics<'t>,
    /// Every field that was read; all others are unknown.
    known: RefCell<Vec<&'static str>>,
    /// Fields of earlier versions, which suggestions never name.
    former: RefCell<Vec<&'static str>>,
}

impl<'t> Section<'t> {
    pub(crate) fn root(table: &'t TomlSpanned<DeTable<'t>>, diagnostics: &'t Diagnostics<'t>) -> Self {
        Self::new(table.get_ref(), 0, String::new(), None, diagnostics)
    }

    fn new(
        table: &'t DeTable<'t>,
        at: usize,
        prefix: String,
        listener: Option<String>,
        diagnostics: &'t Diagnostics<'t>,
    ) -> Self {
        Self {
            table,
            at,
            prefix,
            listener,
            diagnostics,
            known: RefCell::default(),
            former: RefCell::default(),
        }
    }

    /// Reports an error at `at`.
    pub(crate) fn report(&self, at: usize, message: impl Into<String>) {
        self.diagnostics.add(at, self.listener.as_deref(), message.into());
    }

    /// Reports an error of a field: `limits.max_connections 0: must be …`.
    pub(crate) fn report_field(&self, at: usize, field: &str, what: &str) {
        self.report(at, format!("{}{field}{what}", self.prefix));
    }

    /// The line of an offset.
    pub(crate) fn line(&self, at: usize) -> usize {
        self.diagnostics.line(at)
    }

    /// The offset of the table.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// Sets the listener of all later reports.
    pub(crate) fn set_listener(&mut self, listener: String) {
        self.listener = Some(listener);
    }

    /// The name of the listener in reports.
    pub(crate) fn listener(&self) -> &str {
        self.listener.as_deref().unwrap_or_default()
    }

    /// Reports all fields that were not read.
    pub(crate) fn finish(self) {
        let (known, former) = (self.known.borrow(), self.former.borrow());
        for (key, _) in self.table {
            if !known.contains(&key.get_ref().as_ref()) && !former.contains(&key.get_ref().as_ref()) {
                self.unknown_field(key, &known);
            }
        }
    }

    fn unknown_field(&self, key: &TomlSpanned<std::borrow::Cow<'_, str>>, known: &[&'static str]) {
        let name = key.get_ref();
        let advice = match closest(name, known.iter().copied()) {
            Some(meant) => format!("did you mean `{}{meant}`?", self.prefix),
            None => format!("known fields: {}", known.join(", ")),
        };
        self.report(key.span().start, format!("unknown field `{}{name}`, {advice}", self.prefix));
    }

    /// Whether the table has the field.
    pub(crate) fn has(&self, field: &str) -> bool {
        self.table.contains_key(field)
    }

    /// The value of a field of earlier versions. Another message than "unknown field" refuses it.
    pub(crate) fn former(&self, field: &'static str) -> Option<Spanned<&'t DeValue<'t>>> {
        self.former.borrow_mut().push(field);
        self.table.get(field).map(|value| (value.span().start, value.get_ref()))
    }

    /// A value of more than one type.
    pub(crate) fn value(&self, field: &'static str) -> Option<Spanned<&'t DeValue<'t>>> {
        self.get(field)
    }

    fn get(&self, field: &'static str) -> Option<Spanned<&'t DeValue<'t>>> {
        let mut known = self.known.borrow_mut();
        if !known.contains(&field) {
            known.push(field);
        }
        self.table.get(field).map(|value| (value.span().start, value.get_ref()))
    }

    fn wrong_type(&self, at: usize, field: &str, expected: &str, found: &DeValue<'_>) {
        let found = match found {
            DeValue::Table(_) => "a table",
            DeValue::Array(_) => "a list",
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "an integer",
            DeValue::Float(_) => "a fraction",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date",
        };
        self.report_field(at, field, &format!(": must be {expected}, not {found}"));
    }

    /// A table within this one.
    pub(crate) fn section(&self, field: &'static str) -> Option<Section<'t>> {
        let (at, value) = self.get(field)?;
        let Some(table) = value.as_table() else {
            self.wrong_type(at, field, &format!("a table, written [{}{field}]", self.header()), value);
            return None;
        };
        let prefix = format!("{}{field}.", self.prefix);
        Some(Self::new(table, at, prefix, self.listener.clone(), self.diagnostics))
    }

    /// An array of tables.
    pub(crate) fn sections(&self, field: &'static str) -> Option<Vec<Section<'t>>> {
        let (at, value) = self.get(field)?;
        let expected = format!("a list of tables, each written [[{}{field}]]", self.header());
        let Some(items) = value.as_array() else {
            self.wrong_type(at, field, &expected, value);
            return None;
        };
        let mut sections = Vec::new();
        for item in items {
            let at = item.span().start;
            let Some(table) = item.get_ref().as_table() else {
                self.wrong_type(at, field, &expected, item.get_ref());
                continue;
            };
            // Fields of a listener need no prefix: the message starts with the listener's name.
            let prefix =
                if self.listener.is_some() { format!("{}{field}.", self.prefix) } else { String::new() };
            sections.push(Self::new(table, at, prefix, self.listener.clone(), self.diagnostics));
        }
        Some(sections)
    }

    /// The name of this table in a TOML header, with a final dot.
    fn header(&self) -> String {
        let listener = if self.listener.is_some() { "listener." } else { "" };
        format!("{listener}{}", self.prefix)
    }

    /// A string. Another type is reported.
    pub(crate) fn string(&self, field: &'static str) -> Option<Spanned<&'t str>> {
        let (at, value) = self.get(field)?;
        let text = value.as_str();
        if text.is_none() {
            self.wrong_type(at, field, "a string", value);
        }
        Some((at, text?))
    }

    /// An absolute path. Anything else is reported.
    pub(crate) fn path(&self, field: &'static str) -> Option<PathBuf> {
        let (at, text) = self.string(field)?;
        let path = PathBuf::from(text);
        if !path.is_absolute() {
            self.report_field(at, field, &format!(" {text:?}: must be an absolute path"));
            return None;
        }
        Some(path)
    }

    /// Reads a field with `read`, and reports it if it is missing.
    pub(crate) fn required<T>(
        &self,
        field: &'static str,
        read: impl FnOnce(&Self, &'static str) -> Option<T>,
    ) -> Option<T> {
        if !self.has(field) {
            self.report_field(self.at, field, " is missing");
        }
        read(self, field)
    }

    /// A list of strings. An empty list and other types are reported.
    pub(crate) fn strings(&self, field: &'static str) -> Option<Vec<Spanned<&'t str>>> {
        let (at, value) = self.get(field)?;
        let Some(items) = value.as_array() else {
            self.wrong_type(at, field, "a list of strings", value);
            return None;
        };
        if items.is_empty() {
            self.report_field(at, field, ": must not be empty");
        }
        let strings = items.iter().filter_map(|item| {
            let text = item.get_ref().as_str();
            if text.is_none() {
                self.wrong_type(item.span().start, field, "a list of strings", item.get_ref());
            }
            Some((item.span().start, text?))
        });
        Some(strings.collect())
    }

    /// A list of strings or tables. An empty list and other types are reported.
    pub(crate) fn entries(&self, field: &'static str) -> Option<Vec<Entry<'t>>> {
        const EXPECTED: &str = "a list of strings or of tables";
        let (at, value) = self.get(field)?;
        let Some(items) = value.as_array() else {
            self.wrong_type(at, field, EXPECTED, value);
            return None;
        };
        if items.is_empty() {
            self.report_field(at, field, ": must not be empty");
        }
        let entry = |item: &'t TomlSpanned<DeValue<'t>>| {
            let at = item.span().start;
            match item.get_ref() {
                DeValue::String(text) => Some(Entry::Text((at, text.as_ref()))),
                DeValue::Table(table) => {
                    let prefix = format!("{}{field}.", self.prefix);
                    let listener = self.listener.clone();
                    Some(Entry::Table(Section::new(table, at, prefix, listener, self.diagnostics)))
                }
                other => {
                    self.wrong_type(at, field, EXPECTED, other);
                    None
                }
            }
        };
        Some(items.iter().filter_map(entry).collect())
    }

    /// A boolean. Another type is reported.
    pub(crate) fn flag(&self, field: &'static str) -> Option<Spanned<bool>> {
        let (at, value) = self.get(field)?;
        let flag = value.as_bool();
        if flag.is_none() {
            self.wrong_type(at, field, "true or false", value);
        }
        Some((at, flag?))
    }

    /// An integer between `min` and `max`. Anything else is reported.
    pub(crate) fn integer(&self, field: &'static str, min: u64, max: u64) -> Option<Spanned<u64>> {
        let (at, value) = self.get(field)?;
        let Some(integer) = value.as_integer() else {
            self.wrong_type(at, field, "an integer", value);
            return None;
        };
        let number = u64::from_str_radix(integer.as_str(), integer.radix()).ok();
        let number = number.filter(|number| (min..=max).contains(number));
        if number.is_none() {
            let range = if max == u64::MAX { format!("at least {min}") } else { format!("{min} to {max}") };
            self.report_field(at, field, &format!(" {integer}: must be {range}"));
        }
        Some((at, number?))
    }

    /// A number of connections, at least 1.
    pub(crate) fn count(&self, field: &'static str) -> Option<usize> {
        let (_, number) = self.integer(field, 1, MAX_CONNECTIONS as u64)?;
        usize::try_from(number).ok()
    }

    /// A duration such as `"30s"`. Anything else is reported.
    pub(crate) fn duration(&self, field: &'static str, zero: Zero) -> Option<Spanned<Duration>> {
        const EXPECTED: &str = "a duration such as \"30s\", \"1m 30s\" or \"250ms\"";
        let (at, value) = self.get(field)?;
        let Some(text) = value.as_str() else {
            self.wrong_type(at, field, EXPECTED, value);
            return None;
        };
        match parse_duration(text) {
            Ok(duration) if duration.is_zero() && zero == Zero::Rejected => {
                self.report_field(at, field, &format!(" {text:?}: must be more than zero"));
                None
            }
            Ok(duration) => Some((at, duration)),
            Err(DurationError::NotADuration) => {
                self.report_field(at, field, &format!(" {text:?}: must be {EXPECTED}"));
                None
            }
            Err(error) => {
                self.report_field(at, field, &format!(" {text:?}: {error}"));
                None
            }
        }
    }

    /// One of the words in `choices`. Anything else is reported with a suggestion.
    pub(crate) fn choice<T: Copy>(&self, field: &'static str, choices: &[(&'static str, T)]) -> Option<T> {
        let text = self.string(field)?;
        self.choose(field, text, choices)
    }

    /// As [`Section::choice`]. For one of `other_names` the report suggests the word beside it.
    pub(crate) fn choice_or_other_name<T: Copy>(
        &self,
        field: &'static str,
        choices: &[(&'static str, T)],
        other_names: &[(&'static str, &'static str)],
    ) -> Option<T> {
        let text = self.string(field)?;
        let meant = other_names.iter().find(|(other, _)| text.1.eq_ignore_ascii_case(other));
        match meant {
            Some((_, meant)) => {
                self.unknown_choice(text.0, field, text.1, Some(meant), &words(choices));
                None
            }
            None => self.choose(field, text, choices),
        }
    }

    /// As [`Section::choice`], for a string that has been read already.
    pub(crate) fn choose<T: Copy>(
        &self,
        field: &'static str,
        (at, text): Spanned<&str>,
        choices: &[(&'static str, T)],
    ) -> Option<T> {
        let found = choices.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let words = words(choices);
            self.unknown_choice(at, field, text, closest(text, words.iter().copied()), &words);
        }
        found
    }

    fn unknown_choice(&self, at: usize, field: &str, text: &str, meant: Option<&str>, words: &[&str]) {
        let advice = meant.map(|meant| format!("did you mean {meant:?}? ")).unwrap_or_default();
        self.report_field(at, field, &format!(" {text:?}: {advice}must be one of {}", words.join(", ")));
    }
}

fn words<T>(choices: &[(&'static str, T)]) -> Vec<&'static str> {
    choices.iter().map(|(word, _)| *word).collect()
}
