//! Hand-made frames, including what no TCP stack sends: any flags, padding after the packet,
//! fragments, extension headers.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use fastrand::Rng;
use injector_common::proxy::{Addresses, Command, v2};
use injector_testbed::netns::Family;

use crate::wire::{Direction, Fate, Side};
use crate::wire_testbed::{self, WireTestbed};

/// A TCP segment, with its surroundings.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    /// The bytes before the IP header.
    pub(crate) link: Vec<u8>,
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) hops: u8,
    pub(crate) sequence: u32,
    pub(crate) acknowledgement: u32,
    pub(crate) flags: u8,
    pub(crate) urgent: u16,
    pub(crate) options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
    /// Bytes after the packet.
    pub(crate) padding: usize,
    pub(crate) extra: Extra,
}

/// What is between the IP header and TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extra {
    None,
    /// Options: of IPv4, or an IPv6 destination options header.
    Extension,
    /// More IPv6 destination options headers than the program reads.
    ManyExtensions,
}

const TCP: u8 = 6;
/// An IPv6 destination options header.
const OPTIONS: u8 = 60;

/// Such a header with four bytes of padding (PadN; RFC 8200, section 4.2), and what follows it.
const fn options(next: u8) -> [u8; 8] {
    [next, 0, 1, 4, 0, 0, 0, 0]
}

impl Frame {
    /// A frame with the link-layer header of a client's frame.
    pub(crate) fn of_a_client(testbed: &WireTestbed, family: Family) -> anyhow::Result<Self> {
        let (sender, link) = std::sync::mpsc::channel();
        let _faulty = testbed.wire.faults(move |seen| {
            if seen.at(Side::Client, Direction::ToBackend) && seen.is_syn() {
                let _ = sender.send(seen.frame.get(..seen.ip_at).map(<[u8]>::to_vec));
                return Fate::Drop;
            }
            Fate::Pass
        });
        let connect =
            || std::net::TcpStream::connect_timeout(&wire_testbed::public(family), Duration::from_millis(50));
        let _ = testbed.client_side().run(connect)?;
        let link = link.recv_timeout(crate::testbed::LIMIT)?.context("no SYN")?;
        Ok(Self {
            link,
            source: SocketAddr::new(wire_testbed::client_ip(family), 1024),
            destination: wire_testbed::public(family),
            hops: 64,
            sequence: 0,
            acknowledgement: 0,
            flags: 0,
            urgent: 0,
            options: Vec::new(),
            payload: Vec::new(),
            padding: 0,
            extra: Extra::None,
        })
    }

    /// As one packet.
    pub(crate) fn whole(&self) -> Vec<u8> {
        let tcp = self.tcp();
        match (self.source.ip(), self.extra) {
            (IpAddr::V4(_), extra) => self.ipv4(extra, 0, 0, &tcp),
            (IpAddr::V6(_), Extra::None) => self.ipv6(TCP, &tcp),
            (IpAddr::V6(_), Extra::Extension) => self.ipv6(OPTIONS, &[&options(TCP), &tcp[..]].concat()),
            (IpAddr::V6(_), Extra::ManyExtensions) => {
                let headers = [options(OPTIONS).repeat(9), options(TCP).to_vec()].concat();
                self.ipv6(OPTIONS, &[headers, tcp].concat())
            }
        }
    }

    /// As fragments: for IPv4 two, the second optionally with options; for IPv6 two, or one alone
    /// (an atomic fragment, RFC 6946).
    pub(crate) fn fragments(&self, rng: &mut Rng) -> Vec<Vec<u8>> {
        let tcp = self.tcp();
        let id = rng.u32(..);
        let at = 8 * rng.usize(1..=tcp.len() / 8);
        let (first, second) = tcp.split_at(if at < tcp.len() { at } else { 8 });
        let offset = u16::try_from(first.len() / 8).unwrap_or(1);
        if self.source.is_ipv4() {
            const MORE: u16 = 0x2000;
            let id = u16::try_from(id & 0xFFFF).unwrap_or(0);
            let extra = if rng.bool() { Extra::Extension } else { Extra::None };
            return vec![self.ipv4(self.extra, id, MORE, first), self.ipv4(extra, id, offset, second)];
        }
        let fragment = |offset: u16, more: u16, bytes: &[u8]| {
            let place = (offset << 3) | more;
            let header = [&[TCP, 0][..], &place.to_be_bytes(), &id.to_be_bytes(), bytes].concat();
            self.ipv6(44, &header)
        };
        if rng.bool() {
            return vec![fragment(0, 0, &tcp)];
        }
        vec![fragment(0, 1, first), fragment(offset, 0, second)]
    }

    fn tcp(&self) -> Vec<u8> {
        let words = u8::try_from(5 + self.options.len() / 4).unwrap_or(5);
        let mut tcp = Vec::new();
        tcp.extend(self.source.port().to_be_bytes());
        tcp.extend(self.destination.port().to_be_bytes());
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend(self.acknowledgement.to_be_bytes());
        tcp.extend([words << 4, self.flags, 0xFA, 0xF0, 0, 0]);
        tcp.extend(self.urgent.to_be_bytes());
        tcp.extend(&self.options);
        tcp.extend(&self.payload);
        let len = u32::try_from(tcp.len()).unwrap_or(0).to_be_bytes();
        let ends = [octets(self.source.ip()), octets(self.destination.ip())].concat();
        let sum = checksum(&[&ends[..], &len, &[0, 0, 0, TCP], &tcp].concat());
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        tcp
    }

    fn ipv4(&self, extra: Extra, id: u16, place: u16, payload: &[u8]) -> Vec<u8> {
        // NOPs, and the end of the list.
        let options: &[u8] = if extra == Extra::Extension { &[1, 1, 1, 0] } else { &[] };
        let words = 5 + options.len() / 4;
        let total = u16::try_from(words * 4 + payload.len()).unwrap_or(0);
        let mut ip = vec![0x40 | u8::try_from(words).unwrap_or(5), 0];
        ip.extend(total.to_be_bytes());
        ip.extend(id.to_be_bytes());
        ip.extend(place.to_be_bytes());
        ip.extend([self.hops, TCP, 0, 0]);
        ip.extend(octets(self.source.ip()));
        ip.extend(octets(self.destination.ip()));
        ip.extend(options);
        let sum = checksum(&ip).to_be_bytes();
        ip[10..12].copy_from_slice(&sum);
        self.frame(&[&ip[..], payload].concat())
    }

    fn ipv6(&self, next: u8, payload: &[u8]) -> Vec<u8> {
        let len = u16::try_from(payload.len()).unwrap_or(0);
        let mut ip = vec![0x60, 0, 0, 0];
        ip.extend(len.to_be_bytes());
        ip.extend([next, self.hops]);
        ip.extend(octets(self.source.ip()));
        ip.extend(octets(self.destination.ip()));
        self.frame(&[&ip[..], payload].concat())
    }

    fn frame(&self, packet: &[u8]) -> Vec<u8> {
        [&self.link[..], packet, &vec![0xEE; self.padding]].concat()
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The Internet checksum, RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// A header that names another client, as long as the injector's own.
pub(crate) fn forged_header(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let mut header = vec![0; 64];
    let len = v2::encode(&Command::Proxy(Addresses::new(source, destination)), &[], &mut header).unwrap_or(0);
    header.truncate(len);
    header
}
