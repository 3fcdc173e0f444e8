//! The configuration file: TOML in, checked types out.
//!
//! Every mistake in a file is reported at once, each with its line, the listener it belongs to and what would
//! be right. What comes out of [`Config::load`] needs no further checks. `docs/config.md` is the reference
//! for people.

mod health;
mod listener;
mod parse;
mod receiver;
mod splice;
mod summary;
#[cfg(test)]
mod tests;

use std::{
    fmt, fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

pub(crate) use self::parse::section::MOST_CONNECTIONS;
pub use self::parse::section::{DurationError, parse_duration};
use self::parse::{
    address,
    diagnostic::Problems,
    section::{Section, Zero},
};
pub use self::{
    health::{Check, CheckHeader, Ejection, Health},
    parse::diagnostic::{ConfigError, Problem},
    receiver::UNIQUE_ID_LEN,
    splice::{EnrolmentPolicy, HeaderBy, Splice, Watermarks},
    summary::summary,
};
use crate::protocol::{Protocol, Speaker};

/// A complete configuration, as small as it gets, with the names of the project's documentation.
pub const EXAMPLE: &str = r#"[metrics]
listen = "127.0.0.1:9145"

[[listener]]
name = "smtp"
bind = ["192.0.2.10:25", "[2001:db8::10]:25"]
protocol = "smtp"
engine = "auto"
backends = ["mail.internal:2525"]
"#;

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where metrics and health are served; `None`: nowhere.
    pub metrics: Option<Metrics>,
    /// Where the operator's commands are heard; `None`: nowhere.
    pub admin: Option<Admin>,
    /// Limits over all listeners.
    pub limits: Limits,
    /// How the splice engine uses the kernel.
    pub splice: Splice,
    /// How the inline engine uses the host.
    pub inline: Inline,
    /// How the daemon stops.
    pub stop: Stop,
    /// What is logged, and how.
    pub log: Log,
    /// At least one, with distinct names and addresses.
    pub listeners: Vec<Listener>,
}

/// `[metrics]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metrics {
    /// Address of `/metrics`, `/healthz` and `/readyz`.
    pub listen: SocketAddr,
}

/// `[admin]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// Absolute path of the unix socket on which `injector status` and its like are answered.
    pub socket: PathBuf,
}

/// `[limits]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at one time, over all listeners; at least 1.
    pub max_connections: usize,
    /// Threads that serve connections, 1 to [`Limits::MOST_WORKERS`]; by default one for each processor.
    pub workers: usize,
}

impl Limits {
    /// More share the work no better.
    pub const MOST_WORKERS: usize = 64;
}

impl Default for Limits {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self { max_connections: 10_000, workers: processors.min(Self::MOST_WORKERS) }
    }
}

/// `[inline]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inline {
    /// Whether the file has the table: the operator knows that this host forwards.
    pub given: bool,
    /// Who translates addresses.
    pub nat: Nat,
    /// Managed NAT: the backend sees the host's address as its peer's, so that it answers by this host.
    pub masquerade: bool,
    /// Managed NAT: the name of the nftables table.
    pub table: String,
    /// Folder in a BPF file system for what outlives the daemon.
    pub pin: PathBuf,
    /// Connections that there is room for; as many again that are being opened.
    pub flows: u32,
    /// Silence after which a connection is taken for dead and forgotten.
    pub idle: Duration,
    /// Devices that clients come by; empty: all that are up.
    pub client_devices: Vec<String>,
    /// Devices that lead to backends; empty: those that the routes name.
    pub backend_devices: Vec<String>,
    /// How programs are attached.
    pub attachment: Attachment,
    /// Switch forwarding on where it is off, in place of saying so.
    pub set_sysctls: bool,
}

impl Default for Inline {
    fn default() -> Self {
        Self {
            given: false,
            nat: Nat::default(),
            masquerade: true,
            table: "injector".to_owned(),
            pin: PathBuf::from("/sys/fs/bpf/injector"),
            flows: 65_536,
            idle: Duration::from_secs(24 * 60 * 60),
            client_devices: Vec::new(),
            backend_devices: Vec::new(),
            attachment: Attachment::default(),
            set_sysctls: false,
        }
    }
}

/// Who translates addresses for the inline engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Nat {
    /// The daemon, by a table of its own in nftables.
    #[default]
    Managed,
    /// Somebody else: kube-proxy, Docker, rules of the host.
    External,
}

