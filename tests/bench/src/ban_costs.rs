//! What bans cost: the time until all of a list are in force, the memory that they take, and the
//! time per packet in the daemon's own programs, by `BPF_PROG_TEST_RUN`.

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use etherparse::PacketBuilder;
use injector_load::service::SHORT;
use injector_testbed::bpf::{DaemonMap, Program, map_memory};
use injector_testbed::bpffs::BpfFs;
use injector_testbed::daemon::{GUARD_BANS, Injector};
use injector_testbed::netns::{CLIENT, Netns, VIP_RELAY, scratch_dir};
use injector_testbed::resource_usage::{Memory, peak_memory};

use super::bans;
use super::report::table::align;
use super::report::{digits, whole};
use super::stats::Spread;
use super::testbed::{Testbed, mail};

/// How many bans are measured unless the caller says so, as arguments.
pub const COUNTS: [&str; 4] = ["0", "1000", "100000", "1000000"];

/// How long the daemon may take until all bans are in force.
const LIMIT: Duration = Duration::from_secs(120);

/// After this, the allocator has given back what loading has used.
const SETTLE: Duration = Duration::from_secs(4);

/// Runs of a program for one time, in one system call, and how often that is repeated; the median
/// counts.
const RUNS: u32 = 200_000;
const REPEATS: usize = 5;

/// The programs, by the names that the kernel knows them by.
const PROGRAMS: [&str; 2] = [INGRESS, DRIVER];
const INGRESS: &str = "guard";
const DRIVER: &str = "guard_xdp";

/// How many bans are tried to see whether all are in force.
const SAMPLE: u32 = 500;

/// What this many bans cost.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct BanCost {
    /// Addresses and networks in the list.
    pub bans: u32,
    /// Seconds from the start of the daemon until all are in force.
    pub seconds: f64,
    /// Memory of the daemon once it has loaded them (`VmRSS`), in bytes.
    pub daemon: u64,
    /// The most memory that it had until then (`VmHWM`), in bytes.
    pub peak: u64,
    /// Memory of its BPF maps, as the kernel reports it, in bytes.
    pub maps: u64,
    /// Time per packet.
    pub packets: Vec<PacketCost>,
}

/// What a packet costs in a program.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct PacketCost {
    /// The program's name.
    pub program: String,
    /// Whose packet.
    pub source: String,
    /// Whether the program drops it.
    pub dropped: bool,
    /// Nanoseconds.
    pub nanos: f64,
}

/// A port that no listener has: most packets are for such a port, those from backends among them.
const OTHER_PORT: u16 = 40_001;

/// Whose packets are measured, and to which port: a client without a ban, and the first banned address
/// and network of the list.
fn packets_of(count: u32) -> Vec<(&'static str, Ipv4Addr, u16)> {
    let mut packets = vec![("another port", CLIENT.v4, OTHER_PORT), ("not banned", CLIENT.v4, SHORT.port)];
    let network = bans::first(|ban| ban.contains('/').then(|| bans::address(ban)).flatten(), count);
    let address = bans::first(|ban| ban.parse().ok(), count);
    packets.extend(address.map(|address| ("a banned address", address, SHORT.port)));
    packets.extend(network.map(|address| ("in a banned network", address, SHORT.port)));
    packets
}

/// Measures each number of bans, and calls `on_cost` with each result.
///
/// # Errors
/// When the daemon does not start, its programs cannot be run, or a packet meets the wrong fate.
pub fn run(counts: &[u32], on_cost: &mut dyn FnMut(&BanCost)) -> anyhow::Result<Vec<BanCost>> {
    let measure = |count: &u32| {
        let cost = measure(*count).with_context(|| format!("{count} bans"))?;
        on_cost(&cost);
        Ok(cost)
    };
    counts.iter().map(measure).collect()
}

/// Waits until so many bans are in force for the listener at this address: the daemon has them all,
/// and the program at the ingress drops the packets of a sample.
pub(crate) fn await_in_force(
    injector: &Injector,
    edge: &Netns,
    listener: Ipv4Addr,
    count: u32,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    let mut left = bans::sample(count, SAMPLE);
    loop {
        let known = injector.metrics()?.sum(GUARD_BANS, &[]) >= f64::from(count);
        if known {
            edge.run(|| drop_in_force(injector.pid(), listener, &mut left))??;
        }
        if known && left.is_empty() {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "not all of {count} bans are in force after {LIMIT:?}; logged:\n{}",
            injector.log()
        );
        thread::sleep(Duration::from_millis(20));
    }
}

