//! Frames that no socket of the client sends: with VLAN tags, with headers that the kernel has not in one
//! piece, and to hosts behind the edge that do not answer.

use std::ffi::CString;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, bail, ensure};
use etherparse::PacketBuilder;
use injector_testbed::daemon::Injector;
use injector_testbed::netns::{Family, Netns};
use socket2::{Domain, Protocol, Socket, Type};

use crate::Run;
use crate::testbed::{ANY_PORT, FOREVER, OVER, Testbed, client, listeners, unused, wait_for, whole};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("packets of a VLAN are its own device's, and a priority is none", vlans),
    ("headers that are not in one piece", in_parts),
    ("packets that are forwarded, by every kind of route", forwarded),
];

const RELAY: [&str; 1] = ["relay"];

/// The device of the client, and the edge's at the other end.
const DEVICE: &str = "eth0";
const EDGE_DEVICE: &str = "outside";
const ETHERNET: usize = 14;

/// A segment of the client's, as it stands on the wire. It is a reset, which no host answers: the client would in
/// turn answer that, with a packet that is dropped.
struct Frame<'a> {
    to: SocketAddr,
    /// Protocol and number of each VLAN tag, with its priority.
    tags: &'a [(u16, u16)],
    /// How many bytes follow the TCP header.
    payload: usize,
}

/// Sends frames from the client to the edge.
struct Sender {
    socket: Socket,
    device: u32,
    /// The edge's Ethernet address.
    edge: [u8; 6],
}

impl Sender {
    fn new(testbed: &Testbed) -> anyhow::Result<Self> {
        let shown = testbed.link(EDGE_DEVICE)?;
        let address = shown.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next());
        let octets: Result<Vec<_>, _> =
            address.context("no address")?.split(':').map(|octet| u8::from_str_radix(octet, 16)).collect();
        let Ok(edge) = octets?.try_into() else { bail!("ip link: {shown}") };
        let open = || {
            let name = CString::new(DEVICE)?;
            // SAFETY: a string that outlives the call.
            let device = unsafe { libc::if_nametoindex(name.as_ptr()) };
            ensure!(device != 0, "{DEVICE}: {}", io::Error::last_os_error());
            // With protocol 0 it receives nothing.
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
            let on: libc::c_int = 1;
            // SAFETY: the option is an integer that outlives the call.
            let set = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_PACKET,
                    libc::PACKET_VNET_HDR,
                    (&raw const on).cast(),
                    size_of_val(&on).try_into()?,
                )
            };
            ensure!(set == 0, "PACKET_VNET_HDR: {}", io::Error::last_os_error());
            Ok(Self { socket, device, edge })
        };
        testbed.topology.client.run(open)?
    }

    fn send(&self, frame: &Frame<'_>) -> anyhow::Result<()> {
        let source = client(if frame.to.is_ipv4() { Family::V4 } else { Family::V6 });
        let builder = match (source, frame.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), 64),
            (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), 64),
            ends => bail!("{ends:?}"),
        };
        let packet = builder.tcp(40_000, frame.to.port(), 1, 64_240).rst();
        // struct virtio_net_hdr: only so much of the frame is in the first piece, if it is longer than a page.
        let mut bytes = vec![0; 10];
        bytes[2..4].copy_from_slice(&u16::try_from(ETHERNET)?.to_ne_bytes());
        bytes.extend(self.edge);
        bytes.extend([2, 0, 0, 0, 0, 7]);
        for (protocol, tag) in frame.tags {
            bytes.extend(protocol.to_be_bytes());
            bytes.extend(tag.to_be_bytes());
        }
        bytes.extend(if frame.to.is_ipv4() { [0x08, 0x00] } else { [0x86, 0xDD] });
        packet.write(&mut bytes, &vec![0; frame.payload])?;
        // SAFETY: plain integers and bytes, for which zeros are valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET.try_into()?;
        address.sll_ifindex = self.device.try_into()?;
        // SAFETY: the bytes and the address outlive the call.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                bytes.as_ptr().cast(),
                bytes.len(),
                0,
                (&raw const address).cast(),
                size_of_val(&address).try_into()?,
            )
        };
        ensure!(usize::try_from(sent) == Ok(bytes.len()), "sending: {}", io::Error::last_os_error());
        Ok(())
    }

    /// Checks that the program at the ingress leaves the first frame alone, and drops the second one, which
    /// follows it.
    fn expect(
        &self,
        testbed: &Testbed,
        what: &str,
        left: &Frame<'_>,
        dropped: &Frame<'_>,
    ) -> anyhow::Result<()> {
        let before = testbed.dropped()?;
        self.send(left)?;
        self.send(dropped)?;
        let count = || anyhow::Ok(testbed.dropped()?[1] - before[1]);
        wait_for(&format!("{what}: the packet that is to be dropped"), || Ok(count()? > 0))?;
        let count = count()?;
        ensure!(count == 1, "{what}: {count} packets were dropped");
        Ok(())
    }
}