impl Nat {
    const CHOICES: [(&'static str, Self); 2] = [("managed", Self::Managed), ("external", Self::External)];
}

/// How the inline engine's programs hang on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attachment {
    /// tcx where the kernel has it (Linux 6.6), clsact otherwise.
    #[default]
    Auto,
    /// By links, which are pinned.
    Tcx,
    /// By filters of the clsact qdisc.
    Clsact,
}

impl Attachment {
    const CHOICES: [(&'static str, Self); 3] =
        [("auto", Self::Auto), ("tcx", Self::Tcx), ("clsact", Self::Clsact)];
}

/// `[stop]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop {
    /// How long sessions may go on after SIGTERM; zero cuts them at once.
    pub deadline: Duration,
}

impl Default for Stop {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(30) }
    }
}

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
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// The least severe level that is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogLevel {
    /// What needs a person.
    Error,
    /// What may need a person.
    Warn,
    /// Start, stop, and one line per connection.
    #[default]
    Info,
    /// Each step of a connection, with client addresses.
    Debug,
    /// Everything.
    Trace,
}

/// Which engine moves the bytes of a listener.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum EngineChoice {
    /// The best engine whose self-test passes on this machine.
    #[default]
    Auto,
    /// Packets, by kernel NAT; refuse to start where it does not work.
    Inline,
    /// Kernel sockmap; refuse to start where it does not work.
    Splice,
    /// User space.
    Relay,
}

/// `[[listener]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Unique; `[a-z0-9_-]`, at most 63 bytes. The value of the label `listener`.
    pub name: String,
    /// At least one; no two listeners overlap. Port 0 lets the kernel choose.
    pub bind: Vec<SocketAddr>,
    /// What is spoken on it.
    pub protocol: Protocol,
    /// How its bytes are moved.
    pub engine: EngineChoice,
    /// At least one, of distinct addresses; one that is no backup has a weight above 0.
    pub backends: Vec<Backend>,
    /// How it is found out whether a backend can be sent connections.
    pub health: Health,
    /// How often backend names are resolved again.
    pub resolve_interval: Duration,
    /// Connections at one time on this listener, besides [`Limits::max_connections`].
    pub max_connections: Option<usize>,
    /// All greater than zero, save `header_wait`.
    pub timeouts: Timeouts,
    /// What the backend can read.
    pub receiver: Receiver,
}

impl Listener {
    /// Whether engine inline has the header go together with the client's first bytes: where the client speaks first, and is
    /// waited for. How long is for the backend to say, by when it sends its SYN again: a second.
    #[must_use]
    pub fn waits_for_first_bytes(&self) -> bool {
        self.protocol.speaks_first() == Speaker::Client && !self.timeouts.header_wait.is_zero()
    }
}

/// A mail server that expects the PROXY header on this port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Backend {
    /// Address or name.
    pub host: Host,
    /// Never 0.
    pub port: u16,
    /// Its share of new connections, in proportion to the sum of its kind; 0 gets none.
    pub weight: u32,
    /// Gets connections only while no other backend can.
    pub backup: bool,
}

impl Backend {
    /// The heaviest share of a backend.
    pub const MOST_WEIGHT: u32 = 1000;
}

/// An address, or a name to resolve.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// As written.
    Ip(IpAddr),
    /// A DNS name in lower case, without the final dot.
    Name(String),
}

/// `[listener.timeouts]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For all attempts to reach a backend together.
    pub connect: Duration,
    /// Without a byte in either direction.
    pub idle: Duration,
    /// How long the header waits for the client's first bytes before it goes alone; below 3 s. Zero: not at all, as
    /// where the server speaks first.
    pub header_wait: Duration,
    /// Without a byte in the remaining direction, once one side has finished.
    pub half_closed: Duration,
    /// Without an answer to what a peer was sent, or to the question whether it lives; also how long a peer may
    /// leave its window closed.
    pub user_timeout: Duration,
    /// Silence after which a peer is asked whether it lives; whole seconds, 1 to 32767.
    pub keepalive: Duration,
    /// How long sessions may go on once their listener is drained, or no longer configured.
    pub drain: Duration,
}

/// `[listener.receiver]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receiver {
    /// Version of the header.
    pub version: ProxyVersion,
    /// The largest v2 header in bytes, 52 to 536. Every header of this listener fits, whatever the address
    /// family.
    pub max_header: usize,
    /// Add a `PP2_TYPE_CRC32C`.
    pub crc32c: bool,
    /// Add a `PP2_TYPE_UNIQUE_ID` of [`UNIQUE_ID_LEN`] bytes.
    pub unique_id: bool,
    /// Add a `PP2_TYPE_AUTHORITY` with this host name.
    pub authority: Option<String>,
    /// Add a `PP2_TYPE_NOOP` whose value is this many zero bytes; at least 1.
    pub noop: Option<u16>,
    /// Further TLVs, of distinct kinds, none of them empty.
    pub custom: Vec<CustomTlv>,
}

/// Version of the PROXY protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProxyVersion {
    /// Text, without TLVs: for receivers that know no other.
    V1,
    /// Binary.
    #[default]
    V2,
}

