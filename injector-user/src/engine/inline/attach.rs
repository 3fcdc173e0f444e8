//! Attaches the programs to devices. They stay attached when the daemon exits, and the next daemon
//! replaces them.

use std::{fs, io, path::Path};

use aya::programs::{
    LinkOrder, SchedClassifier, TcAttachType,
    links::{FdLink, PinnedLink},
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
};
use thiserror::Error;

use super::{
    filters::{self, Filter},
    programs::{self, InlinePrograms},
    routes::{Interface, LinkKind},
};
use crate::{config::Attachment, engine::bpf::lock, telemetry::log::target};

/// What is behind a device: clients, backends or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Clients' packets arrive on it.
    Client,
    /// Packets to and from backends pass it.
    Backend,
}

impl Role {
    const fn programs(self) -> &'static [(&'static str, TcAttachType)] {
        match self {
            Self::Client => &[("client_in", TcAttachType::Ingress)],
            Self::Backend => &[("backend_in", TcAttachType::Ingress), ("backend_out", TcAttachType::Egress)],
        }
    }
}

/// Why a program could not be attached to a device.
#[derive(Debug, Error)]
#[error("{program} on {device}: {}", crate::engine::bpf::chain(&**.error))]
pub struct AttachError {
    program: &'static str,
    device: String,
    error: Box<dyn std::error::Error + Send + Sync>,
}

/// The priority of the engine's clsact filters: before most others.
const PRIORITY: u16 = 9;

/// The handle of a program's filter, far from those that the kernel chooses (1, 2, …). Of two
/// daemons that start at the same time, only one can add it.
fn handle(program: &str) -> TcHandle {
    let minor = match program {
        "client_in" => 1,
        "backend_in" => 2,
        _ => 3,
    };
    TcHandle::new(u16::from_be_bytes(*b"IN"), minor)
}

