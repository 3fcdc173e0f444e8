//! The loaded programs: loading them, and giving them listeners, backends and headers.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, Weak},
    time::Instant,
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions},
};
use injector_common::inline::{self, Counter, PortRange, Template, Usage};
use thiserror::Error;

use super::{
    counts::{self, ListenerCounts},
    maps::{self, Maps},
    places::Places,
    plan::{Plan, Planner, Service},
    service::{self, TowardsBackend},
};
use crate::{
    config::{Inline as Settings, Listener, Network, ProxyVersion, Receiver},
    engine::{
        bpf::{self, lock, reports},
        check::ProgramReport,
        guard::maps::SHARED,
        served_listener::ServedListener,
    },
    header::EncodedHeader,
    os::sysctl,
    telemetry::{log::target, metrics::BpfCounters},
};

/// For devices with Ethernet, and for those without a link-layer header.
const PROGRAMS: [&str; 2] = ["inline", "inline_raw"];

/// Starts the kernel's own sweep of connections. It is not attached to a device.
const START_SWEEP: &str = "start_sweep";

/// The loaded programs with their maps. Dropping it changes nothing in the kernel.
pub struct InlinePrograms {
    pub(super) maps: Arc<Maps>,
    pub(super) programs: Mutex<Ebpf>,
    pub(super) listeners: Mutex<Listeners>,
}

/// What the maps of listeners contain.
pub(super) struct Listeners {
    pub(super) places: Places,
    /// Those that the server counts sessions of, by name.
    pub(super) counted: BTreeMap<String, Weak<ListenerCounts>>,
    planner: Planner,
    /// What was written last.
    written: Option<Plan>,
    /// What was reported last, so that it is reported once.
    shortages: Vec<(String, &'static str)>,
}

/// Why the engine cannot be loaded, or does not serve a listener.
#[derive(Debug, Error)]
pub enum LoadError {
    /// Programs or maps cannot be loaded.
    #[error(transparent)]
    Bpf(#[from] bpf::LoadError),
    /// A setting of this host does not allow it.
    #[error("{0}")]
    Host(String),
}

impl InlinePrograms {
    /// Loads the programs, with the maps that are pinned in this folder if there are any, and
    /// starts the sweep. The listeners of an earlier daemon stay until the first
    /// `InlinePrograms::serve`. The guard's maps are pinned in `bans`.
    ///
    /// # Errors
    /// [`LoadError`]: typically missing CAP_BPF or CAP_NET_ADMIN.
    pub fn load(settings: &Settings, pins: &Path, bans: Option<&Path>) -> Result<Self, LoadError> {
        let mut loader = EbpfLoader::new();
        let slots = settings.flows.saturating_add(1);
        loader
            .map_max_entries("FLOWS", slots.saturating_mul(2))
            .map_max_entries("CONNECTIONS", slots)
            .map_max_entries("FREE_SLOTS", slots)
            .map_max_entries("SOURCE_COUNTS", slots)
            .map_max_entries("SOURCE_SESSIONS", slots);
        for map in maps::PINNED {
            loader.map_pin_path(map, pins.join(map));
        }
        if let Some(bans) = bans {
            for map in SHARED {
                loader.map_pin_path(map, bans.join(map));
            }
        }
        let (programs, maps) = load_programs(&mut loader)?;
        if maps.slots() != slots {
            let flows = maps.slots().saturating_sub(1);
            tracing::warn!(target: target::ENGINE_INLINE, flows, configured = settings.flows, "the maps of an earlier daemon stay in use, with room for another number of connections; inline.flows takes effect after `injector inline detach`, which ends inline connections");
        }
        // Those that an earlier daemon learned from Services stay until the API names them again.
        maps.set_peers(&settings.peers.listed, settings.peers.services.is_empty())?;
        let listeners = Listeners {
            places: Places::new(maps.places()),
            counted: BTreeMap::new(),
            planner: Planner::new(&maps.in_use()),
            written: None,
            shortages: Vec::new(),
        };
        let inline =
            Self { maps: Arc::new(maps), programs: Mutex::new(programs), listeners: Mutex::new(listeners) };
        inline.update_settings()?;
        counts::clear_sessions(&inline.maps);
        start_sweep(&lock(&inline.programs))?;
        Ok(inline)
    }

    /// Reads the settings of this host again.
    ///
    /// # Errors
    /// [`LoadError::Host`] if too few ports are left to the engine; then the former settings stay.
    pub(super) fn update_settings(&self) -> Result<(), LoadError> {
        let slots = self.maps.slots();
        let settings = inline::Settings { ports: ports()?, max_pending: (slots / 4).max(1), slots };
        Ok(self.maps.set_settings(&settings)?)
    }

    /// Has these networks reach PROXY ports through this host. Others too, unless these are `complete`.
    ///
    /// # Errors
    /// When the map does not take them.
    pub(super) fn set_peers(&self, networks: &[Network], complete: bool) -> Result<(), LoadError> {
        Ok(self.maps.set_peers(networks, complete)?)
    }