/// A TLV whose meaning is agreed between this configuration and its backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CustomTlv {
    /// `PP2_TYPE_MIN_CUSTOM` to `PP2_TYPE_MAX_CUSTOM`: 0xE0 to 0xEF (PROXY protocol, section 2.2.7).
    pub kind: u8,
    /// At least one byte.
    pub value: Vec<u8>,
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Checks the text of a file; `file_name` only appears in messages. The error holds every problem found.
    pub fn parse(text: &str, file_name: &str) -> Result<Self, ConfigError> {
        let problems = Problems::new(text, file_name);
        let config = match toml::de::DeTable::parse(text) {
            Ok(table) => read(Section::root(&table, &problems)),
            Err(error) => {
                problems.add(error.span().map_or(0, |span| span.start), None, error.message().to_owned());
                None
            }
        };
        match (config, problems.into_error()) {
            (Some(config), None) => Ok(config),
            (_, Some(error)) => Err(error),
            (None, None) => Err(ConfigError::Incomplete { file: file_name.to_owned() }),
        }
    }
}

fn read(root: Section<'_>) -> Option<Config> {
    let metrics = root.section("metrics").and_then(|section| {
        let listen = section.required("listen", |section, field| section.string(field));
        let listen = listen.and_then(|(at, text)| address::listen(&section, at, text));
        section.finish();
        listen
    });
    let admin = root.section("admin").and_then(|section| {
        let socket = section.required("socket", |section, field| section.path(field));
        section.finish();
        Some(Admin { socket: socket? })
    });
    let mut limits = Limits::default();
    if let Some(section) = root.section("limits") {
        limits.max_connections = section.count("max_connections").unwrap_or(limits.max_connections);
        let workers = section.integer("workers", 1, Limits::MOST_WORKERS as u64);
        limits.workers = workers.and_then(|(_, given)| usize::try_from(given).ok()).unwrap_or(limits.workers);
        section.finish();
    }
    let splice = root.section("splice").map(splice::read).unwrap_or_default();
    let inline = root.section("inline").map(read_inline).unwrap_or_default();
    let mut stop = Stop::default();
    if let Some(section) = root.section("stop") {
        stop.deadline =
            section.duration("deadline", Zero::Allowed).map_or(stop.deadline, |(_, deadline)| deadline);
        section.finish();
    }
    let mut log = Log::default();
    if let Some(section) = root.section("log") {
        log.format = section.choice("format", &LogFormat::CHOICES).unwrap_or_default();
        log.level = section.choice("level", &LogLevel::CHOICES).unwrap_or_default();
        section.finish();
    }
    let listeners = listener::read_all(&root, metrics);
    root.finish();
    let metrics = metrics.map(|(_, listen)| Metrics { listen });
    Some(Config { metrics, admin, limits, splice, inline, stop, log, listeners: listeners? })
}

fn read_inline(section: Section<'_>) -> Inline {
    let mut inline = Inline { given: true, ..Inline::default() };
    inline.nat = section.choice("nat", &Nat::CHOICES).unwrap_or(inline.nat);
    inline.masquerade = section.flag("masquerade").map_or(inline.masquerade, |(_, flag)| flag);
    inline.set_sysctls = section.flag("set_sysctls").map_or(inline.set_sysctls, |(_, flag)| flag);
    inline.attachment = section.choice("attachment", &Attachment::CHOICES).unwrap_or(inline.attachment);
    if let Some((at, table)) = section.string("table") {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if (1..=63).contains(&table.len()) && table.bytes().all(fits) {
            table.clone_into(&mut inline.table);
        } else {
            section.field_problem(
                at,
                "table",
                &format!(" {table:?}: must be 1 to 63 of A-Z, a-z, 0-9, _ and -"),
            );
        }
    }
    if let Some(pin) = section.path("pin") {
        inline.pin = pin;
    }
    if let Some((_, flows)) = section.integer("flows", 16, 1 << 24) {
        inline.flows = u32::try_from(flows).unwrap_or(inline.flows);
    }
    inline.idle = section.duration("idle", Zero::Refused).map_or(inline.idle, |(_, idle)| idle);
    for (field, devices) in
        [("client_devices", &mut inline.client_devices), ("backend_devices", &mut inline.backend_devices)]
    {
        for (_, device) in section.strings(field).unwrap_or_default() {
            devices.push(device.to_owned());
        }
    }
    section.finish();
    inline
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

impl EngineChoice {
    const CHOICES: [(&'static str, Self); 4] =
        [("auto", Self::Auto), ("inline", Self::Inline), ("splice", Self::Splice), ("relay", Self::Relay)];

    /// As in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Inline => "inline",
            Self::Splice => "splice",
            Self::Relay => "relay",
        }
    }
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for ProxyVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => ip.fmt(f),
            Self::Name(name) => f.pad(name),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => SocketAddr::new(*ip, self.port).fmt(f),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}
