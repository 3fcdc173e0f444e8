//! Logging: one line per event on standard error, as text or JSON.
//!
//! Standard output belongs to the output of commands (`check`, `selftest`). systemd and Kubernetes
//! collect both.
//!
//! Above DEBUG, a client's address appears only in the access log line of its connection, and in the
//! warning of a limit that is reached, as the busiest source. All other lines can be kept and
//! shared.
//!
//! Crates that log through `log` (aya-log does, for the BPF programs) are included.

use std::{
    env, io,
    sync::{Arc, Mutex, PoisonError},
};

use tracing::{Level, Subscriber};
use tracing_subscriber::{
    EnvFilter,
    fmt::{self, MakeWriter},
    util::{SubscriberInitExt, TryInitError},
};

use super::log_queue::{LogQueue, LogThread};
pub use super::target;
use crate::config::{Log, LogFormat, LogLevel};

/// The environment variable with filter directives that replace the configured level, such as
/// `info,session=debug`.
pub const FILTER_VARIABLE: &str = "INJECTOR_LOG";

/// Why logging could not start.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// [`FILTER_VARIABLE`] is not a filter.
    #[error(
        "{FILTER_VARIABLE}={directives:?} is not a log filter ({reason}): use directives such as \"debug\" \
         or \"info,session=debug\""
    )]
    Filter {
        /// The value of the variable.
        directives: String,
        /// The error of the filter's parser.
        reason: String,
    },
    /// Another subscriber is active: logging was started twice.
    #[error("logging is already initialized: {0}")]
    Taken(TryInitError),
}

/// The log of the process. Clones share it.
#[derive(Clone, Debug)]
pub struct Logging {
    queue: LogQueue,
    levels: Arc<Levels>,
}

/// What is logged.
struct Levels {
    /// The value of [`FILTER_VARIABLE`], which overrides the configuration.
    variable: Option<String>,
    /// In the terms of `injector log-level`, or the variable.
    current: Mutex<String>,
    replace: Box<dyn Fn(EnvFilter) + Send + Sync>,
}

impl std::fmt::Debug for Levels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Levels").field("current", &self.current).finish_non_exhaustive()
    }
}

/// Starts logging for the process, to standard error. To be called once, before threads start.
///
/// # Errors
/// [`LogError`].
pub fn init(log: &Log) -> Result<Logging, LogError> {
    let variable = env::var(FILTER_VARIABLE).ok().filter(|directives| !directives.is_empty());
    let (subscriber, logging) = start(log, variable, LogQueue::new(io::stderr()))?;
    subscriber.try_init().map_err(LogError::Taken)?;
    Ok(logging)
}

type BoxedSubscriber = Box<dyn Subscriber + Send + Sync>;

fn start(
    log: &Log,
    variable: Option<String>,
    queue: LogQueue,
) -> Result<(BoxedSubscriber, Logging), LogError> {
    let (filter, current) = configured(log.level, variable.as_deref())?;
    let (subscriber, replace) = subscriber(log.format, filter, queue.clone());
    let levels = Levels { variable, current: Mutex::new(current), replace };
    Ok((subscriber, Logging { queue, levels: Arc::new(levels) }))
}

impl Logging {
    /// Starts the thread that writes the lines: see [`LogQueue::start`].
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start_thread(&self) -> io::Result<LogThread> {
        self.queue.start()
    }

    /// How many lines were dropped.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.queue.dropped()
    }

    /// What is logged: a level, and targets with a level of their own; or the value of
    /// [`FILTER_VARIABLE`].
    #[must_use]
    pub fn levels(&self) -> String {
        self.levels.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Logs at the configured level again, or as [`FILTER_VARIABLE`] says.
    pub fn reset_levels(&self, level: LogLevel) {
        // The variable was valid at startup.
        if let Ok((filter, current)) = configured(level, self.levels.variable.as_deref()) {
            self.replace(filter, current);
        }
    }

    /// Logs at other levels, in place of those before. `configured` is the level of targets that
    /// `levels` does not name. Returns what is logged now.
    pub fn set_levels(&self, configured: LogLevel, levels: &[LevelChange]) -> String {
        let (filter, current) = changed(configured, levels);
        self.replace(filter, current.clone());
        current
    }

    fn replace(&self, filter: EnvFilter, text: String) {
        let mut current = self.levels.current.lock().unwrap_or_else(PoisonError::into_inner);
        (self.levels.replace)(filter);
        *current = text;
    }
}

/// The filter of the configuration, and its text: the variable's directives if present, otherwise
/// the level.
fn configured(level: LogLevel, variable: Option<&str>) -> Result<(EnvFilter, String), LogError> {
    let Some(directives) = variable else { return Ok(changed(level, &[])) };
    let builder = EnvFilter::builder().with_default_directive(level.tracing().into());
    let filter = builder.parse(directives);
    let filter = filter
        .map_err(|error| LogError::Filter { directives: directives.to_owned(), reason: error.to_string() })?;
    Ok((filter, format!("{directives} ({FILTER_VARIABLE})")))
}

