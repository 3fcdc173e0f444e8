//! Runs the guard's real programs over packets, by `BPF_PROG_TEST_RUN`, with maps of their own: nothing is
//! attached or pinned.
//!
//! Every check runs for IPv4 and IPv6, at the ingress of a device and at its driver.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Instant,
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions, Xdp},
};
use injector_common::guard::{Ban, Counter, packet::MAX_EXTENSIONS};

use super::{maps::Maps, programs};
use crate::{
    config::Network,
    engine::{
        bans::{BanChange, BanMaps as _},
        bpf::{chain, reports},
        check::{Check, ProgramReport},
    },
    os::clock,
};

/// How many bans the maps have room for.
const ROOM: u32 = 64;

/// The port of the listener.
const PORT: u16 = 25;

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hook {
    Ingress,
    /// On a device without Ethernet header.
    RawIngress,
    Driver,
}

const HOOKS: [Hook; 3] = [Hook::Ingress, Hook::RawIngress, Hook::Driver];

type Test = fn(&Case<'_>) -> Result<(), String>;

/// Runs all checks, and returns them with the verifier's cost of the programs.
#[must_use]
pub fn run() -> (Vec<Check>, Vec<ProgramReport>) {
    let start = Instant::now();
    let mut loader = EbpfLoader::new();
    loader.map_max_entries("BANNED_ADDRESSES", ROOM).map_max_entries("BANNED_NETWORKS", ROOM);
    loader.override_global("SELF_TEST", &1_u32, true);
    let (programs, maps) = match programs::load_with(&mut loader) {
        Ok(loaded) => loaded,
        Err(error) => {
            let result = Err(error.to_string());
            return (vec![Check { name: "load", result, took: start.elapsed() }], Vec::new());
        }
    };
    let seen = "programs verified, maps created".to_owned();
    let mut checks = vec![Check { name: "load", result: Ok(seen), took: start.elapsed() }];
    let tests: [(&'static str, Test, &str); 6] = [
        ("banned_dropped", banned_dropped, "packets of banned addresses and networks, for a listener"),
        ("others_pass", others_pass, "other sources, other ports and other protocols"),
        ("allowed_passes", allowed_passes, "what is allowed, although it is banned as well"),
        ("later_bans", later_bans, "bans of sources whose packets have passed before"),
        ("bans_end", bans_end, "at their time, and when they are lifted"),
        (
            "no_way_around",
            no_way_around,
            "fragments, options and extension headers do not help a banned source",
        ),
    ];
    for (name, test, seen) in tests {
        let start = Instant::now();
        let result = for_each(&programs, &maps, test).map(|()| seen.to_owned());
        checks.push(Check { name, result, took: start.elapsed() });
    }
    (checks, reports(&programs))
}

fn for_each(programs: &Ebpf, maps: &Maps, test: Test) -> Result<(), String> {
    for ipv6 in [false, true] {
        for hook in HOOKS {
            let case = Case { programs, maps, ipv6, hook };
            case.begin()?;
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            test(&case).map_err(|fault| format!("{family}, {hook:?}: {fault}"))?;
        }
    }
    Ok(())
}

/// The programs, the family of the packets, and the hook.
struct Case<'a> {
    programs: &'a Ebpf,
    maps: &'a Maps,
    ipv6: bool,
    hook: Hook,
}

/// A packet's content.
#[derive(Clone, Copy, Debug)]
struct Packet {
    port: u16,
    protocol: u8,
    /// Only of IPv4: words of options; and the field with flags and offset of a fragment.
    options: u8,
    fragment: u16,
    /// Only of IPv6: kinds and first four bytes of extension headers of eight bytes.
    extensions: &'static [(u8, [u8; 4])],
    /// How many bytes are missing at its end.
    missing: usize,
    /// The protocols of its VLAN tags.
    tags: &'static [u16],
    /// The Ethernet address that it is sent to.
    to: [u8; 6],
}

const SEGMENT: Packet = Packet {
    port: PORT,
    protocol: TCP,
    options: 0,
    fragment: 0,
    extensions: &[],
    missing: 0,
    tags: &[],
    to: OWN,
};

/// The device of a test run is the loopback device.
const DEVICE: u32 = 1;
const OWN: [u8; 6] = [0; 6];
const ANOTHER: [u8; 6] = [2, 0, 0, 0, 0, 1];

const TCP: u8 = 6;
const UDP: u8 = 17;

impl Case<'_> {
    /// One listener, and no bans.
    fn begin(&self) -> Result<(), String> {
        let text = |error: anyhow::Error| format!("{error:#}");
        let mut removed = Vec::new();
        self.maps.read(&mut |network, _| removed.push(BanChange::Remove(network))).map_err(text)?;
        self.maps.write(&removed).map_err(text)?;
        self.allow(&[])?;
        self.maps.set_device(DEVICE, OWN).map_err(|error| error.to_string())?;
        self.maps.set_guarded(&[SocketAddr::new(self.listener(), PORT)]).map_err(text)
    }

    /// The banned source. Without Ethernet header, the kernel of a test run takes bytes of it for the Ethernet
    /// type.
    fn source(&self) -> IpAddr {
        if self.ipv6 {
            Ipv6Addr::new(0x2001, 0xdb8, 0x86DD, 7, 0, 0, 0, 1).into()
        } else {
            Ipv4Addr::new(8, 0, 7, 1).into()
        }
    }

    /// Another one with the same first bits.
    fn neighbour(&self) -> IpAddr {
        match self.source() {
            IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() + 1).into(),
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() + 1).into(),
        }
    }

    fn listener(&self) -> IpAddr {
        if self.ipv6 {
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 25).into()
        } else {
            Ipv4Addr::new(192, 0, 2, 25).into()
        }
    }

    /// The source's network with all, or with fewer bits.
    fn network(&self, less: u8) -> Result<Network, String> {
        let prefix = if self.ipv6 { 128 } else { 32 } - less;
        let masked = match self.source() {
            IpAddr::V4(address) => IpAddr::V4((address.to_bits() >> less << less).into()),
            IpAddr::V6(address) => IpAddr::V6((address.to_bits() >> less << less).into()),
        };
        format!("{masked}/{prefix}").parse()
    }

    fn ban(&self, network: Network, until_ns: u64) -> Result<(), String> {
        let ban = Ban { until_ns, ..Ban::default() };
        self.maps.write(&[BanChange::Set(network, ban)]).map_err(|error| format!("{error:#}"))
    }

    fn lift(&self, network: Network) -> Result<(), String> {
        self.maps.write(&[BanChange::Remove(network)]).map_err(|error| format!("{error:#}"))
    }

    fn allow(&self, networks: &[Network]) -> Result<(), String> {
        self.maps.set_allowed(networks).map_err(|error| format!("{error:#}"))
    }

    /// Checks whether a packet of this source is dropped, and counted if so.
    fn expect(&self, what: &str, source: IpAddr, packet: Packet, dropped: bool) -> Result<(), String> {
        /// `TC_ACT_UNSPEC` and `TC_ACT_SHOT`; `XDP_PASS` and `XDP_DROP`.
        const INGRESS: [u32; 2] = [u32::MAX, 2];
        const DRIVER: [u32; 2] = [2, 1];

        let (verdicts, counter) =
            if self.hook == Hook::Driver { (DRIVER, Counter::Xdp) } else { (INGRESS, Counter::Tc) };
        let before = self.maps.dropped(counter);
        let verdict = self.run(&self.bytes(source, packet)).map_err(|error| chain(&error))?;
        let counted = self.maps.dropped(counter) - before;
        if verdict != verdicts[usize::from(dropped)] || counted != u64::from(dropped) {
            let verdict = verdict.cast_signed();
            return Err(format!(
                "{what} got verdict {verdict}, and {counted} packets were counted as dropped"
            ));
        }
        Ok(())
    }

    fn run(&self, packet: &[u8]) -> Result<u32, ProgramError> {
        let options = TestRunOptions { data_in: Some(packet), ..TestRunOptions::default() };
        let program = |name| self.programs.program(name).ok_or(ProgramError::NotLoaded);
        let ran = match self.hook {
            Hook::Driver => <&Xdp>::try_from(program(programs::XDP)?)?.test_run(options)?,
            Hook::Ingress => <&SchedClassifier>::try_from(program("guard")?)?.test_run(options)?,
            Hook::RawIngress => <&SchedClassifier>::try_from(program("guard_raw")?)?.test_run(options)?,
        };
        Ok(ran.return_value)
    }

    fn bytes(&self, source: IpAddr, packet: Packet) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.hook != Hook::RawIngress {
            bytes.extend(packet.to);
            bytes.extend(OWN);
            for protocol in packet.tags {
                bytes.extend(protocol.to_be_bytes());
                bytes.extend([0, 7]);
            }
            bytes.extend(if self.ipv6 { [0x86, 0xDD] } else { [0x08, 0x00] });
        }
        match (source, self.listener()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                bytes.extend([0x45 + packet.options, 0, 0, 40, 0, 0]);
                bytes.extend(packet.fragment.to_be_bytes());
                bytes.extend([64, packet.protocol, 0, 0]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
                bytes.extend(vec![1; usize::from(packet.options) * 4]);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let next = packet.extensions.first().map_or(packet.protocol, |(kind, _)| *kind);
                bytes.extend([0x60, 0, 0, 0, 0, 28, next, 64]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
                for (_, header) in packet.extensions {
                    bytes.extend(header);
                    bytes.extend([0; 4]);
                }
            }
            _ => {}
        }
        bytes.extend(40_000_u16.to_be_bytes());
        bytes.extend(packet.port.to_be_bytes());
        bytes.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xFF, 0xFF, 0, 0, 0, 0]);
        bytes.truncate(bytes.len().saturating_sub(packet.missing));
        bytes
    }
}