/// Removes the addresses whose packets are dropped.
fn drop_in_force(daemon: u32, listener: Ipv4Addr, left: &mut Vec<Ipv4Addr>) -> anyhow::Result<()> {
    if left.is_empty() {
        return Ok(());
    }
    let program = Program::of(daemon, INGRESS)?;
    while let Some(address) = left.last() {
        if program.test_run(&syn(*address, listener, SHORT.port)?, 1)?.answer != TC_DROP {
            break;
        }
        left.pop();
    }
    Ok(())
}

fn measure(count: u32) -> anyhow::Result<BanCost> {
    ensure!(count <= bans::MAX, "at most {} bans", bans::MAX);
    let testbed = Testbed::new()?;
    let (bpffs, lists) = (BpfFs::mount()?, scratch_dir("bans")?);
    let list = lists.path().join("deny.txt");
    fs::write(&list, bans::list(count))?;
    let begun = Instant::now();
    let injector = Injector::start(&testbed.topology.edge, &configuration(count, bpffs.path(), &list))?;
    await_in_force(&injector, &testbed.topology.edge, VIP_RELAY.v4, count)?;
    let seconds = begun.elapsed().as_secs_f64();
    thread::sleep(SETTLE);
    let (daemon, peak) = (Memory::now(injector.pid()).daemon, peak_memory(injector.pid()));
    let maps = map_memory(injector.pid())?;
    let packets = testbed.topology.edge.run(|| packets(injector.pid(), count))??;
    let (status, log) = injector.stop()?;
    ensure!(status.success(), "the injector ended with {status} and logged:\n{log}");
    Ok(BanCost { bans: count, seconds, daemon, peak, maps, packets })
}

/// In the edge's namespace, where the programs find the listener.
fn packets(daemon: u32, count: u32) -> anyhow::Result<Vec<PacketCost>> {
    let mut costs = Vec::new();
    // The frames of a test run are the loopback device's, whose address the daemon has no reason to name: XDP leaves frames
    // for others alone.
    DaemonMap::of(daemon, "GUARD_DEVICES")?.set(&LOOPBACK.to_ne_bytes(), &[0; 8])?;
    for name in PROGRAMS {
        let program = Program::of(daemon, name)?;
        for (source, address, port) in packets_of(count) {
            let packet = syn(address, VIP_RELAY.v4, port)?;
            let mut times = Vec::with_capacity(REPEATS);
            let mut answer = 0;
            for _ in 0..REPEATS {
                let ran = program.test_run(&packet, RUNS)?;
                answer = ran.answer;
                times.push(nanos(ran.duration));
            }
            let dropped = answer == if name == DRIVER { XDP_DROP } else { TC_DROP };
            ensure!(
                dropped == (address != CLIENT.v4),
                "{name} returns {answer} for a packet whose source is {source}"
            );
            let median = Spread::of(&times).map(|spread| spread.median).unwrap_or_default();
            costs.push(PacketCost { program: name.into(), source: source.into(), dropped, nanos: median });
        }
    }
    Ok(costs)
}

/// The index of the loopback device, in every network namespace.
const LOOPBACK: u32 = 1;

/// What programs return for a packet to drop: `TC_ACT_SHOT`, `XDP_DROP`.
const TC_DROP: u32 = 2;
const XDP_DROP: u32 = 1;

#[expect(clippy::cast_precision_loss, reason = "nanoseconds of less than a second")]
fn nanos(duration: Duration) -> f64 {
    duration.as_nanos() as f64
}

fn syn(source: Ipv4Addr, listener: Ipv4Addr, port: u16) -> anyhow::Result<Vec<u8>> {
    /// The loopback device's.
    const TO: [u8; 6] = [0; 6];
    const FROM: [u8; 6] = [2, 0, 0, 0, 0, 1];
    let builder = PacketBuilder::ethernet2(FROM, TO)
        .ipv4(source.octets(), listener.octets(), 60)
        .tcp(40_000, port, 1, 64_240)
        .syn();
    let mut frame = Vec::new();
    builder.write(&mut frame, &[])?;
    Ok(frame)
}