/// The filter for a level and changes of it, and its text. The level is of the daemon's own targets.
/// Libraries log at INFO at most, because loading the BPF programs writes hundreds of DEBUG lines. The
/// client of Kubernetes does not: it repeats each failure that the target `kubernetes` explains once.
fn changed(configured: LogLevel, changes: &[LevelChange]) -> (EnvFilter, String) {
    let everywhere = changes.iter().rev().find(|change| change.target.is_none());
    let level = everywhere.map_or(configured, |change| change.level);
    let of = |target: &str| {
        let named =
            changes.iter().rev().find(|change| change.target.is_some_and(|named| includes(named, target)));
        named.map_or(level, |change| change.level).tracing()
    };
    let own = target::ALL.iter().map(|target| format!("{target}={}", of(target)));
    let libraries = level.tracing().min(Level::INFO).to_string();
    let directives: Vec<_> = [libraries, "kube_client=off".to_owned()].into_iter().chain(own).collect();
    let named = changes.iter().filter(|change| change.target.is_some()).map(ToString::to_string);
    let text: Vec<_> = std::iter::once(level.to_string()).chain(named).collect();
    (EnvFilter::builder().parse_lossy(directives.join(",")), text.join(","))
}

/// Whether a target is the named one, or below it as `engine.inline` is below `engine`.
fn includes(named: &str, target: &str) -> bool {
    target.strip_prefix(named).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The least severe level of one target or of all: `debug`, `session=debug`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LevelChange {
    /// All targets without it.
    pub target: Option<&'static str>,
    /// The level.
    pub level: LogLevel,
}

/// Why a text is not a [`LevelChange`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LevelError {
    /// There is no such level.
    #[error("{0:?} is not a log level: use error, warn, info, debug or trace, or TARGET=LEVEL")]
    Level(String),
    /// There is no such target.
    #[error("{0:?} is not a log target: use one of {targets}", targets = target::ALL.join(", "))]
    Target(String),
}

impl std::fmt::Display for LevelChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.target {
            Some(target) => write!(f, "{target}={}", self.level),
            None => self.level.fmt(f),
        }
    }
}

impl std::str::FromStr for LevelChange {
    type Err = LevelError;

    fn from_str(text: &str) -> Result<Self, LevelError> {
        let (target, level) = match text.split_once('=') {
            Some((target, level)) => (Some(target), level),
            None => (None, text),
        };
        let level = LogLevel::named(level).ok_or_else(|| LevelError::Level(level.to_owned()))?;
        let known = |name: &str| {
            let known = target::ALL.iter().copied().find(|target| *target == name);
            known.ok_or_else(|| LevelError::Target(name.to_owned()))
        };
        Ok(Self { target: target.map(known).transpose()?, level })
    }
}