impl InlinePrograms {
    /// Attaches the programs of this role to the device. A program that is attached already, also
    /// by an earlier daemon, is replaced in place: no packet passes without it. One that is
    /// attached the other way (tcx or clsact) is removed once the new one is attached.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn attach(&self, device: &Interface, role: Role, how: Attachment) -> Result<(), AttachError> {
        let links = self.pins.join("links");
        let mut programs = lock(&self.programs);
        let tcx = match how {
            Attachment::Tcx => true,
            Attachment::Clsact => false,
            Attachment::Auto => has_tcx(),
        };
        for (name, direction) in role.programs() {
            let failed = |error: Failure| AttachError { program: name, device: device.name.clone(), error };
            let variant = match device.kind {
                LinkKind::Ethernet => (*name).to_owned(),
                LinkKind::Headerless => format!("{name}_raw"),
                LinkKind::Other(number) => {
                    let what = format!("packets of link type {number} (ARPHRD) cannot be read");
                    return Err(failed(what.into()));
                }
            };
            let program =
                programs.program_mut(&variant).ok_or_else(|| failed("not in this binary".into()))?;
            let program: &mut SchedClassifier =
                program.try_into().map_err(|error| failed(Box::new(error)))?;
            let pin = links.join(format!("{name}@{}", device.name));
            fs::create_dir_all(&links).map_err(|error| failed(Box::new(error)))?;
            let other = if tcx {
                by_link(program, &device.name, *direction, &pin).map_err(failed)?;
                remove_filters(name, device, *direction).map_err(failed)?.then_some("clsact")
            } else {
                by_filter(program, name, device, *direction).map_err(failed)?;
                remove_link(&pin).map_err(failed)?.then_some("tcx")
            };
            if let Some(other) = other {
                tracing::warn!(target: target::ENGINE_INLINE,
                    device = device.name,
                    program = name,
                    from = other,
                    "the program was attached both ways for a moment; connections open then may break"
                );
            }
        }
        Ok(())
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn by_link(
    program: &mut SchedClassifier,
    device: &str,
    direction: TcAttachType,
    pin: &Path,
) -> Result<(), Failure> {
    if let Some(link) = pinned(pin)?
        && let Ok(id) = program.attach_to_link(link)
    {
        // The pin holds it.
        std::mem::forget(program.take_link(id)?);
        return Ok(());
    }
    // There was no link, or its device is gone.
    let _ = fs::remove_file(pin);
    let options = TcAttachOptions::TcxOrder(LinkOrder::default());
    let id = program.attach_with_options(device, direction, options)?;
    let link: FdLink = program.take_link(id)?.try_into()?;
    link.pin(pin)?;
    Ok(())
}

fn pinned(pin: &Path) -> Result<Option<SchedClassifierLink>, Failure> {
    if !pin.exists() {
        return Ok(None);
    }
    let link = FdLink::from(PinnedLink::from_pin(pin)?);
    Ok(SchedClassifierLink::try_from(link).ok())
}

/// Removes the link that is pinned there; `false` if there is none.
fn remove_link(pin: &Path) -> Result<bool, Failure> {
    if !pin.exists() {
        return Ok(false);
    }
    // Only the pin holds it.
    drop(PinnedLink::from_pin(pin)?.unpin()?);
    Ok(true)
}

fn by_filter(
    program: &mut SchedClassifier,
    name: &str,
    device: &Interface,
    direction: TcAttachType,
) -> Result<(), Failure> {
    match tc::qdisc_add_clsact(&device.name) {
        Ok(()) | Err(TcError::AlreadyAttached) => {}
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let mut found = filters_of(name, device.index, direction)?.into_iter();
    let id = match found.next() {
        // The kernel replaces the program under this handle (cls_bpf_change, net/sched/cls_bpf.c:
        // list_replace_rcu). An earlier version's filter has another handle, and keeps it.
        Some(filter) => program.attach_to_link(filter.link(&device.name, direction)?)?,
        None => {
            let options = NlOptions { priority: PRIORITY, handle: handle(name), ..NlOptions::default() };
            program.attach_with_options(&device.name, direction, TcAttachOptions::Netlink(options))?
        }
    };
    // The filter stays when the daemon exits.
    std::mem::forget(program.take_link(id)?);
    for duplicate in found {
        duplicate.remove(&device.name, direction)?;
    }
    Ok(())
}

/// The filters of a program, for either kind of device.
fn filters_of(name: &str, device: u32, direction: TcAttachType) -> io::Result<Vec<Filter>> {
    let mut found = filters::list(device, direction)?;
    found.retain(|filter| filter.name.strip_suffix("_raw").unwrap_or(&filter.name) == name);
    Ok(found)
}

/// Removes the filters of a program; `false` if there are none.
fn remove_filters(name: &str, device: &Interface, direction: TcAttachType) -> Result<bool, Failure> {
    let found = filters_of(name, device.index, direction)?;
    for filter in &found {
        filter.remove(&device.name, direction)?;
    }
    Ok(!found.is_empty())
}

/// Whether the kernel has tcx: queried on `lo`, which every host has.
#[must_use]
pub fn has_tcx() -> bool {
    SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok()
}

/// What was removed, and what could not be.
#[derive(Debug, Default)]
struct Removal {
    removed: Vec<String>,
    failures: Vec<String>,
}

/// Why something that the engine left was not removed.
#[derive(Debug, Error)]
#[error("not removed: {}; removed: {}", failures.join("; "), list_or_nothing(removed))]
pub struct DetachError {
    removed: Vec<String>,
    failures: Vec<String>,
}

fn list_or_nothing(names: &[String]) -> String {
    if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
}

impl Removal {
    fn note<E: std::error::Error>(&mut self, what: String, outcome: Result<(), E>) {
        match outcome {
            Ok(()) => self.removed.push(what),
            Err(error) => self.failures.push(format!("{what}: {}", crate::engine::bpf::chain(&error))),
        }
    }

    fn finish(mut self) -> Result<Vec<String>, DetachError> {
        self.removed.sort();
        let Self { removed, failures } = self;
        if failures.is_empty() { Ok(removed) } else { Err(DetachError { removed, failures }) }
    }
}

/// Removes everything of the engine under `pin` and on the devices, of any version: links and
/// filters, with them the programs, and maps. Connections through the engine break.
///
/// # Errors
/// What could not be removed; everything else is.
pub fn detach(pin: &Path) -> Result<Vec<String>, DetachError> {
    let mut removal = Removal::default();
    detach_filters(&mut removal);
    remove_versions(&mut removal, pin, |_| true);
    removal.finish()
}

/// Removes what a daemon of another version left under `pin`. Its programs do not use this
/// version's maps, and would add a header of their own. Connections through them break.
///
/// # Errors
/// What could not be removed; everything else is.
pub(super) fn remove_other_versions(pin: &Path) -> Result<Vec<String>, DetachError> {
    let mut removal = Removal::default();
    remove_versions(&mut removal, pin, |version| version != programs::VERSION);
    removal.finish()
}

fn remove_versions(removal: &mut Removal, pin: &Path, which: impl Fn(&str) -> bool) {
    let versions = match entries(pin) {
        Ok(versions) => versions,
        Err(error) => return removal.note(pin.display().to_string(), Err(error)),
    };
    for version in versions {
        let named = version.file_name().into_string();
        let ours = |name: &String| name.strip_prefix('v').is_some_and(|number| number.parse::<u32>().is_ok());
        let Some(name) = named.ok().filter(ours) else { continue };
        if which(&name)
            && let Err(error) = remove_version(removal, &version.path())
        {
            removal.note(version.path().display().to_string(), Err(error));
        }
    }
}

fn remove_version(removal: &mut Removal, version: &Path) -> io::Result<()> {
    for folder in ["links", "maps"] {
        let folder = version.join(folder);
        for entry in entries(&folder)? {
            let link = if folder.ends_with("links") { PinnedLink::from_pin(entry.path()).ok() } else { None };
            let removed = match link {
                Some(link) => link.unpin().map(drop),
                None => fs::remove_file(entry.path()),
            };
            removal.note(entry.file_name().to_string_lossy().into_owned(), removed);
        }
        remove_dir(&folder)?;
    }
    remove_dir(version)
}

/// The entries of a folder; none if it does not exist.
fn entries(folder: &Path) -> io::Result<Vec<fs::DirEntry>> {
    match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.collect(),
    }
}

/// Removes an empty folder, if it exists.
fn remove_dir(folder: &Path) -> io::Result<()> {
    match fs::remove_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Removes the clsact filters on all devices; they have no pins.
fn detach_filters(removal: &mut Removal) {
    let devices = match filters::devices() {
        Ok(devices) => devices,
        Err(error) => return removal.note("filters of all devices".to_owned(), Err(error)),
    };
    for (index, device) in devices {
        for (name, direction) in [Role::Client, Role::Backend].iter().flat_map(|role| role.programs()) {
            match filters_of(name, index, *direction) {
                Ok(found) => {
                    for filter in found {
                        let removed = filter.remove(&device, *direction);
                        removal.note(format!("{}@{device}", filter.name), removed);
                    }
                }
                Err(error) => removal.note(format!("{name}@{device}"), Err(error)),
            }
        }
    }
}
