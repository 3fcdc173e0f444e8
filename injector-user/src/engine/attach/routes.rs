//! The interfaces of this network namespace, and notifications of changes of routes and interfaces,
//! by rtnetlink(7).
//!
//! A netlink socket belongs to the network namespace of the thread that opens it. No capability
//! is needed.

use std::{io, time::Duration};

use futures_util::{StreamExt as _, stream::BoxStream};
use rtnetlink::{
    MulticastGroup,
    packet_core::{DecodeError, parse_string, parse_u32},
    packet_route::{
        RouteNetlinkMessage,
        link::{LinkFlags, LinkLayerType, LinkMessage},
    },
};
use tokio::time::{Instant, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use super::netlink::{attribute, dump, short};

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interface {
    /// The number in `ip link`: its identity in this network namespace. Another interface may get
    /// the number once this one is gone.
    pub index: u32,
    /// For example `eth0`. May change at any time.
    pub name: String,
    /// The format of its packets.
    pub kind: LinkKind,
    /// Whether it is up.
    pub up: bool,
    /// Whether it is `lo`.
    pub loopback: bool,
    /// The bridge, bond or team that takes its packets, by index: they are the host's only once
    /// they arrive there. A VRF takes none: packets are the host's at its members.
    pub master: Option<u32>,
    /// Its Ethernet address.
    pub hardware_address: Option<[u8; 6]>,
    /// The bus of the hardware that it is, such as `pci`, or `virtio`. Only Linux 5.14 and later name it.
    pub bus: Option<String>,
    /// The id of its XDP program.
    pub xdp: Option<u32>,
}

/// The interfaces of the calling thread's network namespace, by index, also those that are down.
/// Blocks for a moment.
///
/// # Errors
/// As netlink(7).
pub fn interfaces() -> io::Result<Vec<Interface>> {
    let mut interfaces = Vec::new();
    dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), |message| {
        interfaces.extend(interface(message)?);
        Ok(())
    })?;
    interfaces.sort();
    Ok(interfaces)
}

/// One interface of a dump. Other attributes are not read: a newer kernel may format them
/// otherwise.
fn interface(message: &[u8]) -> Result<Option<Interface>, DecodeError> {
    /// The length of struct ifinfomsg, `IFLA_IFNAME`, `IFLA_MASTER`, `IFLA_LINKINFO` and in it
    /// `IFLA_INFO_SLAVE_KIND`.
    const HEADER: usize = 16;
    const NAME: u16 = 3;
    const MASTER: u16 = 10;
    const LINK_INFO: u16 = 18;
    const PORT_KIND: u16 = 4;
    /// `IFLA_ADDRESS`, `IFLA_PARENT_DEV_BUS_NAME`, `IFLA_XDP` and in it `IFLA_XDP_PROG_ID`.
    const ADDRESS: u16 = 1;
    const BUS: u16 = 57;
    const XDP: u16 = 43;
    const XDP_PROGRAM: u16 = 4;

    let Some((header, attributes)) = message.split_at_checked(HEADER) else { return Err(short()) };
    let [_, _, link0, link1, i0, i1, i2, i3, f0, f1, f2, f3, ..] = *header else { return Err(short()) };
    let flags = LinkFlags::from_bits_retain(u32::from_ne_bytes([f0, f1, f2, f3]));
    let Some(name) = attribute(attributes, NAME)? else { return Ok(None) };
    let info = attribute(attributes, LINK_INFO)?.unwrap_or_default();
    let in_vrf = attribute(&info, PORT_KIND)?.is_some_and(|kind| kind.starts_with(b"vrf"));
    let master = attribute(attributes, MASTER)?.map(|index| parse_u32(&index)).transpose()?;
    let kind = LinkKind::of(LinkLayerType::from(u16::from_ne_bytes([link0, link1])));
    let hardware_address = attribute(attributes, ADDRESS)?.and_then(|address| address.try_into().ok());
    let xdp = attribute(attributes, XDP)?.unwrap_or_default();
    Ok(Some(Interface {
        index: u32::from_ne_bytes([i0, i1, i2, i3]),
        name: parse_string(&name)?,
        kind,
        up: flags.contains(LinkFlags::Up),
        loopback: flags.contains(LinkFlags::Loopback),
        master: master.filter(|_| !in_vrf),
        hardware_address: hardware_address.filter(|_| kind == LinkKind::Ethernet),
        bus: attribute(attributes, BUS)?.map(|bus| parse_string(&bus)).transpose()?,
        xdp: attribute(&xdp, XDP_PROGRAM)?.map(|id| parse_u32(&id)).transpose()?,
    }))
}

/// The first bytes of an interface's packets, as tc programs see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LinkKind {
    /// 14 bytes of Ethernet: veth, bridges, VLANs, bonds and most hardware.
    Ethernet,
    /// The IP header: tun, WireGuard, IP in IP, PPP.
    Headerless,
    /// A format that the inline engine does not support; the number is one of `ARPHRD_*`,
    /// include/uapi/linux/if_arp.h.
    Other(u16),
}

