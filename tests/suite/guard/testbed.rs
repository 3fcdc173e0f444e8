//! The three namespaces, an injector with a listener of each engine, and the guard's maps.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use injector_common::guard::{Settings, port_bit};
use injector_testbed::bpf::{self, DaemonMap};
use injector_testbed::bpffs::BpfFs;
use injector_testbed::daemon::{self, ADMIN, Injector};
use injector_testbed::netns::{
    CLIENT, EDGE_OUTSIDE, Family, HostAddresses, MAIL, Topology, VIP_HAPROXY, VIP_INLINE, VIP_RELAY,
    VIP_SPLICE,
};

/// Where clients connect.
pub(crate) const PORT: u16 = 2500;
/// A port of the edge that no listener has.
pub(crate) const OTHER_PORT: u16 = 2599;
/// The port of a listener of all addresses, which a host behind the edge has open as well. Not a backend's:
/// engine inline closes those.
pub(crate) const ANY_PORT: u16 = 2598;
/// Where the backend listens.
const BACKEND_PORT: u16 = 12500;

/// How long an answer to a SYN may take that is expected, and one that is not: the SYN is repeated after a
/// second.
const TIMEOUT: Duration = Duration::from_secs(3);
const SHORT_TIMEOUT: Duration = Duration::from_millis(400);

/// The engines, and where their listeners are.
const ALL: [(&str, HostAddresses); 3] =
    [("splice", VIP_SPLICE), ("relay", VIP_RELAY), ("inline", VIP_INLINE)];

/// How long what the daemon does by itself may take.
const LIMIT: Duration = Duration::from_secs(10);

/// The namespaces, shared by all trials of a group.
#[derive(Debug)]
pub(crate) struct Testbed {
    pub(crate) topology: Topology,
    bpffs: BpfFs,
    _backends: Vec<TcpListener>,
    _others: Vec<TcpListener>,
}

/// What became of a client's SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Accepted,
    Refused,
    /// There was none.
    Dropped,
}

/// The end of a ban without end, and of one that is over.
pub(crate) const FOREVER: u64 = u64::MAX;
pub(crate) const OVER: u64 = 1;

impl Testbed {
    pub(crate) fn new(group: &str) -> anyhow::Result<Self> {
        let topology = Topology::named(group)?;
        // To hosts behind the edge.
        let edge = EDGE_OUTSIDE.of(Family::V4).to_string();
        topology.client.ip(&["route", "add", &format!("{}/32", MAIL.of(Family::V4)), "via", &edge])?;
        let backend = |family| topology.mail.listen(SocketAddr::new(MAIL.of(family), BACKEND_PORT));
        let other = |family| topology.edge.listen(SocketAddr::new(VIP_RELAY.of(family), OTHER_PORT));
        let mut backends = Family::ALL.into_iter().map(backend).collect::<anyhow::Result<Vec<_>>>()?;
        backends.push(topology.mail.listen(SocketAddr::new(MAIL.of(Family::V4), ANY_PORT))?);
        let others = Family::ALL.into_iter().map(other).collect::<anyhow::Result<_>>()?;
        Ok(Self { topology, bpffs: BpfFs::mount()?, _backends: backends, _others: others })
    }

    /// The folder of the guard's pins.
    pub(crate) fn pin(&self) -> PathBuf {
        self.bpffs.path().join("guard")
    }

    /// A configuration with listeners of these engines, and with these lines of `[guard]`.
    pub(crate) fn config(&self, engines: &[&str], guard: &str) -> String {
        let mut text = format!(
            "[metrics]\nlisten = \"127.0.0.1:9145\"\n\n{ADMIN}\n[inline]\npin = \"{}\"\n\n[guard]\npin = \"{}\"\n{guard}\n",
            self.bpffs.path().join("inline").display(),
            self.pin().display()
        );
        let backends = Family::ALL.map(|family| SocketAddr::new(MAIL.of(family), BACKEND_PORT));
        for (engine, vip) in ALL.into_iter().filter(|(engine, _)| engines.contains(engine)) {
            let [v4, v6] = Family::ALL.map(|family| SocketAddr::new(vip.of(family), PORT));
            text.push_str(&format!(
                "\n[[listener]]\nname = \"{engine}\"\nbind = [\"{v4}\", \"{v6}\"]\nprotocol = \"smtp\"\n\
                 engine = \"{engine}\"\nbackends = [\"{}\", \"{}\"]\n",
                backends[0], backends[1]
            ));
        }
        text
    }