    /// Gives the programs these listeners, with their backends. Established connections continue
    /// where they are. Writes nothing if nothing has changed.
    ///
    /// # Errors
    /// When a map does not take it: then some listeners are as before.
    pub(super) fn serve(
        &self,
        served: &[ServedListener],
        towards: &impl Fn(SocketAddr) -> TowardsBackend,
    ) -> Result<(), LoadError> {
        let mut listeners = lock(&self.listeners);
        let now = Instant::now();
        let mut services = Vec::new();
        let mut shortages = Vec::new();
        for served in served {
            let name = &served.listener.name;
            let mut shortage = |what| {
                if !served.draining {
                    shortages.push((name.clone(), what));
                }
                services.push(service::protected(served));
            };
            let templates = match templates(&served.listener) {
                Ok(templates) => templates,
                Err(_) => {
                    shortage("its header cannot be sent by inline; its connections go to the sockets");
                    continue;
                }
            };
            match listeners.places.with_templates(name, &templates) {
                Some((id, new)) => {
                    if new {
                        self.maps.set_templates(id, &templates)?;
                        self.maps.set_name(id, name);
                    }
                    services.push(service::service(id, served, towards));
                }
                None => shortage("no free place; its connections go to the sockets until one is free"),
            }
        }
        // Limits are in place before the first connection.
        counts::sync(&self.maps, &listeners.places, &listeners.counted);
        let plan = self.write(&mut listeners, &services, now)?;
        let name = |id: u32| listeners.places.name(id).unwrap_or_default().to_owned();
        shortages.extend(plan.iter().flat_map(|plan| &plan.shortages).map(|(id, what)| (name(*id), *what)));
        for (listener, what) in shortages.iter().filter(|shortage| !listeners.shortages.contains(shortage)) {
            tracing::error!(target: target::ENGINE_INLINE, listener, "inline does not take connections of this listener: {what}");
        }
        if let Some(plan) = plan {
            listeners.written = Some(plan);
        }
        listeners.shortages = shortages;
        Ok(())
    }

    /// Writes what has changed; `None` if nothing has.
    fn write(
        &self,
        listeners: &mut Listeners,
        services: &[Service],
        now: Instant,
    ) -> Result<Option<Plan>, LoadError> {
        let plan = listeners.planner.plan(services, now);
        if listeners.written.as_ref().is_some_and(|written| !plan.differs(written)) {
            return Ok(None);
        }
        if let Err(error) = self.maps.write(&plan) {
            // What was written is not known: start over with what the maps contain.
            (listeners.planner, listeners.written) = (Planner::new(&self.maps.in_use()), None);
            return Err(error.into());
        }
        Ok(Some(plan))
    }

    /// Frees the places of listeners that are gone, once their connections are.
    pub(super) fn release_places(&self, served: &[ServedListener]) {
        let mut listeners = lock(&self.listeners);
        listeners.counted.retain(|_, usage| usage.strong_count() > 0);
        let Listeners { places, counted, .. } = &mut *listeners;
        let live = |id| {
            let Usage { pending, established, .. } = self.maps.usage(id);
            pending != 0 || established != 0
        };
        let held = |name: &str| {
            counted.contains_key(name) || served.iter().any(|served| served.listener.name == name)
        };
        for id in places.release(live, held, Instant::now()) {
            self.maps.set_name(id, "");
        }
        counts::sync(&self.maps, &listeners.places, &listeners.counted);
    }

    /// How many connections the maps have room for.
    #[must_use]
    pub fn max_flows(&self) -> u32 {
        self.maps.slots().saturating_sub(1)
    }

    /// The loaded programs and what they cost the verifier.
    #[must_use]
    pub fn programs(&self) -> Vec<ProgramReport> {
        reports(&lock(&self.programs))
    }
}

pub(super) fn load_programs(loader: &mut EbpfLoader<'_>) -> Result<(Ebpf, Maps), bpf::LoadError> {
    let mut programs = loader.load(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/inline")))?;
    let maps = Maps::take(&mut programs)?;
    for name in PROGRAMS.into_iter().chain([START_SWEEP]) {
        let program: &mut SchedClassifier = bpf::program(&mut programs, name)?;
        program.load().map_err(|error| bpf::LoadError::Program { program: name, error })?;
    }
    Ok((programs, maps))
}

/// Starts the sweep, which then runs in the kernel on its own. It does no harm if it runs already.
pub(super) fn start_sweep(programs: &Ebpf) -> Result<(), bpf::LoadError> {
    let run = || -> Result<(), ProgramError> {
        let program: &SchedClassifier =
            programs.program(START_SWEEP).ok_or(ProgramError::NotLoaded)?.try_into()?;
        // The shortest packet that the kernel takes: an Ethernet header.
        let packet = [0; 14];
        let options = TestRunOptions { data_in: Some(&packet), ..TestRunOptions::default() };
        program.test_run(options).map(drop)
    };
    run().map_err(|error| bpf::LoadError::Program { program: START_SWEEP, error })
}

/// The ports that the engine may use towards backends.
fn ports() -> Result<PortRange, LoadError> {
    const KEY: &str = "net/ipv4/ip_local_port_range";
    let text = sysctl::read(KEY).map_err(|error| LoadError::Host(format!("/proc/sys/{KEY}: {error}")))?;
    parse_ports(&text).ok_or_else(|| {
        let range = text.split_whitespace().collect::<Vec<_>>().join(" ");
        LoadError::Host(format!(
            "net.ipv4.ip_local_port_range = {range}: engine \"inline\" uses ports from 1024 on that are not in \
             this range, and needs 1024 of them; set it to \"32768 60999\", for example"
        ))
    })
}

fn parse_ports(text: &str) -> Option<PortRange> {
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(first)), Some(Ok(last))) => PortRange::new(first, last),
        _ => None,
    }
}