fn banned_dropped(case: &Case<'_>) -> Result<(), String> {
    let (address, network) = (case.network(0)?, case.network(8)?);
    case.ban(address, Ban::FOREVER)?;
    case.expect("a banned address", case.source(), SEGMENT, true)?;
    case.expect("its neighbour", case.neighbour(), SEGMENT, false)?;
    case.lift(address)?;
    case.ban(network, Ban::FOREVER)?;
    case.expect("an address of a banned network", case.neighbour(), SEGMENT, true)?;
    if case.hook == Hook::Driver {
        // IEEE 802.1Q and 802.1ad.
        const TAGS: [u16; 2] = [0x8100, 0x88A8];
        for (tags, read) in [
            (&TAGS[..1], true),
            (&TAGS[1..], true),
            (&[TAGS[1], TAGS[0]], true),
            (&[TAGS[0], TAGS[0]], true),
            (&[TAGS[1], TAGS[0], TAGS[0]], false),
        ] {
            case.expect(&format!("VLANs {tags:x?}"), case.source(), Packet { tags, ..SEGMENT }, read)?;
        }
    }
    // Of networks one inside the other, the smallest alone decides.
    case.ban(case.network(4)?, 1)?;
    case.expect("the smallest of two networks, whose ban is over", case.source(), SEGMENT, false)
}