impl LinkKind {
    fn of(link: LinkLayerType) -> Self {
        use LinkLayerType::{Ether, None, Ppp, Rawip, Sit, Tunnel, Tunnel6};
        match link {
            Ether => Self::Ethernet,
            None | Rawip | Ppp | Tunnel | Tunnel6 | Sit => Self::Headerless,
            other => Self::Other(other.into()),
        }
    }
}

/// Notifies the caller of changes of links, qdiscs, filters, addresses, routes or rules, so that it
/// queries the kernel again.
pub struct Changes {
    /// One item for each message; its content does not matter. Lost messages (ENOBUFS) are an item
    /// too.
    messages: BoxStream<'static, ()>,
    /// The time of the first change that no call of `next` has reported yet.
    since: Option<Instant>,
    _connection: AbortOnDropHandle<()>,
}

/// Changes come in bursts: a link that goes down takes its routes along, a routing daemon writes
/// thousands.
const QUIET: Duration = Duration::from_millis(20);
/// How long a burst may delay the caller: packets that arrive on a new device meanwhile belong to
/// no connection of the host's, which resets it.
const LONGEST: Duration = Duration::from_millis(300);

impl Changes {
    /// Subscribes to changes, in the calling thread's network namespace. A caller that subscribes
    /// before it queries the kernel misses no change.
    ///
    /// # Errors
    /// As socket(2) and bind(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn watch() -> io::Result<Self> {
        let (connection, _, messages) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Tc,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ])?;
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        Ok(Self { messages: messages.map(|_| ()).boxed(), since: None, _connection: connection })
    }

    /// Returns after a change, once nothing more has changed for 20 ms, or 300 ms after the first
    /// change. Changes before the call count. Cancel safe: the next call reports what a dropped
    /// call received.
    ///
    /// # Errors
    /// When the socket has failed for good; watch anew.
    pub async fn next(&mut self) -> io::Result<()> {
        let closed = || io::Error::other("the rtnetlink socket for route changes failed");
        let since = match self.since {
            Some(since) => since,
            None => {
                self.messages.next().await.ok_or_else(closed)?;
                *self.since.insert(Instant::now())
            }
        };
        let end = since + LONGEST;
        // The next call reports an end of the stream; this change counts first.
        while let Ok(Some(())) = timeout_at(end.min(Instant::now() + QUIET), self.messages.next()).await {
            // If the stream is always ready, the timer is never polled.
            if Instant::now() >= end {
                break;
            }
        }
        self.since = None;
        Ok(())
    }
}

impl std::fmt::Debug for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Changes").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_kinds_give_the_format_of_packets() {
        let cases = [
            (LinkLayerType::Ether, LinkKind::Ethernet),
            (LinkLayerType::None, LinkKind::Headerless),
            (LinkLayerType::Tunnel, LinkKind::Headerless),
            (LinkLayerType::Ppp, LinkKind::Headerless),
            (LinkLayerType::Infiniband, LinkKind::Other(32)),
            (LinkLayerType::Ipgre, LinkKind::Other(778)),
        ];
        for (link, kind) in cases {
            assert_eq!(LinkKind::of(link), kind, "{link:?}");
        }
    }

    #[test]
    fn an_interface_is_read_from_its_message() {
        let attribute = |kind: u16, value: &[u8]| {
            let len = u16::try_from(4 + value.len()).unwrap();
            let mut bytes = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
            bytes.extend(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let message = |port_kind: &[u8]| {
            // AF_UNSPEC, ARPHRD_ETHER, index 7, IFF_UP.
            let mut bytes = [[0, 0].as_slice(), &1_u16.to_ne_bytes(), &7_u32.to_ne_bytes()].concat();
            bytes.extend([1_u32.to_ne_bytes(), [0; 4]].concat());
            bytes.extend(attribute(3, b"eth0\0"));
            bytes.extend(attribute(10, &3_u32.to_ne_bytes()));
            bytes.extend(attribute(18, &attribute(4, port_kind)));
            bytes.extend(attribute(1, &[2, 0, 0, 0, 0, 7]));
            bytes.extend(attribute(57, b"pci\0"));
            bytes.extend(attribute(43, &attribute(4, &9_u32.to_ne_bytes())));
            bytes
        };
        let expected = Interface {
            index: 7,
            name: "eth0".to_owned(),
            kind: LinkKind::Ethernet,
            up: true,
            loopback: false,
            master: Some(3),
            hardware_address: Some([2, 0, 0, 0, 0, 7]),
            bus: Some("pci".to_owned()),
            xdp: Some(9),
        };
        assert_eq!(interface(&message(b"bridge\0")).unwrap(), Some(expected.clone()));
        let in_vrf = Interface { master: None, ..expected };
        assert_eq!(interface(&message(b"vrf\0")).unwrap(), Some(in_vrf));
        assert!(interface(&[0; 15]).is_err());
    }
}
