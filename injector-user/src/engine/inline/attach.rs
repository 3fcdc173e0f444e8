//! Keeps the program attached to the devices. It stays attached when the daemon exits, and the next
//! daemon replaces it.
//!
//! Where the program is missing, packets go to the host's own sockets: splice or relay serves new
//! connections, and inline's own break.

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    path::PathBuf,
    time::{Duration, Instant},
};

use aya::programs::SchedClassifier;
use thiserror::Error;

use super::{
    attachment::{Change, Failure},
    clsact,
    device_pins::{self, namespace, pin_name},
    pins::PinPaths,
    programs::InlinePrograms,
    routes::{self, Interface, LinkKind},
    selection::Selection,
    tcx,
};
use crate::{
    config::{Attachment, Inline as Settings},
    engine::bpf::lock,
    telemetry::log::target,
};

/// Why the program could not be attached to a device, or removed from one.
#[derive(Debug, Error)]
#[error("{program} on {device}: {}", crate::engine::bpf::chain(&**.error))]
pub struct AttachError {
    program: &'static str,
    device: String,
    error: Failure,
}

/// How often the devices should be checked: another program may have detached ours, and of tcx
/// links the kernel sends no notification.
pub const CHECK_INTERVAL: Duration = Duration::from_secs(3);

/// How long a device's program is left behind another one after it was moved to the front: the
/// other one may insist, too.
const MOVE_INTERVAL: Duration = Duration::from_secs(60);

/// The devices that have the program.
#[derive(Debug)]
pub struct Attached {
    links: PathBuf,
    /// The inode of the network namespace: indices of devices are its own.
    namespace: u64,
    attachment: Attachment,
    selection: Selection,
    devices: BTreeMap<u32, Device>,
    /// Programs of other daemons' maps, which stay as they are.
    others: HashSet<u32>,
    unusable: Vec<(String, String)>,
    reported: Vec<String>,
}

/// A device that has the program.
#[derive(Debug, Default)]
struct Device {
    name: String,
    attached: bool,
    moved: Option<Instant>,
    behind: bool,
    error: Option<String>,
}

impl InlinePrograms {
    /// Attaches the program to the ingress of the device, in front of all others. A program that is
    /// attached already, also by an earlier daemon, is replaced in place: no packet passes without
    /// it. One that is attached the other way (tcx or clsact) is removed once the new one is
    /// attached.
    fn attach(
        &self,
        device: &Interface,
        attached: &Attached,
        tcx: bool,
        may_move: bool,
    ) -> Result<Change, Failure> {
        let mut programs = lock(&self.programs);
        let program = programs.program_mut(program(device.kind)?).ok_or("not in this binary")?;
        let program: &mut SchedClassifier = program.try_into()?;
        let (pin, others) = (attached.pin(device.index), &attached.others);
        let device = (device.index, device.name.as_str());
        if !tcx {
            // The link that is pinned there goes with its pin.
            return clsact::ensure(program, device, &pin, others, may_move);
        }
        let change = tcx::ensure(program, device, &pin, may_move)?;
        clsact::remove(device.0, device.1, others)?;
        Ok(change)
    }
}

/// The program for a kind of device.
fn program(kind: LinkKind) -> Result<&'static str, Failure> {
    match kind {
        LinkKind::Ethernet => Ok("inline"),
        LinkKind::Headerless => Ok("inline_raw"),
        LinkKind::Other(number) => {
            Err(format!("packets of link type {number} (ARPHRD) cannot be read").into())
        }
    }
}

impl Attached {
    /// None yet. `others` are programs of earlier daemons with other maps, by their ids: they are
    /// left alone.
    ///
    /// # Errors
    /// When the network namespace cannot be identified.
    pub fn new(settings: &Settings, pins: &PinPaths, others: HashSet<u32>) -> io::Result<Self> {
        Ok(Self {
            links: pins.links.clone(),
            namespace: namespace()?,
            attachment: settings.attachment,
            selection: Selection::new(settings.devices.clone()),
            devices: BTreeMap::new(),
            others,
            unusable: Vec::new(),
            reported: Vec::new(),
        })
    }