fn others_pass(case: &Case<'_>) -> Result<(), String> {
    case.ban(case.network(0)?, Ban::FOREVER)?;
    case.ban(case.network(8)?, Ban::FOREVER)?;
    case.expect("another port", case.source(), Packet { port: PORT + 1, ..SEGMENT }, false)?;
    case.expect("UDP", case.source(), Packet { protocol: UDP, ..SEGMENT }, false)?;
    if case.hook != Hook::RawIngress {
        // A container's, or a virtual machine's.
        case.expect("a frame for another device", case.source(), Packet { to: ANOTHER, ..SEGMENT }, false)?;
    }
    let far = if case.ipv6 {
        IpAddr::from(Ipv6Addr::new(0x2001, 0xdb8, 0x86DD, 8, 0, 0, 0, 1))
    } else {
        IpAddr::from(Ipv4Addr::new(8, 0, 9, 1))
    };
    case.expect("another source", far, SEGMENT, false)
}

fn allowed_passes(case: &Case<'_>) -> Result<(), String> {
    case.ban(case.network(0)?, Ban::FOREVER)?;
    case.ban(case.network(8)?, Ban::FOREVER)?;
    case.allow(&[case.network(2)?])?;
    case.expect("an allowed source", case.source(), SEGMENT, false)?;
    case.allow(&[])?;
    case.expect("a source that is not allowed any more", case.source(), SEGMENT, true)
}

/// The programs remember which sources they have looked up.
fn later_bans(case: &Case<'_>) -> Result<(), String> {
    let (address, network) = (case.network(0)?, case.network(8)?);
    // An address and a network are banned all the time: that there are any is no news then.
    for prefix in [128, if case.ipv6 { 64 } else { 24 }] {
        case.ban(Network::around(case.listener(), prefix), Ban::FOREVER)?;
    }
    for _ in 0..3 {
        for banned in [address, network] {
            for _ in 0..2 {
                case.expect("a source without a ban", case.source(), SEGMENT, false)?;
            }
            case.ban(banned, Ban::FOREVER)?;
            case.expect("a source that is banned now", case.source(), SEGMENT, true)?;
            case.allow(&[network])?;
            case.expect("a source that is allowed now", case.source(), SEGMENT, false)?;
            case.allow(&[])?;
            case.expect("a source that is not allowed any more", case.source(), SEGMENT, true)?;
            case.lift(banned)?;
        }
    }
    // There is no room for all, and an error: those that were written are in force.
    case.expect("a source without a ban", case.source(), SEGMENT, false)?;
    let ban = Ban { until_ns: Ban::FOREVER, ..Ban::default() };
    let others = (0..2 * ROOM).map(|number| Network::around(Ipv4Addr::from_bits(number << 8).into(), 24));
    let changes: Vec<_> =
        [address].into_iter().chain(others).map(|network| BanChange::Set(network, ban)).collect();
    if case.maps.write(&changes).is_ok() {
        return Err(format!("{} bans fitted into a map for {ROOM}", changes.len()));
    }
    case.expect("a source that was banned before an error", case.source(), SEGMENT, true)
}