/// The subscriber, and what replaces its filter.
fn subscriber<W>(
    format: LogFormat,
    filter: EnvFilter,
    writer: W,
) -> (BoxedSubscriber, Box<dyn Fn(EnvFilter) + Send + Sync>)
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    // Both formats use RFC 3339 timestamps in UTC.
    let builder = fmt::Subscriber::builder().with_env_filter(filter).with_writer(writer);
    // Replacing fails only once the subscriber is gone, which is the process's.
    match format {
        LogFormat::Human => {
            let builder =
                builder.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).with_filter_reloading();
            let handle = builder.reload_handle();
            (Box::new(builder.finish()), Box::new(move |filter| drop(handle.reload(filter))))
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_current_span(false).with_span_list(false);
            let builder = builder.with_filter_reloading();
            let handle = builder.reload_handle();
            (Box::new(builder.finish()), Box::new(move |filter| drop(handle.reload(filter))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The output, shared with the subscriber.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Sink {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    /// What `act` logs.
    fn logged(log: Log, variable: Option<&str>, act: impl FnOnce(&Logging)) -> String {
        let sink = Sink::default();
        let (subscriber, logging) =
            start(&log, variable.map(str::to_owned), LogQueue::new(sink.clone())).unwrap();
        tracing::subscriber::with_default(subscriber, || act(&logging));
        sink.text()
    }

    fn written(format: LogFormat, level: LogLevel, variable: Option<&str>) -> String {
        logged(Log { format, level }, variable, |_| {
            tracing::info!(target: target::ACCESS, listener = "smtp", bytes = 12, "connection closed");
            tracing::debug!(target: target::SESSION, "detail");
        })
    }

    #[test]
    fn json_lines_are_flat_and_stamped_in_utc() {
        let text = written(LogFormat::Json, LogLevel::Info, None);
        let line: serde_json::Value = serde_json::from_str(text.trim_end()).unwrap();
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["message"], "connection closed");
        assert_eq!(line["listener"], "smtp");
        assert_eq!(line["bytes"], 12);
        let stamp = line["timestamp"].as_str().unwrap();
        humantime::parse_rfc3339(stamp).unwrap_or_else(|error| panic!("{stamp}: {error}"));
        assert!(stamp.ends_with('Z'), "{stamp}");
    }

    #[test]
    fn human_lines_have_message_and_fields() {
        let text = written(LogFormat::Human, LogLevel::Info, None);
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains("INFO") && text.contains("connection closed"), "{text}");
    }

    #[test]
    fn the_variable_overrides_the_configured_level() {
        let lines = |level, directives| written(LogFormat::Human, level, directives).lines().count();
        assert_eq!(lines(LogLevel::Info, None), 1);
        assert_eq!(lines(LogLevel::Debug, None), 2);
        assert_eq!(lines(LogLevel::Error, None), 0);
        assert_eq!(lines(LogLevel::Error, Some("debug")), 2);
        assert_eq!(lines(LogLevel::Error, Some("access=info")), 1);
        assert_eq!(lines(LogLevel::Error, Some("session=debug")), 1);
    }

    #[test]
    fn every_target_can_be_filtered_by() {
        for target in target::ALL {
            configured(LogLevel::Info, Some(&format!("{target}=debug"))).unwrap();
            format!("{target}=debug").parse::<LevelChange>().unwrap();
        }
    }

    #[test]
    fn libraries_are_quiet_at_debug() {
        let log = Log { format: LogFormat::Human, level: LogLevel::Debug };
        let text = logged(log, None, |_| {
            tracing::debug!(target: "aya_obj::relocation", "relocating");
            tracing::info!(target: "aya::bpf", "loaded");
            tracing::debug!(target: target::ENGINE_SPLICE, "ours");
        });
        assert!(!text.contains("relocating") && text.contains("loaded") && text.contains("ours"), "{text}");
    }

    #[test]
    fn an_invalid_filter_is_reported() {
        let error = configured(LogLevel::Info, Some("injector=loud")).unwrap_err().to_string();
        assert!(error.starts_with("INJECTOR_LOG=\"injector=loud\" is not a log filter"), "{error}");
    }

    fn changes(texts: &[&str]) -> Vec<LevelChange> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn levels_change_at_run_time_and_come_back() {
        // The targets that log at DEBUG.
        fn probe() {
            tracing::debug!(target: target::SESSION, "session");
            tracing::debug!(target: target::HEALTH, "health");
            tracing::debug!(target: target::ENGINE_INLINE, "inline");
            tracing::debug!(target: "aya", "library");
        }
        for (levels, text, seen) in [
            (&["debug"][..], "debug", &["session", "health", "inline"][..]),
            (&["session=debug"], "info,session=debug", &["session"]),
            (&["engine=trace"], "info,engine=trace", &["inline"]),
            (&["debug", "session=warn"], "debug,session=warn", &["health", "inline"]),
            (&["session=debug", "session=info"], "info,session=debug,session=info", &[]),
            (&["error"], "error", &[]),
        ] {
            let log = logged(Log::default(), None, |logging| {
                probe();
                assert_eq!(logging.levels(), "info");
                assert_eq!(logging.set_levels(LogLevel::Info, &changes(levels)), text);
                assert_eq!(logging.levels(), text);
                probe();
                logging.reset_levels(LogLevel::Info);
                assert_eq!(logging.levels(), "info");
                probe();
            });
            let words: Vec<_> = log.lines().filter_map(|line| line.split(' ').next_back()).collect();
            assert_eq!(words, seen, "{levels:?}");
        }
    }

    #[test]
    fn the_variable_is_back_after_a_reset() {
        let text = logged(Log::default(), Some("session=debug"), |logging| {
            assert_eq!(logging.levels(), "session=debug (INJECTOR_LOG)");
            logging.set_levels(LogLevel::Info, &changes(&["error"]));
            tracing::debug!(target: target::SESSION, "one");
            logging.reset_levels(LogLevel::Warn);
            tracing::debug!(target: target::SESSION, "two");
        });
        assert!(!text.contains("one") && text.contains("two"), "{text}");
    }

    #[test]
    fn a_mistake_in_a_level_names_what_is_possible() {
        for (text, message) in [
            ("loud", "\"loud\" is not a log level: use error, warn"),
            ("session=", "\"\" is not a log level"),
            ("=debug", "\"\" is not a log target: use one of access, session"),
            ("sessions=debug", "\"sessions\" is not a log target"),
        ] {
            let error = text.parse::<LevelChange>().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
