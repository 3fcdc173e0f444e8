//! Errors of a configuration file, with their positions.

use std::{cell::RefCell, fmt, io, path::PathBuf};

use crate::config::service::ServiceRef;

/// Why a configuration could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration {}: {error}", path.display())]
    Read {
        /// The path as given.
        path: PathBuf,
        /// The error of the operating system.
        error: io::Error,
    },
    /// The file is invalid: all errors, in the order of the file, one per line.
    #[error("{}", join(.0))]
    Invalid(Vec<Diagnostic>),
    /// The file names a Service of Kubernetes, which this build cannot follow.
    #[error(
        "{}: the service {service} cannot be followed: this injector was built without the feature `kubernetes`; \
         use a build that has it, such as the container image, or write an address or a name",
        path.display()
    )]
    NotBuilt {
        /// The path as given.
        path: PathBuf,
        /// The first such Service.
        service: ServiceRef,
    },
    /// The file was rejected, but no check reported an error: a bug of the injector.
    #[error(
        "{file}: cannot parse the file and cannot tell why: please report this file as a bug of the injector"
    )]
    Incomplete {
        /// The file name as given.
        file: String,
    },
}

/// One error at one position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// The file name as given to the parser.
    pub file: String,
    /// Counted from 1.
    pub line: usize,
    /// Counted in characters from 1.
    pub column: usize,
    /// The name of its listener, or `#2` for the second listener if it has no name.
    pub listener: Option<String>,
    /// The field, its value, the error and a suggestion.
    pub message: String,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: ", self.file, self.line, self.column)?;
        match &self.listener {
            Some(listener) if listener.starts_with('#') => write!(f, "listener {listener}: ")?,
            Some(listener) => write!(f, "listener {listener:?}: ")?,
            None => {}
        }
        f.write_str(&self.message)
    }
}

fn join(diagnostics: &[Diagnostic]) -> String {
    diagnostics.iter().map(Diagnostic::to_string).collect::<Vec<_>>().join("\n")
}

/// Collects the errors of one file.
#[derive(Debug)]
pub(crate) struct Diagnostics<'t> {
    text: &'t str,
    file: &'t str,
    found: RefCell<Vec<(usize, Diagnostic)>>,
}

impl<'t> Diagnostics<'t> {
    pub(crate) fn new(text: &'t str, file: &'t str) -> Self {
        Self { text, file, found: RefCell::default() }
    }

    /// Adds an error at a byte offset.
    pub(crate) fn add(&self, at: usize, listener: Option<&str>, message: String) {
        let (line, column) = position(self.text, at);
        let listener = listener.map(str::to_owned);
        let diagnostic = Diagnostic { file: self.file.to_owned(), line, column, listener, message };
        self.found.borrow_mut().push((at, diagnostic));
    }

    /// The line of a byte offset, for messages that refer to a second place.
    pub(crate) fn line(&self, at: usize) -> usize {
        position(self.text, at).0
    }

    /// All errors in the order of the file, or `None` if there are none.
    pub(crate) fn into_error(self) -> Option<ConfigError> {
        let mut found = self.found.into_inner();
        found.sort_by_key(|(at, _)| *at);
        (!found.is_empty())
            .then(|| ConfigError::Invalid(found.into_iter().map(|(_, diagnostic)| diagnostic).collect()))
    }
}

fn position(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// The entry of `known` that `word` probably means.
pub(crate) fn closest<'k>(word: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    // A third of the word may differ: enough for a typing error, too little for an unrelated word.
    let limit = (word.chars().count() / 3).max(1);
    known
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&word.to_lowercase(), candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}
