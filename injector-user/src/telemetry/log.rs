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

use std::{env, io};

use tracing::{Level, Subscriber};
use tracing_subscriber::{
    EnvFilter,
    fmt::{self, MakeWriter},
    util::{SubscriberInitExt, TryInitError},
};

use crate::config::{Log, LogFormat};

/// The targets of the daemon's log lines. They are part of its interface: filters and alerts name
/// them, so they stay the same wherever the code moves.
pub mod target {
    /// One line for each connection that has ended.
    pub const ACCESS: &str = "access";
    /// A session before and while it forwards.
    pub const SESSION: &str = "session";
    /// Listening sockets: bound, accepted from, drained, removed.
    pub const LISTENER: &str = "listener";
    /// Connections to backends.
    pub const BACKEND: &str = "backend";
    /// Health checks, ejection and the operator's `backend` command.
    pub const HEALTH: &str = "health";
    /// Names of backends and their addresses.
    pub const RESOLVER: &str = "resolver";
    /// Self-tests and the choice of an engine.
    pub const ENGINE: &str = "engine";
    /// The splice engine.
    pub const ENGINE_SPLICE: &str = "engine.splice";
    /// The inline engine.
    pub const ENGINE_INLINE: &str = "engine.inline";
    /// Loading and reloading the configuration.
    pub const CONFIG: &str = "config";
    /// The control socket.
    pub const CONTROL: &str = "control";
    /// The process: start, capabilities, limits, shutdown.
    pub const DAEMON: &str = "daemon";

    /// All of them.
    pub const ALL: [&str; 12] = [
        ACCESS,
        SESSION,
        LISTENER,
        BACKEND,
        HEALTH,
        RESOLVER,
        ENGINE,
        ENGINE_SPLICE,
        ENGINE_INLINE,
        CONFIG,
        CONTROL,
        DAEMON,
    ];
}

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

/// Starts logging for the process, to standard error. To be called once, before threads start.
pub fn init(log: &Log) -> Result<(), LogError> {
    let filter = filter(log, env::var(FILTER_VARIABLE).ok().as_deref())?;
    subscriber(log.format, filter, io::stderr).try_init().map_err(LogError::Taken)
}

/// The filter: `directives` if present, otherwise the configured level for the daemon's own
/// targets. Libraries log at INFO at most, because loading the BPF programs writes hundreds of
/// DEBUG lines.
fn filter(log: &Log, directives: Option<&str>) -> Result<EnvFilter, LogError> {
    let level = log.level.tracing();
    match directives {
        None | Some("") => {
            let own = target::ALL.iter().map(|target| format!("{target}={level}"));
            let all: Vec<_> = std::iter::once(level.min(Level::INFO).to_string()).chain(own).collect();
            Ok(EnvFilter::builder().parse_lossy(all.join(",")))
        }
        Some(directives) => {
            let builder = EnvFilter::builder().with_default_directive(level.into());
            builder.parse(directives).map_err(|error| LogError::Filter {
                directives: directives.to_owned(),
                reason: error.to_string(),
            })
        }
    }
}

fn subscriber<W>(format: LogFormat, filter: EnvFilter, writer: W) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    // Both formats use RFC 3339 timestamps in UTC.
    let builder = fmt::Subscriber::builder().with_env_filter(filter).with_writer(writer);
    match format {
        LogFormat::Human => Box::new(builder.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).finish()),
        LogFormat::Json => Box::new(
            builder.json().flatten_event(true).with_current_span(false).with_span_list(false).finish(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::config::LogLevel;

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

    fn written(format: LogFormat, level: LogLevel, directives: Option<&str>) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let filter = filter(&Log { format, level }, directives).unwrap();
        tracing::subscriber::with_default(subscriber(format, filter, move || writer.clone()), || {
            tracing::info!(target: target::ACCESS, listener = "smtp", bytes = 12, "connection closed");
            tracing::debug!(target: target::SESSION, "detail");
        });
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
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
        assert_eq!(lines(LogLevel::Info, Some("")), 1);
        assert_eq!(lines(LogLevel::Error, Some("debug")), 2);
        assert_eq!(lines(LogLevel::Error, Some("access=info")), 1);
        assert_eq!(lines(LogLevel::Error, Some("session=debug")), 1);
    }

    #[test]
    fn every_target_can_be_filtered_by() {
        for target in target::ALL {
            filter(&Log::default(), Some(&format!("{target}=debug"))).unwrap();
        }
    }

    #[test]
    fn libraries_are_quiet_at_debug() {
        let sink = Sink::default();
        let writer = sink.clone();
        let log = Log { format: LogFormat::Human, level: LogLevel::Debug };
        let filter = filter(&log, None).unwrap();
        let subscriber = subscriber(log.format, filter, move || writer.clone());
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!(target: "aya_obj::relocation", "relocating");
            tracing::info!(target: "aya::bpf", "loaded");
            tracing::debug!(target: target::ENGINE_SPLICE, "ours");
        });
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        assert!(!text.contains("relocating") && text.contains("loaded") && text.contains("ours"), "{text}");
    }

    #[test]
    fn an_invalid_filter_is_reported() {
        let error = filter(&Log::default(), Some("injector=loud")).unwrap_err().to_string();
        assert!(error.starts_with("INJECTOR_LOG=\"injector=loud\" is not a log filter"), "{error}");
    }
}
