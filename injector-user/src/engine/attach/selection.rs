//! On which devices the program belongs.
//!
//! It belongs where packets become the host's own. A bridge's port sees each frame before the
//! bridge does, also frames that are only forwarded between ports; a bond's member sees frames that
//! the bond discards. So the program is attached to the bridge or bond, and not to its members. A
//! member of a VRF keeps its packets.
//!
//! The parent of a VLAN or macvlan device has the program as well as its child: what is addressed
//! to the child has another VLAN or Ethernet address there, which the program leaves alone.

use std::collections::BTreeSet;

use super::routes::{Interface, LinkKind};

/// The devices that the configuration names, by their identity: a device that is renamed stays.
#[derive(Debug, Default)]
pub(in crate::engine) struct Selection {
    /// The names in the configuration; none for all devices.
    names: Vec<String>,
    /// The devices that have or had one of the names.
    indices: BTreeSet<u32>,
}

/// What belongs where.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::engine) struct AttachPoints {
    /// The devices that need the program.
    pub(in crate::engine) attach: Vec<Interface>,
    /// The devices that keep it if they have it: besides the former, those that are down, and ports
    /// of a bridge that has no program.
    pub(in crate::engine) keep: BTreeSet<u32>,
    /// Names in the configuration that no device has, or whose packets cannot be read, and why.
    pub(in crate::engine) unusable: Vec<(String, String)>,
}

impl Selection {
    /// All devices, if there are no names.
    pub(in crate::engine) const fn new(names: Vec<String>) -> Self {
        Self { names, indices: BTreeSet::new() }
    }

    /// Decides which devices get the program.
    pub(in crate::engine) fn points(&mut self, interfaces: &[Interface]) -> AttachPoints {
        self.update(interfaces);
        let readable = |interface: &&Interface| {
            !interface.loopback && !matches!(interface.kind, LinkKind::Other(_)) && self.has(interface)
        };
        let all: Vec<_> = interfaces.iter().filter(readable).collect();
        let attach = all.iter().filter(|interface| interface.up && interface.master.is_none());
        let attach: Vec<_> = attach.map(|interface| (*interface).clone()).collect();
        let served = |index: u32| attach.iter().any(|interface| interface.index == index);
        let stays = |interface: &&&Interface| interface.master.is_none_or(|master| !served(master));
        let keep = all.iter().filter(stays).map(|interface| interface.index).collect();
        AttachPoints { keep, unusable: self.unusable(interfaces), attach }
    }

    fn has(&self, interface: &Interface) -> bool {
        self.names.is_empty() || self.indices.contains(&interface.index)
    }

    /// Adds the devices that have a name by now, and the bridges that take their packets. Removes
    /// those that are gone: a new device may get the index.
    fn update(&mut self, interfaces: &[Interface]) {
        let find = |index: u32| interfaces.iter().find(|interface| interface.index == index);
        self.indices.retain(|index| find(*index).is_some());
        let named = interfaces.iter().filter(|interface| self.names.contains(&interface.name));
        self.indices.extend(named.map(|interface| interface.index));
        let mut masters: Vec<_> = self.indices.iter().copied().collect();
        while let Some(master) = masters.pop().and_then(find).and_then(|interface| interface.master) {
            if self.indices.insert(master) {
                masters.push(master);
            }
        }
    }

    fn unusable(&self, interfaces: &[Interface]) -> Vec<(String, String)> {
        let reason = |name: &String| match interfaces.iter().find(|interface| interface.name == *name) {
            None => Some("it does not exist".to_owned()),
            Some(interface) if interface.loopback => Some("it is the loopback device".to_owned()),
            Some(Interface { kind: LinkKind::Other(number), .. }) => {
                Some(format!("packets of link type {number} (ARPHRD) cannot be read"))
            }
            Some(_) => None,
        };
        self.names.iter().filter_map(|name| Some((name.clone(), reason(name)?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(index: u32, name: &str) -> Interface {
        Interface {
            index,
            name: name.to_owned(),
            kind: LinkKind::Ethernet,
            up: true,
            loopback: false,
            master: None,
            hardware_address: None,
            bus: None,
            xdp: None,
        }
    }

    fn indices(points: &AttachPoints) -> (Vec<u32>, Vec<u32>) {
        let attach = points.attach.iter().map(|interface| interface.index).collect();
        (attach, points.keep.iter().copied().collect())
    }

    #[test]
    fn all_devices_that_are_up_and_readable() {
        let mut all = Selection::default();
        let interfaces = [
            Interface { loopback: true, ..interface(1, "lo") },
            interface(2, "eth0"),
            Interface { up: false, ..interface(3, "eth1") },
            Interface { kind: LinkKind::Other(778), ..interface(4, "gre0") },
            Interface { kind: LinkKind::Headerless, ..interface(5, "tun0") },
        ];
        let points = all.points(&interfaces);
        // A device that goes down keeps the program: once it is up again, no packet may pass
        // without.
        assert_eq!(indices(&points), (vec![2, 5], vec![2, 3, 5]));
        assert!(points.unusable.is_empty());
    }

    #[test]
    fn a_port_keeps_the_program_until_its_bridge_has_it() {
        let port = Interface { master: Some(3), ..interface(2, "eth0") };
        for names in [vec![], vec!["eth0".to_owned()]] {
            let mut selection = Selection::new(names);
            assert_eq!(indices(&selection.points(&[interface(2, "eth0")])), (vec![2], vec![2]));
            let down = Interface { up: false, ..interface(3, "br0") };
            assert_eq!(indices(&selection.points(&[port.clone(), down])), (vec![], vec![2, 3]));
            assert_eq!(indices(&selection.points(&[port.clone(), interface(3, "br0")])), (vec![3], vec![3]));
            // A bond in a bridge.
            let bond = Interface { master: Some(4), ..interface(3, "bond0") };
            let points = selection.points(&[port.clone(), bond, interface(4, "br0")]);
            assert_eq!(points.attach, [interface(4, "br0")]);
        }
    }

    #[test]
    fn a_device_is_its_index() {
        let mut selection = Selection::new(vec!["eth0".to_owned()]);
        assert_eq!(indices(&selection.points(&[interface(2, "eth0"), interface(3, "eth1")])).0, [2]);
        let renamed = selection.points(&[interface(2, "wan0"), interface(3, "eth1")]);
        assert_eq!(indices(&renamed).0, [2]);
        assert_eq!(renamed.unusable, [("eth0".to_owned(), "it does not exist".to_owned())]);
        // The name goes to another device, then the first one goes.
        assert_eq!(indices(&selection.points(&[interface(2, "wan0"), interface(4, "eth0")])).0, [2, 4]);
        assert_eq!(indices(&selection.points(&[interface(4, "eth0")])).0, [4]);
        assert_eq!(indices(&selection.points(&[interface(2, "new0"), interface(4, "eth0")])).0, [4]);
    }
}