/// The headers of a listener, for IPv4 and IPv6.
///
/// # Errors
/// Why this engine cannot send them.
pub(super) fn templates(listener: &Listener) -> Result<[Template; 2], String> {
    let of = |ipv6| template(&listener.receiver, ipv6, listener.waits_for_first_bytes());
    Ok([of(false)?, of(true)?])
}

/// A listener's header for one family, padded to the alignment that the checksum needs.
pub(super) fn template(receiver: &Receiver, ipv6: bool, waits: bool) -> Result<Template, String> {
    for (asked, what) in [
        (receiver.version == ProxyVersion::V1, "version = \"v1\""),
        (receiver.crc32c, "crc32c"),
        (receiver.unique_id, "unique_id"),
    ] {
        if asked {
            return Err(format!(
                "receiver.{what} needs to be made for each connection, which engine \"inline\" cannot: \
                 use splice or relay"
            ));
        }
    }
    let any: (SocketAddr, SocketAddr) = if ipv6 {
        (SocketAddr::from(([0_u16; 8], 1)), SocketAddr::from(([0_u16; 8], 1)))
    } else {
        (SocketAddr::from(([0; 4], 1)), SocketAddr::from(([0; 4], 1)))
    };
    let render = |receiver: &Receiver| {
        EncodedHeader::new(receiver, any.0, any.1, &[0; crate::config::UNIQUE_ID_LEN])
            .map_err(|error| error.to_string())
    };
    let mut rendered = render(receiver)?;
    let odd = rendered.as_bytes().len() % 4;
    if odd != 0 {
        let mut padded = receiver.clone();
        // A TLV has three bytes before its value, and the value must not be empty.
        let noop = u16::try_from(4 - odd).unwrap_or(4) + 1;
        padded.noop = Some(receiver.noop.map_or(noop, |own| own + noop - 1));
        rendered = render(&padded)?;
    }
    Template::new(rendered.as_bytes(), ipv6, waits).ok_or_else(|| {
        format!(
            "a header of {} bytes is too long for engine \"inline\", which takes up to {}",
            rendered.as_bytes().len(),
            injector_common::inline::HEADER_CAPACITY
        )
    })
}

impl fmt::Debug for InlinePrograms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InlinePrograms").field("slots", &self.maps.slots()).finish_non_exhaustive()
    }
}

impl BpfCounters for InlinePrograms {
    fn read(&self) -> Vec<(&'static str, &'static str, u64)> {
        let counted = |counter: Counter| ("inline", counter.label(), self.maps.counted(counter));
        Counter::ALL.into_iter().map(counted).collect()
    }

    fn flows(&self) -> u32 {
        self.maps.usage(Usage::ALL).slots
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn the_hosts_ports_are_read_from_proc() {
        let (first, last) = (32768, 60999);
        assert_eq!(parse_ports("32768\t60999"), PortRange::new(first, last));
        for text in ["", "32768", "a b", "1024 65535", "80 90000"] {
            assert_eq!(parse_ports(text), None, "{text}");
        }
    }

    #[test]
    fn headers_that_differ_by_connection_are_refused() {
        let listener = |receiver: &str| {
            let text = format!(
                "[[listener]]\nname = \"a\"\nbind = [\"192.0.2.10:25\"]\nprotocol = \"smtp\"\n\
                 backends = [\"10.0.0.1:2525\"]\n{receiver}\n"
            );
            Config::parse(&text, "test.toml").unwrap().listeners.remove(0)
        };
        let [ipv4, ipv6] = templates(&listener("")).unwrap();
        assert_eq!((ipv4.len, ipv6.len), (28, 52));
        assert!(templates(&listener("[listener.receiver]\ncrc32c = true")).unwrap_err().contains("crc32c"));
    }
}
