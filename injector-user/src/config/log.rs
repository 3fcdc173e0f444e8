//! `[log]`

use std::fmt;

use super::parse::section::Section;

/// `[log]`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Log {
    /// Shape of a line.
    pub format: LogFormat,
    /// The least severe level that is written.
    pub level: LogLevel,
}

/// Shape of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Text for humans.
    #[default]
    Human,
    /// One JSON object per line.
    Json,
}

/// The least severe level that is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogLevel {
    /// Needs action now.
    Error,
    /// May need action.
    Warn,
    /// Start, stop, and one line per connection.
    #[default]
    Info,
    /// Each step of a connection, with client addresses.
    Debug,
    /// Everything.
    Trace,
}

impl LogFormat {
    const CHOICES: [(&'static str, Self); 2] = [("human", Self::Human), ("json", Self::Json)];
}

impl LogLevel {
    const CHOICES: [(&'static str, Self); 5] = [
        ("error", Self::Error),
        ("warn", Self::Warn),
        ("info", Self::Info),
        ("debug", Self::Debug),
        ("trace", Self::Trace),
    ];

    /// The level of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::CHOICES.into_iter().find(|(choice, _)| *choice == name).map(|(_, level)| level)
    }

    /// The same level in the terms of `tracing`.
    pub const fn tracing(self) -> tracing::Level {
        match self {
            Self::Error => tracing::Level::ERROR,
            Self::Warn => tracing::Level::WARN,
            Self::Info => tracing::Level::INFO,
            Self::Debug => tracing::Level::DEBUG,
            Self::Trace => tracing::Level::TRACE,
        }
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::CHOICES.iter().find(|(_, level)| level == self).map_or("", |(name, _)| name);
        f.pad(name)
    }
}

pub(super) fn read(section: Section<'_>) -> Log {
    let log = Log {
        format: section.choice("format", &LogFormat::CHOICES).unwrap_or_default(),
        level: section.choice("level", &LogLevel::CHOICES).unwrap_or_default(),
    };
    section.finish();
    log
}
