//! Keeps programs at the ingress of devices: those of engine inline, and those of the guard. They stay
//! attached when the daemon exits, and the next daemon replaces them.

mod attachment;
mod clsact;
pub(in crate::engine) mod device_pins;
pub(in crate::engine) mod filters;
pub(in crate::engine) mod lock;
pub(in crate::engine) mod netlink;
pub mod routes;
mod selection;
mod tcx;

pub(in crate::engine) use self::clsact::remove as remove_filters;

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    path::PathBuf,
    time::{Duration, Instant},
};

use aya::{Ebpf, programs::SchedClassifier};
use thiserror::Error;

use self::{
    attachment::{Change, Failure},
    device_pins::{namespace, pin_name},
    routes::{Interface, LinkKind},
    selection::Selection,
};
use crate::config::Attachment;

/// Programs that are attached alike.
#[derive(Debug)]
pub struct ProgramSet {
    /// Their names: for devices with Ethernet, and for those without a link-layer header.
    pub programs: [&'static str; 2],
    /// Where they run among other programs.
    pub position: Position,
    /// The upper half of the handles of their filters, far from those that the kernel chooses.
    pub handle: u16,
    /// Logs what was changed, or what failed.
    pub log: fn(&Notice<'_>),
}

/// Where programs run among the others of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// Before all others, and again once another one comes before them.
    First,
    /// Behind the first one, wherever others come and go.
    AfterFirst,
}

/// What happened to the programs of a device.
#[derive(Debug)]
pub enum Notice<'a> {
    /// The program runs there from now on: attached by tcx, or as a filter of clsact.
    Attached {
        /// The device.
        device: &'a str,
        /// How.
        way: &'static str,
    },
    /// Another program had detached it, and it runs there again.
    Reattached {
        /// The device.
        device: &'a str,
        /// How.
        way: &'static str,
    },
    /// Another program ran before it, and does no longer.
    Moved {
        /// The device.
        device: &'a str,
        /// How.
        way: &'static str,
    },
    /// Another program runs before it.
    Behind {
        /// The device.
        device: &'a str,
        /// How.
        way: &'static str,
    },
    /// It cannot be attached.
    Failed {
        /// The device.
        device: &'a str,
        /// Why.
        error: &'a str,
    },
    /// The devices cannot be listed, or programs cannot be removed from them.
    CannotFollow {
        /// Why.
        error: &'a str,
    },
    /// It was removed: the device is gone, belongs to a bridge, or is not configured.
    Removed {
        /// The device.
        device: &'a str,
        /// Its index.
        index: u32,
    },
    /// A configured device cannot be used.
    Unusable {
        /// The device.
        device: &'a str,
        /// Why.
        reason: &'a str,
    },
}

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

/// The devices that have a program of the set.
#[derive(Debug)]
pub struct Attached {
    set: &'static ProgramSet,
    links: PathBuf,
    /// The inode of the network namespace: indices of devices are its own.
    namespace: u64,
    attachment: Attachment,
    selection: Selection,
    devices: BTreeMap<u32, Device>,
    selected: Vec<Interface>,
    /// Programs of other daemons' maps, which stay as they are.
    others: HashSet<u32>,
    unusable: Vec<(String, String)>,
    reported: Vec<String>,
}

/// A device that has the program.
#[derive(Debug, Default)]
struct Device {
    name: String,
    /// How the program was attached last.
    way: Option<&'static str>,
    moved: Option<Instant>,
    behind: bool,
    error: Option<String>,
}

impl ProgramSet {
    /// The program for a kind of device.
    fn program(&self, kind: LinkKind) -> Result<&'static str, Failure> {
        let [ethernet, headerless] = self.programs;
        match kind {
            LinkKind::Ethernet => Ok(ethernet),
            LinkKind::Headerless => Ok(headerless),
            LinkKind::Other(number) => {
                Err(format!("packets of link type {number} (ARPHRD) cannot be read").into())
            }
        }
    }
}

impl Attached {
    /// None yet. Pins are in `links`. `others` are programs of earlier daemons with other maps, by their ids: they are
    /// left alone.
    ///
    /// # Errors
    /// When the network namespace cannot be identified.
    pub fn new(
        set: &'static ProgramSet,
        (attachment, devices): (Attachment, &[String]),
        links: PathBuf,
        others: HashSet<u32>,
    ) -> io::Result<Self> {
        Ok(Self {
            set,
            links,
            namespace: namespace()?,
            attachment,
            selection: Selection::new(devices.to_vec()),
            devices: BTreeMap::new(),
            selected: Vec::new(),
            others,
            unusable: Vec::new(),
            reported: Vec::new(),
        })
    }

