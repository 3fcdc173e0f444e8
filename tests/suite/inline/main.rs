//! The inline engine, packet by packet: real TCP on both sides, and faults that hit single packets.
//!
//! Slow trials run only on request: `cargo test -p injector-suite --test inline -- --ignored`, as
//! root.

mod accelerator;
mod arbitrary;
mod attachment;
mod basics;
mod cookies;
mod edges;
mod first_bytes;
mod frame;
mod identity;
mod lifecycle;
mod losses;
mod offloads;
mod packets;
mod reload;
mod replaced;
mod site;
mod source_limits;
mod source_ports;
mod tap;
mod tcp;
mod testbed;
mod timeouts;
mod topology;
mod wire;
mod wire_testbed;

use std::process::ExitCode;

use injector_testbed::group::{self, Group};
use injector_testbed::netns::Family;
use libtest_mimic::Trial;

use testbed::Testbed;
use wire::Layer;
use wire_testbed::WireTestbed;

fn main() -> ExitCode {
    group::run(
        vec![on_ethernet(), without_headers(), as_client()],
        vec![of_family(Family::V4), of_family(Family::V6), timeouts(), topologies()],
    )
}

/// Plain sockets on both sides, for one address family.
fn of_family(family: Family) -> Vec<Trial> {
    let group = Group::new(family.name(), Testbed::new);
    let each = |area: &str, name: &str, run: Run| {
        group.trial(format!("{area}/{}/{name}", family.name()), move |testbed| run(testbed, family))
    };
    let areas = [
        ("inline", basics::TRIALS),
        ("inline", lifecycle::TRIALS),
        ("inline", attachment::TRIALS),
        ("inline", offloads::TRIALS),
        ("inline", first_bytes::ON_DEVICES),
        ("accelerator", accelerator::TRIALS),
        ("accelerator", source_ports::TRIALS),
        ("accelerator", source_limits::TRIALS),
        ("reload", reload::TRIALS),
    ];
    let of_area = areas.into_iter().flat_map(|(area, trials)| trials.iter().map(move |trial| (area, *trial)));
    let mut trials: Vec<_> = of_area.map(|(area, (name, run))| each(area, name, run)).collect();
    if family == Family::V4 {
        let slow = accelerator::SLOW_TRIALS.iter().chain([&source_limits::ABANDONED]);
        trials.extend(slow.map(|(name, run)| each("accelerator", name, *run)));
        let slower = source_limits::SLOW_TRIALS.iter();
        trials.extend(slower.map(|(name, run)| each("accelerator", name, *run).with_ignored_flag(true)));
    }
    let on_request: [(&str, &str, Run); 3] = [
        ("inline", "survives/daemon killed and upgraded during 2 GiB", |testbed, family| {
            lifecycle::killed_and_upgraded(testbed, family, 2 << 30)
        }),
        ("tcp", "more than 5 GiB each way", tcp::five_gibibytes),
        ("tcp", "more than 5 GiB each way, offloads off", offloads::five_gibibytes),
    ];
    trials.extend(on_request.map(|(area, name, run)| each(area, name, run).with_ignored_flag(true)));
    trials
}

fn timeouts() -> Vec<Trial> {
    let group = Group::new("timeouts", Testbed::new);
    let mut trials: Vec<_> =
        timeouts::TRIALS.iter().map(|(name, run)| group.trial(format!("timeouts/{name}"), run)).collect();
    for family in Family::ALL {
        trials.extend(timeouts::EACH.iter().map(|(name, run)| {
            let name = format!("timeouts/{}/{name}", family.name());
            group.trial(name, move |testbed| run(testbed, family))
        }));
    }
    trials
}

/// Each trial has namespaces of its own, whose names others have as well.
fn topologies() -> Vec<Trial> {
    let group = Group::new("topology", |_| Ok(()));
    let of_area = |(area, trials): (&'static str, &'static [(&str, SiteRun)])| {
        let group = &group;
        trials.iter().map(move |(name, run)| group.trial(format!("{area}/{name}"), move |()| run()))
    };
    [("topology", topology::TRIALS), ("edges", edges::TRIALS)].into_iter().flat_map(of_area).collect()
}

/// Trials with links that the test controls.
const ON_WIRE: [(&str, &[(&str, WireRun)]); 7] = [
    ("losses", losses::TRIALS),
    ("identity", identity::TRIALS),
    ("identity", cookies::TRIALS),
    ("identity", replaced::TRIALS),
    ("packets", packets::TRIALS),
    ("tcp", tcp::TRIALS),
    ("first bytes", first_bytes::TRIALS),
];