/// Nothing is received in a VLAN here. The kernel moves the first tag of a frame out of it before a program at
/// the ingress runs.
fn vlans(testbed: &Testbed) -> anyhow::Result<()> {
    const CUSTOMER: u16 = 0x8100;
    const SERVICE: u16 = 0x88A8;
    /// The highest priority, and no number.
    const PRIORITY: u16 = 7 << 13;
    let _injector = testbed.start(&RELAY, "")?;
    let sender = Sender::new(testbed)?;
    for family in Family::ALL {
        let [to] = listeners(&RELAY, family)[..] else { bail!("one listener") };
        testbed.ban(client(family), whole(family), FOREVER)?;
        let frame = |tags| Frame { to, tags, payload: 0 };
        let priority = frame(&[(CUSTOMER, PRIORITY)]);
        for tags in [
            &[(CUSTOMER, 7)][..],
            &[(CUSTOMER, PRIORITY | 7)],
            &[(SERVICE, 7)],
            &[(SERVICE, 7), (CUSTOMER, 8)],
            &[(SERVICE, 0xFFF)],
        ] {
            // Several: processors may take frames at the same time.
            for _ in 0..5 {
                sender.expect(testbed, &format!("{tags:x?}"), &frame(tags), &priority)?;
            }
        }
    }
    Ok(())
}

/// The largest packets of a device, and what they were.
struct Mtu<'a> {
    netns: &'a Netns,
    device: &'static str,
}

impl<'a> Mtu<'a> {
    /// Of all devices until then.
    const USUAL: &'static str = "1500";

    fn new(netns: &'a Netns, device: &'static str, mtu: &str) -> anyhow::Result<Self> {
        netns.ip(&["link", "set", device, "mtu", mtu])?;
        Ok(Self { netns, device })
    }
}

impl Drop for Mtu<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.netns.ip(&["link", "set", self.device, "mtu", Self::USUAL]) {
            eprintln!("{error:#}");
        }
    }
}

/// Of a frame that is longer than a page, the first piece is the Ethernet header alone.
fn in_parts(testbed: &Testbed) -> anyhow::Result<()> {
    let _injector = testbed.start(&RELAY, "")?;
    let topology = &testbed.topology;
    let _longer =
        [Mtu::new(&topology.client, DEVICE, "9000")?, Mtu::new(&topology.edge, EDGE_DEVICE, "9000")?];
    let sender = Sender::new(testbed)?;
    for family in Family::ALL {
        let [to] = listeners(&RELAY, family)[..] else { bail!("one listener") };
        testbed.ban(client(family), whole(family), FOREVER)?;
        let long = |to| Frame { to, tags: &[], payload: 8000 };
        let other = SocketAddr::new(to.ip(), to.port() + 1);
        sender.expect(testbed, "another port", &long(other), &long(to))?;
    }
    Ok(())
}

/// A listener of all addresses does not stand for those of hosts behind the edge.
fn forwarded(testbed: &Testbed) -> anyhow::Result<()> {
    let (topology, config) = (&testbed.topology, testbed.config(&RELAY, ""));
    let [relay] = listeners(&RELAY, Family::V4)[..] else { bail!("one listener") };
    let config = config.replace(&relay.to_string(), &format!("[::]:{ANY_PORT}"));
    let injector = Injector::start(&topology.edge, &config)?;
    let sender = Sender::new(testbed)?;
    let _smaller = Mtu::new(&topology.edge, "inside", "1280")?;
    for family in Family::ALL {
        testbed.ban(client(family), whole(family), FOREVER)?;
        let own = frame_to(unused(family), 0);
        let [known, unknown] = [78, 79].map(|host| behind(family, host));
        let edge = &topology.edge;
        let neighbour =
            ["neigh", "replace", &known.to_string(), "lladdr", "02:00:00:00:00:78", "dev", "inside"];
        edge.ip(&neighbour)?;
        let expect = |what, left: &Frame<'_>| sender.expect(testbed, what, left, &own);
        expect("a known neighbour", &frame_to(known, 0))?;
        expect("a neighbour that is not known", &frame_to(unknown, 0))?;
        expect("a packet that is longer than the MTU", &frame_to(known, 1400))?;
        let (kind, to) = match family {
            Family::V4 => ("ip", "203.0.113.0/24"),
            Family::V6 => ("ip6", "2001:db8:f::/64"),
        };
        let through = known.to_string();
        let tunnel = ["route", "add", to, "encap", kind, "id", "7", "dst", &through, "dev", "inside"];
        edge.ip(&tunnel)?;
        let left = expect("a route that tunnels", &frame_to(far(family), 0));
        edge.ip(&["route", "del", to, "dev", "inside"])?;
        edge.ip(&["neigh", "del", &known.to_string(), "dev", "inside"])?;
        left?;
        // Or the next daemon would take the ban over.
        testbed.ban(client(family), whole(family), OVER)?;
    }
    drop(injector);
    Ok(())
}

/// To the port of the listener of all addresses.
fn frame_to(ip: IpAddr, payload: usize) -> Frame<'static> {
    Frame { to: SocketAddr::new(ip, ANY_PORT), tags: &[], payload }
}

/// A host of the network behind the edge, which is not there.
fn behind(family: Family, host: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 25, 0, host).into(),
        Family::V6 => Ipv6Addr::new(0xfd25, 0, 0, 0, 0, 0, 0, host.into()).into(),
    }
}

/// A host farther away.
fn far(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(203, 0, 113, 5).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0xf, 0, 0, 0, 0, 5).into(),
    }
}