fn bans_end(case: &Case<'_>) -> Result<(), String> {
    let now = clock::boottime_ns();
    for network in [case.network(0)?, case.network(8)?] {
        case.ban(network, now.saturating_sub(1))?;
        case.expect("a ban that is over", case.source(), SEGMENT, false)?;
        case.ban(network, now + 3_600_000_000_000)?;
        case.expect("a ban of an hour", case.source(), SEGMENT, true)?;
        case.lift(network)?;
        case.expect("a ban that was lifted", case.source(), SEGMENT, false)?;
    }
    Ok(())
}

fn no_way_around(case: &Case<'_>) -> Result<(), String> {
    case.ban(case.network(0)?, Ban::FOREVER)?;
    // What is not in one piece is left to the program at the ingress.
    let read = case.hook != Hook::Driver;
    if case.ipv6 {
        let extended = |extensions| Packet { extensions, ..SEGMENT };
        case.expect("TCP behind options", case.source(), extended(&[(60, [TCP, 0, 1, 4])]), read)?;
        case.expect("a first fragment", case.source(), extended(&[(44, [TCP, 0, 0, 1])]), read)?;
        case.expect("a later fragment", case.source(), extended(&[(44, [TCP, 0, 0, 8])]), read)?;
        case.expect("a fragment of UDP", case.source(), extended(&[(44, [UDP, 0, 0, 8])]), false)?;
        let many = extended(&[(60, [60, 0, 1, 4]); MAX_EXTENSIONS as usize + 1]);
        case.expect("more extension headers than are read", case.source(), many, read)?;
        // Headers of 2,048 bytes, which the packet does not have.
        case.expect("TCP beyond the end", case.source(), extended(&[(60, [TCP, 255, 1, 4])]), read)?;
        case.expect("a header beyond the end", case.source(), extended(&[(60, [60, 255, 1, 4])]), read)
    } else {
        case.expect("TCP behind options", case.source(), Packet { options: 1, ..SEGMENT }, read)?;
        let short = Packet { options: 10, missing: 40, ..SEGMENT };
        case.expect("TCP beyond the end", case.source(), short, read)?;
        case.expect("a first fragment", case.source(), Packet { fragment: 0x2000, ..SEGMENT }, true)?;
        case.expect("a later fragment", case.source(), Packet { fragment: 8, port: 99, ..SEGMENT }, true)?;
        let udp = Packet { fragment: 8, protocol: UDP, ..SEGMENT };
        case.expect("a fragment of UDP", case.source(), udp, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs root"]
    fn the_programs_pass_their_self_test() {
        let (checks, programs) = run();
        for check in checks {
            assert!(check.result.is_ok(), "{}: {:?}", check.name, check.result);
        }
        assert_eq!(programs.len(), 3);
    }

    /// `cargo test -p injector-user --lib guard::selftest -- --ignored --nocapture`
    #[test]
    #[ignore = "measures, and needs root"]
    fn a_hundred_thousand_bans_are_written_within_two_seconds() {
        const COUNT: u32 = 100_000;
        let mut loader = EbpfLoader::new();
        loader.map_max_entries("BANNED_ADDRESSES", COUNT).map_max_entries("BANNED_NETWORKS", COUNT);
        let (_programs, maps) = programs::load_with(&mut loader).unwrap();
        for prefix in [32, 28] {
            let network = |number: u32| {
                let address = Ipv4Addr::from_bits(0x0A00_0000 + (number << (32 - prefix)));
                format!("{address}/{prefix}").parse().unwrap()
            };
            let ban = Ban { until_ns: Ban::FOREVER, ..Ban::default() };
            let changes: Vec<_> = (0..COUNT).map(|number| BanChange::Set(network(number), ban)).collect();
            let start = Instant::now();
            maps.write(&changes).unwrap();
            let took = start.elapsed();
            println!("{COUNT} bans of /{prefix}: {took:.2?}");
            assert!(took < std::time::Duration::from_secs(2), "{took:?}");
            // One more does not fit, and says what to do.
            let error = maps.write(&[BanChange::Set(network(COUNT), ban)]).unwrap_err();
            assert!(format!("{error:#}").contains("guard.max_bans"), "{error:#}");
        }
        let mut read = 0;
        maps.read(&mut |_, _| read += 1).unwrap();
        assert_eq!(read, 200_000);
    }
}