fn on_ethernet() -> Vec<Trial> {
    let group = Group::new("ethernet", |group| WireTestbed::new(group, Layer::Ethernet));
    let mut trials = Vec::new();
    for (area, of_area) in ON_WIRE {
        for (family, (name, run)) in each(of_area) {
            trials.push(on_wire(&group, format!("{area}/{}/{name}", family.name()), family, run));
        }
    }
    for (times, slow) in [(2, false), (5, true)] {
        let name = format!("losses/header lost {times} times, server first");
        let run = move |testbed: &WireTestbed| losses::header_lost_server_first(testbed, times);
        trials.push(group.trial(name, run).with_ignored_flag(slow));
    }
    trials.extend(arbitrary(&group, "identity", 1600));
    trials
}

/// Different programs, for packets that begin with the IP header.
fn without_headers() -> Vec<Trial> {
    let group = Group::new("headerless", |group| WireTestbed::new(group, Layer::Ip));
    let of_all = ON_WIRE.into_iter().flat_map(|(_, of_area)| each(of_area));
    let chosen = of_all.filter(|(_, (name, _))| HEADERLESS.contains(name));
    let trial = |(family, (name, run)): (Family, (&str, WireRun))| {
        on_wire(&group, format!("headerless/{}/{name}", family.name()), family, run)
    };
    let mut trials: Vec<_> = chosen.map(trial).collect();
    trials.extend(arbitrary(&group, "headerless", 448));
    trials
}

/// Connections to backends come from the client's own address and port.
fn as_client() -> Vec<Trial> {
    let group =
        Group::new("as-client", |group| WireTestbed::with(group, Layer::Ethernet, "source = \"client\""));
    let trial = |(family, (name, run)): (Family, (&str, WireRun))| {
        on_wire(&group, format!("identity/{}/{name}", family.name()), family, run)
    };
    each(replaced::AS_CLIENT).map(trial).collect()
}

/// A trial for an address family.
type Run = fn(&Testbed, Family) -> anyhow::Result<()>;
/// A trial for both families at once.
type BothRun = fn(&Testbed) -> anyhow::Result<()>;
/// A trial with namespaces of its own.
type SiteRun = fn() -> anyhow::Result<()>;
/// A trial for an address family, with links that the test controls.
type WireRun = fn(&WireTestbed, Family) -> anyhow::Result<()>;

/// Every trial for both families.
fn each(
    trials: &'static [(&'static str, WireRun)],
) -> impl Iterator<Item = (Family, (&'static str, WireRun))> {
    Family::ALL.into_iter().flat_map(move |family| trials.iter().map(move |trial| (family, *trial)))
}

/// Trials that also run on devices without a link-layer header: every path through the programs.
const HEADERLESS: &[&str] = &[
    "header lost once, client first",
    "everything twice",
    "everything reordered",
    "forged SYNs with the client's sequence number and port",
    "a SYN past the public address is dropped",
    "without timestamps",
    "losses in mid-stream, SACK blocks are valid",
    "reset by the backend",
    "refused by the backend",
    "path MTU discovery behind the edge",
    "path MTU discovery in front of the client",
    "a packet too long for the backend's link",
    "a packet too long for the client's link",
    "fragments and extension headers go to other ports alone",
    "sequence numbers wrap around, header lost",
    "one packet with the header",
    "a full packet, header sent ahead",
    "urgent data",
];

/// Every packet's checksums must be correct, and a failure includes the last packets and the counters.
fn on_wire(
    group: &Group<WireTestbed>,
    name: String,
    family: Family,
    run: impl FnOnce(&WireTestbed, Family) -> anyhow::Result<()> + Send + 'static,
) -> Trial {
    group.trial(name, move |testbed| {
        let outcome = run(testbed, family).and_then(|()| testbed.wire.sums().map(drop));
        outcome.map_err(|error| {
            let events = site::events(&testbed.injector).unwrap_or_default();
            error.context(format!("last packets:\n{}\nevents: {events}\n", testbed.wire.trace()))
        })
    })
}

/// Arbitrary segments of a number of clients, for both families.
fn arbitrary(group: &Group<WireTestbed>, area: &str, clients: usize) -> [Trial; 2] {
    Family::ALL.map(|family| {
        let name = format!("{area}/{}/arbitrary segments of {clients} clients", family.name());
        let run = move |testbed: &WireTestbed, family| arbitrary::segments(testbed, family, clients);
        on_wire(group, name, family, run)
    })
}