    pub(crate) fn start(&self, engines: &[&str], guard: &str) -> anyhow::Result<Injector> {
        Injector::start(&self.topology.edge, &self.config(engines, guard))
    }

    /// Has the programs treat this network so until then. What stood there before is replaced.
    pub(crate) fn ban(&self, address: IpAddr, prefix: u8, until_ns: u64) -> anyhow::Result<()> {
        /// The origin of `injector ban`, so that the next daemon keeps it.
        const COMMAND: u32 = 2;
        let ban = [until_ns.to_ne_bytes(), u64::from(COMMAND).to_ne_bytes()].concat();
        let whole = prefix == if address.is_ipv4() { 32 } else { 128 };
        if whole {
            self.map("BANNED_ADDRESSES")?.set(&mapped(address), &ban)?;
        } else {
            self.map("BANNED_NETWORKS")?.set(&trie_key(address, prefix), &ban)?;
        }
        self.set_looked_up(true, true)
    }

    /// Has no ban concern an address.
    pub(crate) fn allow(&self, address: IpAddr) -> anyhow::Result<()> {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        self.map("GUARD_ALLOWED")?.set(&trie_key(address, prefix), &1_u32.to_ne_bytes())?;
        self.set_looked_up(true, true)
    }

    fn map(&self, name: &str) -> anyhow::Result<DaemonMap> {
        DaemonMap::pinned(&self.pin().join("layout1/maps").join(name))
    }

    /// How many packets each hook has dropped: XDP, the ingress, engine inline.
    pub(crate) fn dropped(&self) -> anyhow::Result<[u64; 3]> {
        let processors = possible_processors()?;
        let mut dropped = [0; 3];
        for (key, values) in self.map("GUARD_COUNTERS")?.pairs(processors * 8)? {
            let index = key.try_into().map(u32::from_ne_bytes).unwrap_or(u32::MAX);
            let sum = values
                .chunks_exact(8)
                .filter_map(|value| value.try_into().ok())
                .map(u64::from_ne_bytes)
                .sum();
            *dropped.get_mut(usize::try_from(index)?).context("another counter")? = sum;
        }
        Ok(dropped)
    }

    /// What becomes of the client's SYNs to these addresses, at once.
    pub(crate) fn answers(&self, addresses: &[(SocketAddr, Answer)]) -> anyhow::Result<Vec<Answer>> {
        self.topology.client.run(|| {
            std::thread::scope(|scope| {
                // The thread is in the namespace, as are those that it starts.
                let asked: Vec<_> = addresses
                    .iter()
                    .map(|(address, expected)| scope.spawn(move || answer(*address, *expected)))
                    .collect();
                let joined = asked.into_iter().map(|answer| match answer.join() {
                    Ok(answer) => answer,
                    Err(_) => bail!("panicked"),
                });
                joined.collect()
            })
        })?
    }

    /// Checks that SYNs to these addresses are answered so, and that a port without listener accepts them.
    pub(crate) fn expect(
        &self,
        what: &str,
        addresses: &[SocketAddr],
        expected: Answer,
    ) -> anyhow::Result<()> {
        let mut all: Vec<_> = addresses.iter().map(|address| (*address, expected)).collect();
        let family = if addresses.iter().any(SocketAddr::is_ipv6) { Family::V6 } else { Family::V4 };
        all.push((SocketAddr::new(VIP_RELAY.of(family), OTHER_PORT), Answer::Accepted));
        let answers = self.answers(&all)?;
        let seen: Vec<_> =
            answers.iter().zip(&all).filter(|(seen, (_, expected))| *seen != expected).collect();
        ensure!(seen.is_empty(), "{what}: seen, address and what was expected: {seen:?}");
        Ok(())
    }

    /// Bans the client's address, and checks that its SYNs to these engines' listeners are dropped from
    /// then on. Returns how many packets each hook dropped, as [`Self::dropped`].
    pub(crate) fn dropped_by_ban(&self, engines: &[&str], family: Family) -> anyhow::Result<[u64; 3]> {
        let listeners = listeners(engines, family);
        self.expect("no ban", &listeners, Answer::Accepted)?;
        self.ban(client(family), whole(family), FOREVER)?;
        let before = self.dropped()?;
        self.expect("an address", &listeners, Answer::Dropped)?;
        let after = self.dropped()?;
        Ok(std::array::from_fn(|hook| after[hook] - before[hook]))
    }

