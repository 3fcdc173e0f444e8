//! The guard's program at the drivers of devices, by pinned XDP links (Linux 5.9). It drops what the program at
//! the ingress would drop, earlier; where it cannot be attached, nothing is missing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{ProgramError, Xdp as XdpProgram},
};

use super::{maps::Maps, programs};
use crate::{
    config::Xdp,
    engine::{
        attach::{
            device_pins::{self, namespace, pin_name, replace_pin},
            routes::Interface,
        },
        bpf::chain,
    },
    os::bpf::{self, XdpMode},
    telemetry::log::target,
};

/// The folders of pins: a link's mode is that of its whole life.
const FOLDERS: [(&str, XdpMode); 2] = [("xdp-native", XdpMode::Native), ("xdp-generic", XdpMode::Generic)];

/// The name of a mode, as `guard.xdp` has it.
pub(super) const fn mode_name(mode: XdpMode) -> &'static str {
    match mode {
        XdpMode::Native => "native",
        XdpMode::Generic => "generic",
    }
}

/// The buses of virtual devices. Native XDP takes their segmentation offloads away, and with them speed.
const VIRTUAL: [&str; 3] = ["virtio", "vmbus", "xen"];

/// The devices with the program at their driver.
#[derive(Debug)]
pub(super) struct Drivers {
    setting: Xdp,
    folder: PathBuf,
    namespace: u64,
    /// By index: in which mode the program is attached, or why it is not, as of the last update.
    devices: BTreeMap<u32, Result<XdpMode, String>>,
}

/// In which mode this device gets the program; `None` if it does not.
fn mode(setting: Xdp, device: &Interface) -> Option<XdpMode> {
    let physical = device.bus.as_deref().is_some_and(|bus| !VIRTUAL.contains(&bus));
    match setting {
        Xdp::Auto => physical.then_some(XdpMode::Native),
        // The program reads Ethernet.
        Xdp::Native => device.hardware_address.map(|_| XdpMode::Native),
        Xdp::Generic => device.hardware_address.map(|_| XdpMode::Generic),
        Xdp::Off => None,
    }
}

impl Drivers {
    /// None yet. Pins are in folders under this one.
    pub(super) fn new(setting: Xdp, folder: &Path) -> io::Result<Self> {
        Ok(Self { setting, folder: folder.to_owned(), namespace: namespace()?, devices: BTreeMap::new() })
    }

    /// Attaches the program to those of the devices that are to have it, and removes it from all others.
    /// Failures are logged when they are new.
    pub(super) fn update(&mut self, programs: &mut Ebpf, maps: &Maps, devices: &[Interface]) {
        let setting = self.setting;
        for (folder, of) in FOLDERS {
            let wanted = devices.iter().filter(|device| mode(setting, device) == Some(of));
            self.remove_others(&self.folder.join(folder), &wanted.map(|device| device.index).collect());
        }
        let wanted = |index: u32| devices.iter().any(|it| it.index == index && mode(setting, it).is_some());
        self.devices.retain(|index, _| wanted(*index));
        for device in devices {
            let Some(mode) = mode(self.setting, device) else { continue };
            let attached = maps
                .set_device(device.index, device.hardware_address.unwrap_or_default())
                .map_err(|error| error.to_string())
                .and_then(|()| {
                    self.ensure(programs, device, mode).map_err(|error| self.explain(device, &error))
                })
                .map(|()| mode);
            if self.devices.get(&device.index) == Some(&attached) {
                continue;
            }
            let name = device.name.as_str();
            match (&attached, self.setting) {
                (Ok(mode), _) => {
                    tracing::info!(target: target::GUARD, device = name, ?mode, "XDP program attached: it drops packets of banned sources before the kernel handles them");
                }
                (Err(reason), Xdp::Auto) => {
                    tracing::info!(target: target::GUARD, device = name, reason, "no XDP program on this device; packets of banned sources are dropped at its ingress");
                }
                (Err(error), _) => {
                    tracing::error!(target: target::GUARD, device = name, error, "the XDP program could not be attached; packets of banned sources are dropped at the ingress of the device");
                }
            }
            self.devices.insert(device.index, attached);
        }
    }

