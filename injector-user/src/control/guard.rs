//! What the daemon answers of its guard, and what is wrong with it.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use super::bans::unix_seconds;
use crate::{
    engine::guarded_device::GuardedDevice,
    guard::{self, ListStatus, Origin, Service},
};

/// Bans, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardStatus {
    /// Bans of `guard.deny` and of list files.
    pub list: u64,
    /// Bans by `injector ban`.
    pub command: u64,
    /// Bans by CrowdSec.
    pub crowdsec: u64,
    /// How many addresses and networks may be banned.
    pub max_bans: u64,
    /// Why bans are not enforced in the kernel, or not all of them.
    pub kernel_failure: Option<String>,
    /// Packets dropped in the kernel, by hook.
    pub dropped_packets: BTreeMap<String, u64>,
    /// The list files.
    pub lists: Vec<ListFileStatus>,
    /// The devices that are to have the programs.
    #[serde(default)]
    pub devices: Vec<GuardDeviceStatus>,
    /// Pins of maps that were removed while the daemon runs.
    #[serde(default)]
    pub missing_pins: Vec<PathBuf>,
}

/// A file with networks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListFileStatus {
    /// The file.
    pub file: PathBuf,
    /// How many networks of it are in effect.
    pub networks: u64,
    /// When it was last read, in seconds since 1970.
    pub read_at: Option<u64>,
    /// Why it cannot be read now.
    pub error: Option<String>,
}

/// A device that is to have the guard's programs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardDeviceStatus {
    /// Its name.
    pub name: String,
    /// How the program is attached to its ingress: `tcx` or `clsact`.
    pub ingress: Option<String>,
    /// Why it is not.
    pub ingress_error: Option<String>,
    /// In which mode the XDP program is attached to its driver: `native` or `generic`.
    pub xdp: Option<String>,
    /// Why it is not, although `guard.xdp` asks for it.
    pub xdp_error: Option<String>,
}

impl GuardStatus {
    /// The state of this guard now.
    pub(super) fn of(service: &Service) -> Self {
        let guard = service.guard();
        let attachment = service.attachment();
        let kernel_failure = match &attachment {
            _ if guard.is_behind() => Some("the kernel refused a change; it is tried again"),
            None => Some("bans are not in the kernel; the daemon resets connections of banned sources"),
            Some(attachment) if attachment.devices.is_empty() => {
                Some("no device has the programs; the daemon resets connections of banned sources")
            }
            Some(_) => None,
        };
        let dropped = guard::dropped(guard).into_iter();
        let attachment = attachment.unwrap_or_default();
        Self {
            list: guard.count(Origin::List) as u64,
            command: guard.count(Origin::Command) as u64,
            crowdsec: guard.count(Origin::CrowdSec) as u64,
            max_bans: service.max_bans().into(),
            kernel_failure: kernel_failure.map(str::to_owned),
            dropped_packets: dropped.map(|(hook, count)| (hook.to_owned(), count)).collect(),
            lists: service.lists().into_iter().map(ListFileStatus::from).collect(),
            devices: attachment.devices.into_iter().map(GuardDeviceStatus::from).collect(),
            missing_pins: attachment.missing_pins,
        }
    }

    /// How many sources are banned.
    pub(super) const fn bans(&self) -> u64 {
        self.list + self.command + self.crowdsec
    }

    /// How many packets were dropped in the kernel.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped_packets.values().sum()
    }

    /// What is wrong, and what that means for traffic.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        let ingress = self.devices.iter().filter_map(|device| {
            let error = device.ingress_error.as_ref()?;
            Some(format!(
                "{}: no program at the ingress: {error}; listeners reset connections of banned sources from there",
                device.name
            ))
        });
        let driver = self.devices.iter().filter_map(|device| {
            let error = device.xdp_error.as_ref()?;
            let then = match device.ingress {
                Some(_) => "; its packets are dropped at the ingress",
                None => "",
            };
            Some(format!("{}: no XDP program: {error}{then}", device.name))
        });
        let pins = self.missing_pins.iter().map(|pin| {
            format!(
                "{} was removed: the bans in it end with the daemon, unless a list or guard.state has them",
                pin.display()
            )
        });
        let lists =
            self.lists.iter().filter_map(|list| Some(format!("list not read: {}", list.error.as_ref()?)));
        self.kernel_failure.iter().cloned().chain(ingress).chain(driver).chain(pins).chain(lists).collect()
    }
}

impl From<ListStatus> for ListFileStatus {
    fn from(list: ListStatus) -> Self {
        Self {
            file: list.file,
            networks: list.networks as u64,
            read_at: list.read_at.map(unix_seconds),
            error: list.error,
        }
    }
}

impl From<GuardedDevice> for GuardDeviceStatus {
    fn from(device: GuardedDevice) -> Self {
        let split = |state: Result<&'static str, String>| match state {
            Ok(way) => (Some(way.to_owned()), None),
            Err(error) => (None, Some(error)),
        };
        let (ingress, ingress_error) = split(device.ingress);
        let (xdp, xdp_error) = device.driver.map(split).unwrap_or_default();
        Self { name: device.name, ingress, ingress_error, xdp, xdp_error }
    }
}