    /// Tells the programs whether they need to look for networks and for addresses, and that something has
    /// changed.
    pub(crate) fn set_looked_up(&self, networks: bool, addresses: bool) -> anyhow::Result<()> {
        let map = self.map("GUARD_SETTINGS")?;
        let (key, before) = map.pairs(8)?.pop().context("the map is empty")?;
        let word = |at: usize| before.get(at..at + 4).and_then(|word| word.try_into().ok());
        let word = |at| word(at).map(u32::from_ne_bytes).context("a short value");
        let before = Settings { networks: word(0)?, addresses: word(4)? };
        let Settings { networks, addresses } = before.after(networks, addresses);
        map.set(&key, &[networks, addresses].map(u32::to_ne_bytes).concat())
    }

    /// Tells the programs that no listener has this port.
    pub(crate) fn forget_port(&self, port: u16) -> anyhow::Result<()> {
        let (word, _) = port_bit(port);
        self.map("GUARDED_PORTS")?.set(&word.to_ne_bytes(), &[0; 8])
    }

    /// Runs `injector guard detach`, and returns what it printed.
    pub(crate) fn detach(&self) -> anyhow::Result<String> {
        let mut command = self.topology.edge.command(daemon::binary()?);
        command.args(["guard", "detach", "--pin"]).arg(self.pin());
        let output = command.output()?;
        let printed = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(output.status.success(), "injector guard detach: {printed}");
        Ok(printed)
    }

    /// How many tcx programs a device of the edge has.
    pub(crate) fn programs(&self, device: &str) -> anyhow::Result<usize> {
        Ok(self.topology.edge.run(|| bpf::tcx_links(device))??.len())
    }

    /// What `ip` says of a device of the edge.
    pub(crate) fn link(&self, device: &str) -> anyhow::Result<String> {
        let mut command = self.topology.edge.command("ip");
        let output = command.args(["-details", "link", "show", "dev", device]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        let binary = daemon::binary();
        for part in ["guard", "inline"] {
            let Ok(binary) = &binary else { return };
            let mut command = self.topology.edge.command(binary);
            command.args([part, "detach", "--pin"]).arg(self.bpffs.path().join(part));
            if let Err(error) = command.output() {
                eprintln!("injector {part} detach: {error}");
            }
        }
    }
}

/// The addresses of the listeners of these engines.
pub(crate) fn listeners(engines: &[&str], family: Family) -> Vec<SocketAddr> {
    let of_these = ALL.into_iter().filter(|(engine, _)| engines.contains(engine));
    of_these.map(|(_, vip)| SocketAddr::new(vip.of(family), PORT)).collect()
}

/// How many bits an address has.
pub(crate) const fn whole(family: Family) -> u8 {
    match family {
        Family::V4 => 32,
        Family::V6 => 128,
    }
}

/// The client's address.
pub(crate) fn client(family: Family) -> IpAddr {
    CLIENT.of(family)
}

/// The network that the client is in, and its prefix.
pub(crate) fn client_network(family: Family) -> (IpAddr, u8) {
    match client(family) {
        IpAddr::V4(address) => (Ipv4Addr::from_bits(address.to_bits() & !0xFF).into(), 24),
        IpAddr::V6(address) => (Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(), 64),
    }
}

/// An address of the edge that no listener has.
pub(crate) fn unused(family: Family) -> IpAddr {
    VIP_HAPROXY.of(family)
}

fn answer(address: SocketAddr, expected: Answer) -> anyhow::Result<Answer> {
    let timeout = if expected == Answer::Dropped { SHORT_TIMEOUT } else { TIMEOUT };
    match TcpStream::connect_timeout(&address, timeout) {
        Ok(_) => Ok(Answer::Accepted),
        Err(error) => match error.kind() {
            ErrorKind::TimedOut => Ok(Answer::Dropped),
            ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => Ok(Answer::Refused),
            _ => Err(error).with_context(|| address.to_string()),
        },
    }
}

fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn trie_key(address: IpAddr, prefix: u8) -> Vec<u8> {
    let prefix = u32::from(prefix) + if address.is_ipv4() { 96 } else { 0 };
    [prefix.to_ne_bytes().as_slice(), &mapped(address)].concat()
}

/// The processors that may ever be there: per-CPU maps have a value for each.
fn possible_processors() -> anyhow::Result<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text.trim().rsplit(['-', ',']).next().context("no processors")?;
    Ok(last.parse::<usize>()? + 1)
}

/// Waits until this holds.
pub(crate) fn wait_for(what: &str, mut holds: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !holds()? {
        ensure!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
