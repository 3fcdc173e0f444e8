//! The loaded programs: loading them, and giving them listeners, backends and header templates.

use std::{
    fmt, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Mutex,
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions},
};
use injector_common::inline::{ClosedFlow, Counter, HeaderAddresses, Template};
use thiserror::Error;
use zerocopy::IntoBytes as _;

use super::maps::{self, Maps};
use crate::{
    config::{Host, Inline as Settings, Listener, ProxyVersion, Receiver},
    engine::{
        bpf::{self, lock, reports},
        check::ProgramReport,
    },
    header::EncodedHeader,
    telemetry::{log::target, metrics::BpfCounters},
};

/// The version of the pinned objects. Maps with another layout are in another folder.
pub(super) const VERSION: &str = "v5";

/// All programs: those for devices once for Ethernet and once for devices without a link-layer
/// header, and [`SWEEP`].
const PROGRAMS: [&str; 7] =
    ["client_in", "client_in_raw", "backend_out", "backend_out_raw", "backend_in", "backend_in_raw", SWEEP];

/// The program that removes ended flows; it is not attached to a device.
const SWEEP: &str = "sweep";

/// The loaded programs with their maps. Dropping it changes nothing in the kernel.
pub struct InlinePrograms {
    pub(super) maps: Maps,
    pub(super) pins: PathBuf,
    pub(super) programs: Mutex<Ebpf>,
}

/// Why the engine cannot be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// Objects cannot be pinned.
    #[error(
        "{path}: {error}: inline.pin must be in a BPF file system (mount -t bpf bpf /sys/fs/bpf), and writable"
    )]
    Pin {
        /// The folder.
        path: PathBuf,
        /// The kernel's error.
        error: io::Error,
    },
    /// Programs or maps cannot be loaded.
    #[error(transparent)]
    Bpf(#[from] bpf::LoadError),
    /// A listener needs what this engine does not support.
    #[error("listener {listener:?}: {what}")]
    Listener {
        /// Its name.
        listener: String,
        /// What it needs, and what to do.
        what: String,
    },
}

impl InlinePrograms {
    /// Loads the programs, with the pinned maps if there are any.
    ///
    /// # Errors
    /// [`LoadError`]: typically missing CAP_BPF or CAP_NET_ADMIN, or no BPF file system.
    pub fn load(settings: &Settings, listeners: u32) -> Result<Self, LoadError> {
        let pins = pins(settings)?;
        let maps = pins.join("maps");
        std::fs::create_dir_all(&maps).map_err(|error| LoadError::Pin { path: maps.clone(), error })?;
        let mut loader = EbpfLoader::new();
        loader
            .map_max_entries("LISTENERS", 1024)
            .map_max_entries("BACKENDS", 4096)
            .map_max_entries("TEMPLATES", listeners.max(1).saturating_mul(2).max(64))
            .map_max_entries("PENDING", settings.flows)
            .map_max_entries("FLOWS", settings.flows);
        for map in maps::PINNED {
            loader.map_pin_path(map, maps.join(map));
        }
        let (programs, maps) = load_programs(&mut loader)?;
        Ok(Self { maps, pins, programs: Mutex::new(programs) })
    }

    /// Replaces the listeners and backends that the programs serve. Established connections keep
    /// their header.
    ///
    /// # Errors
    /// When a listener asks for what this engine cannot do, or a map does not take it.
    pub fn serve(&self, listeners: &[&Listener]) -> Result<(), LoadError> {
        let mut services = maps::Services::default();
        for (id, listener) in (0..).zip(listeners) {
            let refused = |what: String| LoadError::Listener { listener: listener.name.clone(), what };
            services.listen.extend(listener.bind.iter().map(|address| (*address, id)));
            services.backends.extend(addresses(listener).map_err(refused)?);
            for ipv6 in [false, true] {
                let template = template(&listener.receiver, ipv6, listener.waits_for_first_bytes());
                services.templates.push(template.map_err(refused)?);
            }
        }
        Ok(self.maps.replace(&services)?)
    }

    /// Removes ended flows.
    pub(super) fn remove_flows(&self, ended: &[ClosedFlow]) {
        let programs = lock(&self.programs);
        for some in ended.chunks(ClosedFlow::MOST) {
            if let Err(error) = sweep(&programs, some) {
                tracing::debug!(target: target::ENGINE_INLINE, %error, "running the sweep program failed; its flows are removed from user space");
                self.maps.remove_flows(some);
            }
        }
    }

    /// The loaded programs and what they cost the verifier.
    #[must_use]
    pub fn programs(&self) -> Vec<ProgramReport> {
        reports(&lock(&self.programs))
    }
}

/// The folder for pins; an error if it is not in a BPF file system.
pub(super) fn pins(settings: &Settings) -> Result<PathBuf, LoadError> {
    let pins = settings.pin.join(VERSION);
    let failed = |error| LoadError::Pin { path: settings.pin.clone(), error };
    let there = pins.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    let found = rustix::fs::statfs(there).map_err(|error| failed(error.into()))?;
    if found.f_type == libc::BPF_FS_MAGIC {
        return Ok(pins);
    }
    Err(failed(io::Error::other(format!("{} is on another file system", there.display()))))
}

pub(super) fn load_programs(loader: &mut EbpfLoader<'_>) -> Result<(Ebpf, Maps), bpf::LoadError> {
    let mut programs = loader.load(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/inline")))?;
    let maps = Maps::take(&mut programs)?;
    for name in PROGRAMS {
        let program: &mut SchedClassifier = bpf::program(&mut programs, name)?;
        program.load().map_err(|error| bpf::LoadError::Program { program: name, error })?;
    }
    Ok((programs, maps))
}

/// Runs the program that removes ended flows, up to [`ClosedFlow::MOST`], unless others use their
/// ports by now; returns how many it removed.
pub(super) fn sweep(programs: &Ebpf, ended: &[ClosedFlow]) -> Result<u32, ProgramError> {
    let program: &SchedClassifier = programs.program(SWEEP).ok_or(ProgramError::NotLoaded)?.try_into()?;
    let mut packet = vec![0; ClosedFlow::AT];
    packet.extend(ended.as_bytes());
    let options = TestRunOptions { data_in: Some(&packet), ..TestRunOptions::default() };
    Ok(program.test_run(options)?.return_value)
}

/// The addresses of a listener's backends.
///
/// # Errors
/// If a backend has a name: the engine does not resolve names, because NAT knows only addresses.
pub fn addresses(listener: &Listener) -> Result<Vec<SocketAddr>, String> {
    let address = |backend: &crate::config::Backend| match &backend.host {
        Host::Ip(ip) => Ok(SocketAddr::new(*ip, backend.port)),
        Host::Name(name) => {
            Err(format!("engine \"inline\" needs the backend's address in place of the name {name:?}"))
        }
    };
    listener.backends.iter().map(address).collect()
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

/// The client of a flow, and the address it connected to.
pub(super) fn endpoints(addresses: &HeaderAddresses) -> Option<(SocketAddr, SocketAddr)> {
    let (client, destination) = addresses.read()?;
    Some((maps::socket_address(&client), maps::socket_address(&destination)))
}

impl fmt::Debug for InlinePrograms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InlinePrograms").field("pins", &self.pins).finish_non_exhaustive()
    }
}

impl BpfCounters for InlinePrograms {
    fn read(&self) -> Vec<(&'static str, &'static str, u64)> {
        let counted = |counter: Counter| {
            let (program, event) = counter.labels();
            (program, event, self.maps.counted(counter))
        };
        Counter::ALL.into_iter().map(counted).collect()
    }
}