/// The state as text.
pub(super) fn write_status(out: &mut String, status: &GuardStatus) -> fmt::Result {
    let GuardStatus { list, command, crowdsec, max_bans, .. } = status;
    writeln!(
        out,
        "guard: {} of {max_bans} bans ({list} by lists, {command} by command, {crowdsec} by CrowdSec), {} packets dropped",
        status.bans(),
        status.dropped()
    )?;
    let attached = status.devices.iter().filter_map(|device| {
        let ingress = device.ingress.as_deref();
        let xdp = device.xdp.as_ref().map(|mode| format!("XDP {mode}"));
        let how: Vec<_> = ingress.into_iter().chain(xdp.as_deref()).collect();
        (!how.is_empty()).then(|| format!("{} ({})", device.name, how.join(", ")))
    });
    let attached: Vec<_> = attached.collect();
    if !attached.is_empty() {
        writeln!(out, "  programs on {}", attached.join(", "))?;
    }
    for fault in status.faults() {
        writeln!(out, "  {}", fault.replace('\n', "\n    "))?;
    }
    Ok(())
}

/// The state, in a part of a line.
#[must_use]
pub(super) fn bans_part(status: &GuardStatus) -> String {
    let faults = match status.faults().len() {
        0 => String::new(),
        1 => " (1 fault, see status)".to_owned(),
        count => format!(" ({count} faults, see status)"),
    };
    format!(", {} bans, {} packets dropped{faults}", status.bans(), status.dropped())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, driver: Option<Result<&'static str, String>>) -> GuardDeviceStatus {
        GuardedDevice { name: name.to_owned(), ingress: Ok("tcx"), driver }.into()
    }

    fn status() -> GuardStatus {
        GuardStatus {
            list: 3,
            command: 1,
            max_bans: 100,
            dropped_packets: [("tc".to_owned(), 5), ("xdp".to_owned(), 2)].into(),
            devices: vec![device("eth0", Some(Ok("native"))), device("wg0", None)],
            ..GuardStatus::default()
        }
    }

    fn text(status: &GuardStatus) -> String {
        let mut out = String::new();
        write_status(&mut out, status).unwrap();
        out
    }

    #[test]
    fn the_status_names_devices_and_what_is_missing() {
        let list = |error: Option<&str>| ListFileStatus {
            file: "/etc/deny.txt".into(),
            networks: 3,
            read_at: None,
            error: error.map(str::to_owned),
        };
        let first = "guard: 4 of 100 bans (3 by lists, 1 by command, 0 by CrowdSec), 7 packets dropped\n";
        let good = status();
        assert_eq!(text(&good), format!("{first}  programs on eth0 (tcx, XDP native), wg0 (tcx)\n"));
        let taken = Some(Err("another XDP program is attached to it: id 7 (filter)".to_owned()));
        let refused = GuardedDevice {
            name: "eth2".to_owned(),
            ingress: Err("guard: Operation not permitted (os error 1)".to_owned()),
            driver: Some(Err("its driver has no XDP: Operation not supported (os error 95)".to_owned())),
        };
        let bad = GuardStatus {
            kernel_failure: Some("the kernel refused a change; it is tried again".to_owned()),
            devices: vec![device("eth0", taken), refused.into()],
            missing_pins: vec!["/sys/fs/bpf/guard/layout1/maps/GUARDED".into()],
            lists: vec![list(None), list(Some("/etc/deny.txt:3: \"x\": wrong"))],
            ..status()
        };
        assert_eq!(
            text(&bad),
            format!(
                "{first}  programs on eth0 (tcx)\n  \
                 the kernel refused a change; it is tried again\n  \
                 eth2: no program at the ingress: guard: Operation not permitted (os error 1); listeners reset connections \
                 of banned sources from there\n  \
                 eth0: no XDP program: another XDP program is attached to it: id 7 (filter); its packets are dropped at the ingress\n  \
                 eth2: no XDP program: its driver has no XDP: Operation not supported (os error 95)\n  \
                 /sys/fs/bpf/guard/layout1/maps/GUARDED was removed: the bans in it end with the daemon, unless a list or \
                 guard.state has them\n  \
                 list not read: /etc/deny.txt:3: \"x\": wrong\n"
            )
        );
        assert_eq!(bans_part(&good), ", 4 bans, 7 packets dropped");
        assert_eq!(bans_part(&bad), ", 4 bans, 7 packets dropped (6 faults, see status)");
    }

    #[test]
    fn an_answer_of_an_older_daemon_has_no_devices() {
        let json = serde_json::json!({
            "list": 1, "command": 0, "crowdsec": 0, "max_bans": 9, "kernel_failure": null,
            "dropped_packets": {}, "lists": []
        });
        let status: GuardStatus = serde_json::from_value(json).unwrap();
        assert_eq!((status.bans(), status.faults().len()), (1, 0));
    }
}