    /// In which mode the program is attached to the driver of a device, or why it is not; `None` if it
    /// is not to be there. As of the last update.
    pub(super) fn state(&self, device: u32) -> Option<Result<XdpMode, String>> {
        self.devices.get(&device).cloned()
    }

    fn explain(&self, device: &Interface, error: &ProgramError) -> String {
        let text = chain(error);
        let os = match error {
            ProgramError::IOError(error) => error.raw_os_error(),
            _ => None,
        };
        match (os, device.xdp) {
            (Some(libc::EBUSY | libc::EEXIST), Some(id)) => {
                let name = bpf::program_by_id(id).and_then(|program| bpf::program_info(program.as_fd()));
                let name = name.map(|info| format!(" ({})", info.name)).unwrap_or_default();
                format!("another XDP program is attached to it: id {id}{name}")
            }
            (Some(libc::EOPNOTSUPP), _) if self.setting != Xdp::Generic => {
                format!("its driver has no XDP: {text}")
            }
            _ => text,
        }
    }

    fn ensure(&self, programs: &mut Ebpf, device: &Interface, mode: XdpMode) -> Result<(), ProgramError> {
        let program: &mut XdpProgram =
            programs.program_mut(programs::XDP).ok_or(ProgramError::NotLoaded)?.try_into()?;
        let folder = FOLDERS.iter().find(|(_, of)| *of == mode).map_or("", |(folder, _)| folder);
        let folder = self.folder.join(folder);
        fs::create_dir_all(&folder)?;
        let pin = folder.join(pin_name(self.namespace, device.index));
        let live = bpf::open_pin(&pin).ok().and_then(|link| {
            let info = bpf::xdp_link_info(link.as_fd()).ok()??;
            // The link of a device that is gone has no index, and that of one which was moved to another network
            // namespace may have the same.
            (info.device == device.index && device.xdp == Some(info.program)).then_some((link, info))
        });
        match live {
            Some((_, info)) if info.program == program.info()?.id() => Ok(()),
            Some((link, _)) => Ok(bpf::replace_program(link.as_fd(), program.fd()?.as_fd())?),
            None => {
                let link = bpf::attach_xdp(program.fd()?.as_fd(), device.index, mode)?;
                Ok(replace_pin(link.as_fd(), &pin)?)
            }
        }
    }

    /// Removes the links of this network namespace to other devices.
    fn remove_others(&self, folder: &Path, wanted: &BTreeSet<u32>) {
        let own = format!("{}-", self.namespace);
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(index) = name.to_str().and_then(|name| name.strip_prefix(&own)?.parse().ok()) else {
                continue;
            };
            if wanted.contains(&index) {
                continue;
            }
            match device_pins::remove(&entry.path()) {
                Ok(_) => {
                    tracing::info!(target: target::GUARD, index, "XDP program removed: the device is gone, or guard.xdp is another one now");
                }
                Err(error) => {
                    tracing::error!(target: target::GUARD, index, %error, "the XDP program could not be removed");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::attach::routes::LinkKind;

    #[test]
    fn auto_is_for_physical_devices_alone() {
        let device = |bus: Option<&str>, hardware_address| Interface {
            index: 2,
            name: "eth0".to_owned(),
            kind: LinkKind::Ethernet,
            up: true,
            loopback: false,
            master: None,
            hardware_address,
            bus: bus.map(str::to_owned),
            xdp: None,
        };
        let mac = Some([2, 0, 0, 0, 0, 1]);
        let (native, generic) = (Some(XdpMode::Native), Some(XdpMode::Generic));
        for (device, expected) in [
            (device(Some("pci"), mac), [native, native, generic, None]),
            (device(Some("virtio"), mac), [None, native, generic, None]),
            // veth, bridges, bonds, VLANs.
            (device(None, mac), [None, native, generic, None]),
            // tun, WireGuard.
            (device(None, None), [None, None, None, None]),
        ] {
            let modes =
                [Xdp::Auto, Xdp::Native, Xdp::Generic, Xdp::Off].map(|setting| mode(setting, &device));
            assert_eq!(modes, expected, "{device:?}");
        }
    }
}
