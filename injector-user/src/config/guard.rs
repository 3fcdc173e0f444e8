//! `[guard]`, and `[listener.guard]`

use std::{num::NonZeroU32, path::PathBuf};

use injector_common::guard::SourceLimits;

use super::{
    crowdsec::{self, CrowdSec},
    inline::device_names,
    network::{self, Network},
    parse::section::{MAX_CONNECTIONS, Section},
};

/// `[guard]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// Networks that are banned.
    pub deny: Vec<Network>,
    /// Files with such networks, one a line. They are followed.
    pub deny_files: Vec<PathBuf>,
    /// Networks that no ban and no limit on a source concerns.
    pub allow: Vec<Network>,
    /// Files with such networks.
    pub allow_files: Vec<PathBuf>,
    /// How many addresses and networks may be banned.
    pub max_bans: u32,
    /// Limits on each source over all listeners.
    pub per_source: PerSource,
    /// How many bits of an IPv4 address are one source.
    pub source_prefix_ipv4: u8,
    /// How many bits of an IPv6 address are one source.
    pub source_prefix_ipv6: u8,
    /// Devices on which clients are. Empty: all that are up.
    pub devices: Vec<String>,
    /// Where bans are dropped by XDP.
    pub xdp: Xdp,
    /// The file in which bans of `injector ban` survive a restart of the host.
    pub state: Option<PathBuf>,
    /// The directory in a BPF file system for the pins that outlive the daemon.
    pub pin: PathBuf,
    /// The CrowdSec LAPI whose decisions are bans too, if any.
    pub crowdsec: Option<CrowdSec>,
}

impl Default for Guard {
    fn default() -> Self {
        Self {
            deny: Vec::new(),
            deny_files: Vec::new(),
            allow: Vec::new(),
            allow_files: Vec::new(),
            max_bans: 262_144,
            per_source: PerSource::default(),
            source_prefix_ipv4: 32,
            source_prefix_ipv6: 64,
            devices: Vec::new(),
            xdp: Xdp::default(),
            state: None,
            pin: PathBuf::from("/sys/fs/bpf/injector/guard"),
            crowdsec: None,
        }
    }
}

/// Limits on each source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PerSource {
    /// Open connections.
    pub max_connections: Option<NonZeroU32>,
    /// New connections a second.
    pub max_rate: Option<NonZeroU32>,
    /// New connections that may come at once.
    pub burst: Option<NonZeroU32>,
}

impl PerSource {
    /// With fewer connections than these in all, a source may have them all by default.
    const FEW_CONNECTIONS: usize = 16;

    /// The same, with a limit on open connections: if none is set, half of `places`, so that one source
    /// cannot take them all.
    #[must_use]
    pub fn or_half_of(self, places: usize) -> Self {
        let half = u32::try_from(places / 2).ok().filter(|_| places >= Self::FEW_CONNECTIONS);
        Self { max_connections: self.max_connections.or(half.and_then(NonZeroU32::new)), ..self }
    }

    /// As the decisions take them. A burst that is not set is what a second allows.
    #[must_use]
    pub fn limits(self) -> SourceLimits {
        const SECOND_NS: u64 = 1_000_000_000;

        let connections = self.max_connections.map_or(0, NonZeroU32::get);
        let Some(rate) = self.max_rate else {
            return SourceLimits { connections, ..SourceLimits::default() };
        };
        let burst = self.burst.unwrap_or(rate).get();
        SourceLimits { connections, burst, interval_ns: SECOND_NS / u64::from(rate.get()) }
    }
}

/// Where bans are dropped by XDP, besides the ingress of devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Xdp {
    /// At drivers that have it, of physical devices.
    #[default]
    Auto,
    /// At the drivers of all devices; an error is logged where a driver has none.
    Native,
    /// In the kernel's generic path, for every device.
    Generic,
    /// Nowhere.
    Off,
}

impl Xdp {
    const CHOICES: [(&'static str, Self); 4] =
        [("auto", Self::Auto), ("native", Self::Native), ("generic", Self::Generic), ("off", Self::Off)];
}

pub(super) fn read(section: Section<'_>) -> Guard {
    let mut guard = Guard::default();
    let networks = |field| network::read(&section, field).into_iter().map(|(_, network)| network).collect();
    (guard.deny, guard.allow) = (networks("deny"), networks("allow"));
    guard.deny_files = files(&section, "deny_files");
    guard.allow_files = files(&section, "allow_files");
    guard.max_bans = number(&section, "max_bans", 1, 1 << 24).unwrap_or(guard.max_bans);
    guard.per_source = per_source(&section);
    let prefix = |field, most, default| {
        section.integer(field, 1, most).and_then(|(_, bits)| u8::try_from(bits).ok()).unwrap_or(default)
    };
    guard.source_prefix_ipv4 = prefix("source_prefix_ipv4", 32, guard.source_prefix_ipv4);
    guard.source_prefix_ipv6 = prefix("source_prefix_ipv6", 128, guard.source_prefix_ipv6);
    guard.devices = device_names(&section);
    guard.xdp = section.choice("xdp", &Xdp::CHOICES).unwrap_or_default();
    guard.state = section.path("state");
    guard.pin = section.path("pin").unwrap_or(guard.pin);
    guard.crowdsec = section.section("crowdsec").and_then(crowdsec::read);
    section.finish();
    guard
}

/// `[listener.guard]`
pub(super) fn read_listener(section: Section<'_>) -> PerSource {
    let limits = per_source(&section);
    section.finish();
    limits
}

fn per_source(section: &Section<'_>) -> PerSource {
    let most = MAX_CONNECTIONS as u64;
    let number = |field| {
        let (at, number) = section.integer(field, 1, most)?;
        Some((at, u32::try_from(number).ok().and_then(NonZeroU32::new)?))
    };
    let without_at = |number: Option<(usize, NonZeroU32)>| number.map(|(_, number)| number);
    let (max_rate, burst) = (number("max_rate_per_source"), number("burst_per_source"));
    if let (Some((at, _)), false) = (burst, section.has("max_rate_per_source")) {
        section.report_field(at, "burst_per_source", ": has no effect without max_rate_per_source");
    }
    PerSource {
        max_connections: without_at(number("max_connections_per_source")),
        max_rate: without_at(max_rate),
        burst: without_at(burst),
    }
}

fn number(section: &Section<'_>, field: &'static str, least: u64, most: u64) -> Option<u32> {
    section.integer(field, least, most).and_then(|(_, number)| u32::try_from(number).ok())
}

fn files(section: &Section<'_>, field: &'static str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for (at, text) in section.strings(field).unwrap_or_default() {
        let file = PathBuf::from(text);
        if file.is_absolute() {
            files.push(file);
        } else {
            section.report_field(at, field, &format!(" {text:?}: must be an absolute path"));
        }
    }
    files
}
