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

use std::sync::{Arc, Mutex, PoisonError};

use injector_testbed::netns::{self, Family};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use testbed::Testbed;
use wire::Layer;
use wire_testbed::WireTestbed;

fn main() {
    let mut arguments = Arguments::from_args();
    // Trials share addresses.
    arguments.test_threads.get_or_insert(1);
    let shared = Arc::new(Mutex::new(Shared::default()));
    let mut trials = Vec::new();
    for family in Family::ALL {
        for (name, run) in basics::TRIALS
            .iter()
            .chain(lifecycle::TRIALS)
            .chain(attachment::TRIALS)
            .chain(offloads::TRIALS)
            .chain(first_bytes::ON_DEVICES)
        {
            trials.push(trial(&shared, format!("inline/{}/{name}", family.name()), move |shared| {
                run(&*shared.testbed()?, family)
            }));
        }
        for (area, of_area) in [
            ("accelerator", accelerator::TRIALS),
            ("accelerator", source_ports::TRIALS),
            ("accelerator", source_limits::TRIALS),
            ("reload", reload::TRIALS),
            ("timeouts", timeouts::EACH),
        ] {
            for (name, run) in of_area {
                let name = format!("{area}/{}/{name}", family.name());
                trials.push(trial(&shared, name, move |shared| run(&*shared.testbed()?, family)));
            }
        }
    }
    for (name, run) in accelerator::SLOW_TRIALS {
        let name = format!("accelerator/ipv4/{name}");
        trials.push(trial(&shared, name, |shared| run(&*shared.testbed()?, Family::V4)));
    }
    let (name, run) = source_limits::ABANDONED;
    let name = format!("accelerator/ipv4/{name}");
    trials.push(trial(&shared, name, move |shared| run(&*shared.testbed()?, Family::V4)));
    for (name, run) in source_limits::SLOW_TRIALS {
        let name = format!("accelerator/ipv4/{name}");
        trials.push(
            trial(&shared, name, |shared| run(&*shared.testbed()?, Family::V4)).with_ignored_flag(true),
        );
    }
    for (name, run) in timeouts::TRIALS {
        trials.push(trial(&shared, format!("timeouts/{name}"), |shared| run(&*shared.testbed()?)));
    }
    for (area, of_area) in [("topology", topology::TRIALS), ("edges", edges::TRIALS)] {
        for (name, run) in of_area {
            trials.push(trial(&shared, format!("{area}/{name}"), |_| run()));
        }
    }
    let areas = [
        ("losses", losses::TRIALS),
        ("identity", identity::TRIALS),
        ("identity", cookies::TRIALS),
        ("packets", packets::TRIALS),
        ("tcp", tcp::TRIALS),
        ("first bytes", first_bytes::TRIALS),
    ];
    for (area, of_area) in areas {
        for (family, (name, run)) in each(of_area) {
            let name = format!("{area}/{}/{name}", family.name());
            trials.push(trial(&shared, name, move |shared| {
                on_wire(shared.wire_testbed(Layer::Ethernet)?, family, run)
            }));
        }
    }
    for (times, slow) in [(2, false), (5, true)] {
        let name = format!("losses/header lost {times} times, server first");
        let run = move |shared: &mut Shared| {
            losses::header_lost_server_first(shared.wire_testbed(Layer::Ethernet)?, times)
        };
        trials.push(trial(&shared, name, run).with_ignored_flag(slow));
    }
    trials.extend(arbitrary(&shared, "identity", Layer::Ethernet, 1600));
    // Different programs, for packets that begin with the IP header.
    for (family, (name, run)) in areas.into_iter().flat_map(|(_, of_area)| each(of_area)) {
        if HEADERLESS.contains(&name) {
            let name = format!("headerless/{}/{name}", family.name());
            trials.push(trial(&shared, name, move |shared| {
                on_wire(shared.wire_testbed(Layer::Ip)?, family, run)
            }));
        }
    }
    trials.extend(arbitrary(&shared, "headerless", Layer::Ip, 448));
    for family in Family::ALL {
        let name = format!("inline/{}/survives/daemon killed and upgraded during 2 GiB", family.name());
        let run =
            move |shared: &mut Shared| lifecycle::killed_and_upgraded(&*shared.testbed()?, family, 2 << 30);
        trials.push(trial(&shared, name, run).with_ignored_flag(true));
        let name = format!("tcp/{}/more than 5 GiB each way", family.name());
        let run = move |shared: &mut Shared| tcp::five_gibibytes(&*shared.testbed()?, family);
        trials.push(trial(&shared, name, run).with_ignored_flag(true));
        let name = format!("tcp/{}/more than 5 GiB each way, offloads off", family.name());
        let run = move |shared: &mut Shared| offloads::five_gibibytes(&*shared.testbed()?, family);
        trials.push(trial(&shared, name, run).with_ignored_flag(true));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(shared);
    conclusion.exit();
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
fn on_wire(testbed: &WireTestbed, family: Family, run: WireRun) -> anyhow::Result<()> {
    checked(testbed, run(testbed, family))
}

fn checked(testbed: &WireTestbed, outcome: anyhow::Result<()>) -> anyhow::Result<()> {
    outcome.and_then(|()| testbed.wire.sums().map(drop)).map_err(|error| {
        let events = site::events(&testbed.injector).unwrap_or_default();
        error.context(format!("last packets:\n{}\nevents: {events}\n", testbed.wire.trace()))
    })
}

/// Arbitrary segments of a number of clients, for both families.
fn arbitrary(shared: &Arc<Mutex<Shared>>, area: &str, layer: Layer, clients: usize) -> [Trial; 2] {
    Family::ALL.map(|family| {
        let name = format!("{area}/{}/arbitrary segments of {clients} clients", family.name());
        trial(shared, name, move |shared| {
            let testbed = shared.wire_testbed(layer)?;
            checked(testbed, arbitrary::segments(testbed, family, clients))
        })
    })
}

/// What trials share, created when first needed.
#[derive(Default)]
struct Shared {
    // Dropped in this order.
    wire_testbed: Option<WireTestbed>,
    testbed: Option<Arc<Testbed>>,
}

impl Shared {
    fn testbed(&mut self) -> anyhow::Result<Arc<Testbed>> {
        let testbed = match &self.testbed {
            Some(testbed) => Arc::clone(testbed),
            None => Arc::new(Testbed::new()?),
        };
        self.testbed = Some(Arc::clone(&testbed));
        Ok(testbed)
    }

    fn wire_testbed(&mut self, layer: Layer) -> anyhow::Result<&WireTestbed> {
        let testbed = self.testbed()?;
        if self.wire_testbed.as_ref().is_none_or(|testbed| testbed.layer != layer) {
            // The namespaces have the same names.
            self.wire_testbed = None;
            self.wire_testbed = Some(WireTestbed::new(&testbed.bpffs, layer)?);
        }
        self.wire_testbed.as_ref().ok_or_else(|| anyhow::anyhow!("just made"))
    }
}

fn trial(
    shared: &Arc<Mutex<Shared>>,
    name: String,
    run: impl Fn(&mut Shared) -> anyhow::Result<()> + Send + 'static,
) -> Trial {
    let shared = Arc::clone(shared);
    Trial::ignorable_test(name, move || {
        if let Some(reason) = netns::unavailable() {
            return Ok(Completion::ignored_with(reason));
        }
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        match run(&mut shared) {
            Ok(()) => Ok(Completion::Completed),
            Err(error) => Err(Failed::from(format!("{error:#}"))),
        }
    })
}