    /// Attaches the program to the devices that need it, in front of other programs, and removes it
    /// from others: those that are gone, have become a bridge's port or are not configured any
    /// more. To be called after each change of devices, and every [`CHECK_INTERVAL`]. Logs what it
    /// changes.
    ///
    /// # Errors
    /// The devices that could not be served, each time; they are logged when the error is new. All
    /// others are served.
    pub fn update(&mut self, programs: &InlinePrograms) -> Result<(), Vec<AttachError>> {
        let failed = |program, device: &str, error| AttachError { program, device: device.to_owned(), error };
        let interfaces = match routes::interfaces() {
            Ok(interfaces) => interfaces,
            Err(error) => {
                let errors = vec![failed("inline", "all devices", error.into())];
                self.report(&errors);
                return Err(errors);
            }
        };
        let points = self.selection.points(&interfaces);
        self.warn_of_unusable(points.unusable);
        let tcx = match self.attachment {
            Attachment::Tcx => true,
            Attachment::Clsact => false,
            Attachment::Auto => interfaces.first().is_none_or(|any| tcx::is_supported(any.index)),
        };
        let (mut errors, mut failures) = (Vec::new(), Vec::new());
        for interface in &points.attach {
            if let Err(error) = self.ensure(programs, interface, tcx) {
                errors.push(failed(program(interface.kind).unwrap_or("inline"), &interface.name, error));
            }
        }
        let name = |index: u32| {
            let found = interfaces.iter().find(|interface| interface.index == index);
            found.map(|interface| interface.name.clone())
        };
        for index in self.pinned().into_iter().filter(|index| !points.keep.contains(index)) {
            if let Err(error) = self.remove(index, name(index).as_deref()) {
                failures.push(failed("inline", &name(index).unwrap_or_default(), error));
            }
        }
        self.report(&failures);
        errors.extend(failures);
        self.devices.retain(|index, _| points.keep.contains(index));
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    fn ensure(&mut self, programs: &InlinePrograms, interface: &Interface, tcx: bool) -> Result<(), Failure> {
        // An administrator may have removed the pins.
        fs::create_dir_all(&self.links)?;
        let device = self.devices.entry(interface.index).or_default();
        device.name.clone_from(&interface.name);
        let may_move = device.moved.is_none_or(|moved| moved.elapsed() > MOVE_INTERVAL);
        let result = if self.links.is_dir() {
            programs.attach(interface, self, tcx, may_move)
        } else {
            Err(format!(
                "{} was removed: inline stays detached until the daemon is restarted",
                self.links.display()
            )
            .into())
        };
        let device = self.devices.entry(interface.index).or_default();
        match result {
            Ok(change) => {
                device.note(change, tcx);
                Ok(())
            }
            // The kernel sends a notification.
            Err(_) if is_gone(interface.index) => Ok(()),
            Err(error) => {
                let text = crate::engine::bpf::chain(&*error);
                if device.error.as_ref() != Some(&text) {
                    tracing::error!(target: target::ENGINE_INLINE,
                        device = device.name,
                        error = text,
                        "the program could not be attached; packets of this device go to the host's own sockets, and inline connections through it break"
                    );
                }
                device.error = Some(text);
                Err(error)
            }
        }
    }

    /// Logs errors that are not a device's own, when they are new.
    fn report(&mut self, errors: &[AttachError]) {
        let text: Vec<_> = errors.iter().map(ToString::to_string).collect();
        if !text.is_empty() && self.reported != text {
            let error = text.join("; ");
            tracing::error!(target: target::ENGINE_INLINE, error, "the devices cannot be followed; it is tried again every few seconds");
        }
        self.reported = text;
    }

    fn remove(&mut self, index: u32, name: Option<&str>) -> Result<(), Failure> {
        let mut removed = device_pins::remove(&self.pin(index))?;
        if let Some(name) = name {
            removed |= clsact::remove(index, name, &self.others)?;
        }
        if removed {
            let device = name.unwrap_or("(gone)");
            tracing::info!(target: target::ENGINE_INLINE, device, index, "program removed: the device is gone, belongs to a bridge, or is not in inline.devices");
        }
        Ok(())
    }

    /// The devices of this network namespace that have a pin.
    fn pinned(&self) -> Vec<u32> {
        let own = format!("{}-", self.namespace);
        let Ok(pins) = fs::read_dir(&self.links) else { return Vec::new() };
        let index = |entry: io::Result<fs::DirEntry>| {
            entry.ok()?.file_name().to_str()?.strip_prefix(&own)?.parse().ok()
        };
        pins.filter_map(index).collect()
    }

    fn pin(&self, device: u32) -> PathBuf {
        self.links.join(pin_name(self.namespace, device))
    }

    fn warn_of_unusable(&mut self, unusable: Vec<(String, String)>) {
        for (device, reason) in &unusable {
            if !self.unusable.iter().any(|(known, _)| known == device) {
                tracing::warn!(target: target::ENGINE_INLINE, device, reason, "a device of inline.devices cannot be used; connections through it are served without inline");
            }
        }
        self.unusable = unusable;
    }
}

impl Device {
    fn note(&mut self, change: Change, tcx: bool) {
        let (device, way) = (self.name.as_str(), if tcx { "tcx" } else { "clsact" });
        match change {
            Change::Attached if self.attached => {
                tracing::warn!(target: target::ENGINE_INLINE, device, way, "another program had detached inline from the device; it is attached again, and connections through it may have broken");
            }
            Change::Moved => {
                tracing::warn!(target: target::ENGINE_INLINE, device, way, "another program ran before inline and could have taken its packets; inline runs before it again");
            }
            Change::Attached | Change::Replaced => {
                tracing::info!(target: target::ENGINE_INLINE, device, way, "program attached");
            }
            Change::Behind if !self.behind => {
                tracing::warn!(target: target::ENGINE_INLINE, device, way, "another program runs before inline on this device; packets that it accepts or drops never reach inline, and inline connections through it break. Give that program a lower precedence");
            }
            Change::None | Change::Behind => {}
        }
        if change == Change::Moved {
            self.moved = Some(Instant::now());
        }
        self.behind = change == Change::Behind;
        (self.attached, self.error) = (true, None);
    }
}

fn is_gone(device: u32) -> bool {
    routes::interfaces().is_ok_and(|all| !all.iter().any(|interface| interface.index == device))
}