    /// Attaches the program to the devices that need it, at its position, and removes it from others: those that are gone, have become a bridge's port or are not configured any
    /// more. To be called after each change of devices, and every [`CHECK_INTERVAL`]. Logs what it
    /// changes.
    ///
    /// # Errors
    /// The devices that could not be served, each time; they are logged when the error is new. All
    /// others are served.
    pub fn update(&mut self, programs: &mut Ebpf) -> Result<(), Vec<AttachError>> {
        let failed = |program, device: &str, error| AttachError { program, device: device.to_owned(), error };
        let interfaces = match routes::interfaces() {
            Ok(interfaces) => interfaces,
            Err(error) => {
                let errors = vec![failed(self.set.programs[0], "all devices", error.into())];
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
                let program = self.set.program(interface.kind).unwrap_or(self.set.programs[0]);
                errors.push(failed(program, &interface.name, error));
            }
        }
        let name = |index: u32| {
            let found = interfaces.iter().find(|interface| interface.index == index);
            found.map(|interface| interface.name.clone())
        };
        for index in self.pinned().into_iter().filter(|index| !points.keep.contains(index)) {
            if let Err(error) = self.remove(index, name(index).as_deref()) {
                failures.push(failed(self.set.programs[0], &name(index).unwrap_or_default(), error));
            }
        }
        self.report(&failures);
        errors.extend(failures);
        self.devices.retain(|index, _| points.keep.contains(index));
        self.selected = points.attach;
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    /// The devices that are to have the program, as of the last update.
    pub(in crate::engine) fn selected(&self) -> &[Interface] {
        &self.selected
    }

    /// How the program is attached to a device, or why it is not, as of the last update.
    pub(in crate::engine) fn state(&self, device: u32) -> Result<&'static str, String> {
        let known = self.devices.get(&device);
        match known.map(|device| (device.way, device.error.clone())) {
            Some((_, Some(error))) => Err(error),
            Some((Some(way), None)) => Ok(way),
            _ => Err("not attached yet".to_owned()),
        }
    }

    /// The configured devices that cannot be used, and why, as of the last update.
    pub(in crate::engine) fn unusable(&self) -> &[(String, String)] {
        &self.unusable
    }

    fn ensure(&mut self, programs: &mut Ebpf, interface: &Interface, tcx: bool) -> Result<(), Failure> {
        // An administrator may have removed the pins.
        fs::create_dir_all(&self.links)?;
        let device = self.devices.entry(interface.index).or_default();
        device.name.clone_from(&interface.name);
        let may_move = device.moved.is_none_or(|moved| moved.elapsed() > MOVE_INTERVAL);
        let result = if self.links.is_dir() {
            self.attach(programs, interface, tcx, may_move)
        } else {
            Err(format!(
                "{} was removed: it stays detached until the daemon is restarted",
                self.links.display()
            )
            .into())
        };
        let device = self.devices.entry(interface.index).or_default();
        match result {
            Ok(change) => {
                device.note(self.set.log, change, tcx);
                Ok(())
            }
            // The kernel sends a notification.
            Err(_) if is_gone(interface.index) => Ok(()),
            Err(error) => {
                let text = crate::engine::bpf::chain(&*error);
                if device.error.as_ref() != Some(&text) {
                    (self.set.log)(&Notice::Failed { device: &device.name, error: &text });
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
            (self.set.log)(&Notice::CannotFollow { error: &text.join("; ") });
        }
        self.reported = text;
    }

    /// Attaches the program to the ingress of the device, at its position. A program that is attached
    /// already, also by an earlier daemon, is replaced in place: no packet passes without it. One
    /// that is attached the other way (tcx or clsact) is removed once the new one is attached.
    fn attach(
        &self,
        programs: &mut Ebpf,
        device: &Interface,
        tcx: bool,
        may_move: bool,
    ) -> Result<Change, Failure> {
        let program = programs.program_mut(self.set.program(device.kind)?).ok_or("not in this binary")?;
        let program: &mut SchedClassifier = program.try_into()?;
        let (pin, others) = (self.pin(device.index), &self.others);
        let device = (device.index, device.name.as_str());
        if !tcx {
            // The link that is pinned there goes with its pin.
            return clsact::ensure(program, device, &pin, (self.set, others), may_move);
        }
        let change = tcx::ensure(program, device, &pin, self.set, may_move)?;
        clsact::remove(device.0, device.1, self.set, others)?;
        Ok(change)
    }

    fn remove(&mut self, index: u32, name: Option<&str>) -> Result<(), Failure> {
        let mut removed = device_pins::remove(&self.pin(index))?;
        if let Some(name) = name {
            removed |= clsact::remove(index, name, self.set, &self.others)?;
        }
        if removed {
            let device = name.unwrap_or("(gone)");
            (self.set.log)(&Notice::Removed { device, index });
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
                (self.set.log)(&Notice::Unusable { device, reason });
            }
        }
        self.unusable = unusable;
    }
}

impl Device {
    fn note(&mut self, log: fn(&Notice<'_>), change: Change, tcx: bool) {
        let (device, way) = (self.name.as_str(), if tcx { "tcx" } else { "clsact" });
        match change {
            Change::Attached if self.way.is_some() => log(&Notice::Reattached { device, way }),
            Change::Moved => log(&Notice::Moved { device, way }),
            Change::Attached | Change::Replaced => log(&Notice::Attached { device, way }),
            Change::Behind if !self.behind => log(&Notice::Behind { device, way }),
            Change::None | Change::Behind => {}
        }
        if change == Change::Moved {
            self.moved = Some(Instant::now());
        }
        self.behind = change == Change::Behind;
        (self.way, self.error) = (Some(way), None);
    }
}

fn is_gone(device: u32) -> bool {
    routes::interfaces().is_ok_and(|all| !all.iter().any(|interface| interface.index == device))
}