/// A listener for the guard to protect, and the list. XDP is generic, so that its program is loaded.
fn configuration(count: u32, pin: &Path, list: &Path) -> String {
    let bind = SocketAddr::new(IpAddr::V4(VIP_RELAY.v4), SHORT.port);
    format!(
        "[metrics]\nlisten = \"127.0.0.1:9145\"\n\n[stop]\ndeadline = \"0s\"\n\n\
         [guard]\npin = \"{}/guard\"\nxdp = \"generic\"\ndeny_files = [\"{}\"]\nmax_bans = {}\n\n\
         [[listener]]\nname = \"short\"\nbind = [\"{bind}\"]\nprotocol = \"{}\"\nengine = \"relay\"\n\
         backends = [\"{}\"]\n",
        pin.display(),
        list.display(),
        count.max(1),
        SHORT.protocol,
        mail(SHORT.port)
    )
}

/// A table in Markdown.
#[must_use]
pub fn table(costs: &[BanCost]) -> String {
    let columns: Vec<_> = PROGRAMS
        .iter()
        .flat_map(|program| packets_of(u32::MAX).into_iter().map(move |(source, ..)| (*program, source)))
        .collect();
    let mut head =
        ["bans", "s until in force", "MiB, daemon", "MiB, at most", "MiB, maps"].map(str::to_owned).to_vec();
    head.extend(columns.iter().map(|(program, source)| format!("ns, {program}, {source}")));
    let mebibytes = |bytes: u64| digits(f64::from(u32::try_from(bytes >> 10).unwrap_or(u32::MAX)) / 1024.0);
    let row = |cost: &BanCost| {
        let memory = [cost.daemon, cost.peak, cost.maps].map(mebibytes);
        let mut words = vec![whole(cost.bans), digits(cost.seconds)];
        words.extend(memory);
        words.extend(columns.iter().map(|(program, source)| {
            let found = cost.packets.iter().find(|it| it.program == *program && it.source == *source);
            found.map(|found| digits(found.nanos)).unwrap_or_default()
        }));
        words
    };
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ =
        write!(text, "{}", align(&std::iter::once(head).chain(costs.iter().map(row)).collect::<Vec<_>>()));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_of_each_kind_is_found_in_the_list() {
        let list = bans::list(1000);
        let [_, (_, client, _), (_, address, _), (_, inside, _)] = packets_of(1000)[..] else {
            panic!("four packets")
        };
        assert!(!list.contains(&client.to_string()));
        assert!(list.lines().any(|ban| ban == address.to_string()));
        let [a, b, c, _] = inside.octets();
        assert!(list.lines().any(|ban| ban == format!("{a}.{b}.{c}.0/24")));
        assert_eq!(packets_of(0).len(), 2);
    }

    #[test]
    fn a_row_has_what_was_measured() {
        let packet = |program: &str, source: &str, nanos| PacketCost {
            program: program.into(),
            source: source.into(),
            dropped: false,
            nanos,
        };
        let cost = BanCost {
            bans: 1_000_000,
            seconds: 1.5,
            daemon: 100 << 20,
            peak: 200 << 20,
            maps: 50 << 20,
            packets: vec![packet("guard", "not banned", 80.0), packet("guard_xdp", "a banned address", 60.0)],
        };
        let table = table(&[cost]);
        let row = table.lines().last().unwrap().split('|').map(str::trim).collect::<Vec<_>>();
        assert_eq!(row[1..9], ["1,000,000", "1.50", "100", "200", "50.0", "", "80.0", ""], "{table}");
        assert_eq!(row[12], "60.0", "{table}");
    }

    #[test]
    fn the_configuration_is_toml() {
        let text = configuration(7, Path::new("/p"), Path::new("/l/deny.txt"));
        let config: toml::Table = text.parse().unwrap();
        assert_eq!(config["guard"]["max_bans"].as_integer(), Some(7));
    }
}
