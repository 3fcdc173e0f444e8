use std::{
    collections::{BTreeMap, HashMap},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::AtomicU64,
    time::{Duration, Instant},
};

use injector_common::guard::Listed;
use proptest::prelude::*;

use super::*;

/// The guard's maps, with the lookups of the kernel.
#[derive(Debug, Default)]
struct FakeMaps {
    bans: Mutex<HashMap<Network, Ban>>,
    allowed: Mutex<Vec<Network>>,
    refuses: AtomicBool,
    written: AtomicU64,
    /// How many bans fit.
    room: Option<usize>,
}

impl FakeMaps {
    /// What the programs find: the hash table has addresses, and the trie gives the smallest network.
    fn looks_up(&self, source: IpAddr) -> Listed {
        let bans = self.bans.lock().unwrap();
        let host = Network::host(source);
        let prefixes = (0..host.prefix()).rev().map(|prefix| Network::around(source, prefix));
        Listed {
            allowed: self.allowed.lock().unwrap().iter().any(|network| network.contains(source)),
            address_until_ns: bans.get(&host).map_or(0, |ban| ban.until_ns),
            network_until_ns: prefixes.into_iter().find_map(|it| bans.get(&it)).map_or(0, |ban| ban.until_ns),
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(!self.refuses.load(Ordering::Relaxed), "no");
        Ok(())
    }
}

impl BanMaps for FakeMaps {
    fn write(&self, changes: &[BanChange]) -> anyhow::Result<()> {
        self.check()?;
        self.written.fetch_add(changes.len() as u64, Ordering::Relaxed);
        let mut bans = self.bans.lock().unwrap();
        for change in changes {
            let is_full = self.room.is_some_and(|room| bans.len() >= room);
            match *change {
                BanChange::Set(network, _) if is_full && !bans.contains_key(&network) => {
                    anyhow::bail!("no room for {network}")
                }
                BanChange::Set(network, ban) => bans.insert(network, ban),
                BanChange::Remove(network) => bans.remove(&network),
            };
        }
        Ok(())
    }

    fn read(&self, each: &mut dyn FnMut(Network, Ban)) -> anyhow::Result<()> {
        self.check()?;
        self.bans.lock().unwrap().iter().for_each(|(network, ban)| each(*network, *ban));
        Ok(())
    }

    fn set_allowed(&self, networks: &[Network]) -> anyhow::Result<()> {
        self.check()?;
        *self.allowed.lock().unwrap() = networks.to_vec();
        Ok(())
    }

    fn set_guarded(&self, _addresses: &[SocketAddr]) -> anyhow::Result<()> {
        self.check()
    }

    fn dropped(&self, _by: Counter) -> u64 {
        0
    }
}

const HOUR: u64 = 3_600_000_000_000;

fn network(text: &str) -> Network {
    text.parse().unwrap()
}

fn wanted(network: Network, until_ns: u64) -> WantedBan {
    WantedBan { network, until_ns, reason: "test".into() }
}

fn forever(text: &str) -> WantedBan {
    wanted(network(text), Ban::FOREVER)
}

fn guard(maps: &Arc<FakeMaps>) -> Guard {
    Guard::new(Some(Arc::clone(maps) as Arc<dyn BanMaps>), 1000)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_source_is_banned_while_one_origin_wants_it() {
    let maps = Arc::new(FakeMaps::default());
    let guard = guard(&maps);
    assert!(!guard.is_banned(ip("192.0.2.7")));
    assert_eq!(guard.replace(Origin::List, vec![forever("192.0.2.0/24")]).added, 1);
    assert_eq!(guard.change(Origin::Command, vec![forever("192.0.2.7")], Vec::new()).added, 1);
    assert!(guard.is_banned(ip("::ffff:192.0.2.7")), "an IPv4 address in IPv6 is the same source");
    assert_eq!(guard.replace(Origin::List, Vec::new()).removed, 1);
    assert!(guard.is_banned(ip("192.0.2.7")) && !guard.is_banned(ip("192.0.2.8")));
    assert_eq!(guard.change(Origin::Command, Vec::new(), vec![network("192.0.2.7")]).removed, 1);
    assert!(!guard.is_banned(ip("192.0.2.7")));
    assert!(maps.bans.lock().unwrap().is_empty());
}

#[test]
fn what_is_protected_stays_reachable_also_in_a_banned_network() {
    let maps = Arc::new(FakeMaps::default());
    let guard = guard(&maps);
    guard.set_protected(&[
        (network("192.0.2.7"), Protection::Backend),
        (network("10.0.0.0/8"), Protection::Allow),
    ]);
    let bans = ["192.0.2.0/24", "192.0.2.7", "10.1.0.0/16"].map(forever).to_vec();
    assert_eq!(
        guard.change(Origin::Command, bans, Vec::new()),
        Applied { added: 3, protected: 2, ..Applied::default() }
    );
    for (source, banned) in [("192.0.2.7", false), ("192.0.2.8", true), ("10.1.2.3", false)] {
        assert_eq!(guard.is_banned(ip(source)), banned, "{source}");
        assert_eq!(maps.looks_up(ip(source)).is_banned(0), banned, "{source}");
    }
    guard.set_protected(&[]);
    assert!(guard.is_banned(ip("192.0.2.7")) && maps.looks_up(ip("10.1.2.3")).is_banned(0));
}

#[test]
fn bans_outlive_the_daemon_and_end_in_time() {
    let maps = Arc::new(FakeMaps::default());
    let now = clock::boottime_ns();
    let first = guard(&maps);
    first.change(Origin::Command, vec![wanted(network("192.0.2.7"), now + HOUR)], Vec::new());
    first.change(Origin::CrowdSec, vec![wanted(network("192.0.2.8"), now + 2 * HOUR)], Vec::new());
    // The kernel's entry ends with the network's, which must not prolong the ban of the command.
    first.replace(
        Origin::List,
        vec![wanted(network("192.0.2.0/28"), now + 2 * HOUR), forever("198.51.100.1")],
    );
    drop(first);

    let second = guard(&maps);
    assert!(!second.has(Origin::Command, network("192.0.2.7")), "its own end is not known");
    assert!(second.has(Origin::CrowdSec, network("192.0.2.8")));
    assert!(second.is_banned(ip("198.51.100.1")), "until the list is read again");
    second.replace(Origin::List, vec![forever("198.51.100.2")]);
    let mut left: Vec<_> = maps.bans.lock().unwrap().keys().copied().collect();
    left.sort_unstable();
    assert_eq!(left, [network("192.0.2.8"), network("198.51.100.2")]);

    let at = clock::boottime_ns();
    second.change(Origin::Command, vec![wanted(network("192.0.2.9"), at + 20_000_000)], Vec::new());
    assert!(second.is_banned(ip("192.0.2.9")));
    while second.is_banned(ip("192.0.2.9")) {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(clock::boottime_ns() >= at + 20_000_000);
    assert_eq!(second.count(Origin::Command), 1, "not removed yet");
    second.maintain();
    assert_eq!(second.count(Origin::Command), 0);
    assert!(!maps.bans.lock().unwrap().contains_key(&network("192.0.2.9")));
    assert!(second.has(Origin::CrowdSec, network("192.0.2.8")));
}

#[test]
fn a_kernel_that_refused_gets_everything_later() {
    let maps = Arc::new(FakeMaps::default());
    let guard = guard(&maps);
    guard.change(Origin::Command, vec![forever("192.0.2.1"), forever("192.0.2.2")], Vec::new());
    maps.refuses.store(true, Ordering::Relaxed);
    guard.change(Origin::Command, vec![forever("192.0.2.3")], vec![network("192.0.2.1")]);
    guard.set_protected(&[(network("192.0.2.9"), Protection::Allow)]);
    assert!(guard.is_behind() && guard.is_banned(ip("192.0.2.3")));
    guard.maintain();
    assert!(guard.is_behind());
    maps.refuses.store(false, Ordering::Relaxed);
    guard.maintain();
    assert!(!guard.is_behind());
    let banned = |source: &str| maps.looks_up(ip(source)).is_banned(0);
    assert!(!banned("192.0.2.1") && banned("192.0.2.2") && banned("192.0.2.3"));
    assert_eq!(*maps.allowed.lock().unwrap(), [network("192.0.2.9")]);
}

#[test]
fn bans_that_do_not_fit_are_counted_and_room_is_made_first() {
    let guard = Guard::new(None, 2);
    let ban = |number: u8| wanted(Network::host(Ipv4Addr::new(192, 0, 2, number).into()), Ban::FOREVER);
    assert_eq!(
        guard.replace(Origin::List, vec![ban(1), ban(2), ban(3)]),
        Applied { added: 2, full: 1, ..Applied::default() }
    );
    assert_eq!(
        guard.replace(Origin::List, vec![ban(3), ban(4)]),
        Applied { added: 2, removed: 2, ..Applied::default() }
    );
    assert_eq!(guard.rejected_full(), 1);
}

#[test]
fn a_snapshot_counts_all_and_lists_some() {
    let guard = Guard::new(None, 10);
    guard.replace(Origin::List, vec![forever("192.0.2.2"), forever("192.0.2.1"), forever("192.0.2.1")]);
    guard.change(Origin::Command, vec![forever("192.0.2.1")], Vec::new());
    assert_eq!(guard.snapshot(None, 1).count, 3);
    let listed = |origin, limit| -> Vec<_> {
        guard.snapshot(origin, limit).bans.iter().map(|it| (it.origin, it.ban.network.to_string())).collect()
    };
    assert_eq!(listed(Some(Origin::List), 1), [(Origin::List, "192.0.2.1/32".to_owned())]);
    assert_eq!(listed(None, 9).len(), 3);
    assert_eq!(guard.bans_around(network("192.0.2.1")).len(), 2);
}

#[test]
fn each_change_that_bans_is_announced() {
    let guard = Guard::new(None, 10);
    let mut changes = guard.changes();
    guard.change(Origin::List, vec![forever("192.0.2.1")], Vec::new());
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    guard.change(Origin::List, vec![forever("192.0.2.1")], vec![network("192.0.2.9")]);
    assert!(!changes.has_changed().unwrap(), "banned before");
    guard.change(Origin::Command, vec![forever("192.0.2.2")], Vec::new());
    assert!(!changes.has_changed().unwrap(), "who gives the command ends the sessions");
    guard.set_protected(&[]);
    assert!(changes.has_changed().unwrap(), "what was protected may be banned");
}

/// One step of a history.
#[derive(Clone, Debug)]
enum Step {
    Change(Origin, Vec<(Network, u64)>, Vec<Network>),
    Replace(Origin, Vec<(Network, u64)>),
    Restart,
    Maintain,
}

/// Few addresses, so that networks are often one inside the other.
fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0u8..3, 0u8..8).prop_map(|(a, b)| Ipv4Addr::new(10, 0, a, b).into()),
        (0u16..3, 0u16..8).prop_map(|(a, b)| Ipv6Addr::new(0x2001, 0xdb8, a, 0, 0, 0, 0, b).into()),
    ]
}

fn any_network() -> impl Strategy<Value = Network> {
    (address(), prop_oneof![Just(255u8), Just(32), 0u8..=128])
        .prop_map(|(ip, bits)| Network::around(ip, bits))
}

/// Ends in hours from now; the last is none. Ends that are over are in it as well.
fn end() -> impl Strategy<Value = u64> {
    0u64..5
}

fn step() -> impl Strategy<Value = Step> {
    let origin = || prop::sample::select(Origin::ALL.to_vec());
    let bans = || prop::collection::vec((any_network(), end()), 0..6);
    prop_oneof![
        6 => (origin(), bans(), prop::collection::vec(any_network(), 0..4))
            .prop_map(|(origin, set, remove)| Step::Change(origin, set, remove)),
        3 => (origin(), bans()).prop_map(|(origin, bans)| Step::Replace(origin, bans)),
        1 => Just(Step::Maintain),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// The table and the kernel's lookups say of every address, at every time, what the rule says: it is
    /// banned while a ban of a network around it holds.
    #[test]
    fn table_and_kernel_agree_with_the_rule(
        steps in prop::collection::vec(step(), 1..12),
        sources in prop::collection::vec(address(), 12),
    ) {
        let start = clock::boottime_ns();
        let until = |hours: u64| if hours == 4 { Ban::FOREVER } else { (start + hours * HOUR).saturating_sub(1) };
        let maps = Arc::new(FakeMaps::default());
        let mut guard = guard(&maps);
        let mut rule: BTreeMap<(Origin, Network), u64> = BTreeMap::new();
        for step in steps {
            let wants = |bans: &[(Network, u64)]| bans.iter().map(|(n, e)| wanted(*n, until(*e))).collect::<Vec<_>>();
            match step {
                Step::Change(origin, set, remove) => {
                    guard.change(origin, wants(&set), remove.clone());
                    rule.retain(|(by, network), _| *by != origin || !remove.contains(network));
                    rule.extend(set.iter().map(|(network, end)| ((origin, *network), until(*end))));
                }
                Step::Replace(origin, bans) => {
                    guard.replace(origin, wants(&bans));
                    rule.retain(|(by, _), _| *by != origin);
                    for (network, end) in bans {
                        let latest = rule.entry((origin, network)).or_default();
                        *latest = until(end).max(*latest);
                    }
                }
                Step::Maintain => guard.maintain(),
                // What the kernel shows is what stays banned. Who wanted it with an earlier end is lost.
                Step::Restart => {
                    guard = Guard::new(Some(Arc::clone(&maps) as Arc<dyn BanMaps>), 1000);
                    rule = guard.snapshot(None, usize::MAX).bans.into_iter()
                        .map(|it| ((it.origin, it.ban.network), it.ban.until_ns)).collect();
                }
            }
            for source in &sources {
                let mut bans = rule.iter().filter(|((_, network), _)| network.contains(*source));
                let latest = bans.by_ref().map(|(_, until)| *until).max().unwrap_or(0);
                prop_assert_eq!(guard.is_banned(*source), start < latest, "the table, of {}", source);
                for hours in 0..4 {
                    let at = start + hours * HOUR;
                    prop_assert_eq!(maps.looks_up(*source).is_banned(at), at < latest, "the kernel, of {} at {}", source, hours);
                }
            }
        }
    }

    /// A restart changes nothing for any address.
    #[test]
    fn after_a_restart_the_same_sources_are_banned(
        steps in prop::collection::vec((prop::sample::select(Origin::ALL.to_vec()), any_network(), end()), 1..20),
        sources in prop::collection::vec(address(), 12),
    ) {
        let start = clock::boottime_ns();
        let maps = Arc::new(FakeMaps::default());
        let first = guard(&maps);
        for (origin, network, hours) in steps {
            let until = if hours == 4 { Ban::FOREVER } else { start + hours * HOUR };
            first.change(origin, vec![wanted(network, until)], Vec::new());
        }
        let second = guard(&maps);
        for source in sources {
            prop_assert_eq!(first.is_banned(source), second.is_banned(source), "{}", source);
            for hours in 1..4 {
                let listed = maps.looks_up(source);
                let latest = second.bans_around(Network::host(source)).iter().map(|it| it.ban.until_ns).max();
                let at = start + hours * HOUR + 1;
                prop_assert_eq!(listed.is_banned(at), latest.is_some_and(|end| at < end), "{} {}", source, hours);
            }
        }
    }
}

/// Run by hand in a release build for the numbers; here with fewer bans, and a bound that a stall of a
/// worker would exceed.
#[test]
fn a_big_change_does_not_keep_a_worker_waiting() {
    let bans: u32 = std::env::var("BANS").ok().and_then(|it| it.parse().ok()).unwrap_or(100_000);
    let guard = Guard::new(None, bans as usize);
    let done = AtomicBool::new(false);
    let list = |shift: u32| -> Vec<_> {
        let addresses = (0..bans).map(|it| Ipv4Addr::from_bits((it + shift).wrapping_mul(2_654_435_761)));
        addresses.map(|ip| wanted(Network::host(ip.into()), Ban::FOREVER)).collect()
    };
    guard.replace(Origin::List, list(0));
    let (asked, longest, took) = std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let (mut asked, mut longest) = (0u32, Duration::ZERO);
            while !done.load(Ordering::Relaxed) {
                let before = Instant::now();
                std::hint::black_box(guard.is_banned(Ipv4Addr::from_bits(asked.wrapping_mul(40_503)).into()));
                longest = longest.max(before.elapsed());
                asked += 1;
            }
            (asked, longest)
        });
        let before = Instant::now();
        let applied = guard.replace(Origin::List, list(bans / 2));
        let took = before.elapsed();
        done.store(true, Ordering::Relaxed);
        assert_eq!(
            applied,
            Applied { added: bans as usize / 2, removed: bans as usize / 2, ..Applied::default() }
        );
        let (asked, longest) = asking.join().unwrap();
        (asked, longest, took)
    });
    println!("{bans} bans: replaced half in {took:?}; {asked} questions meanwhile, the longest {longest:?}");
    assert!(longest < took / 8, "{longest:?} of {took:?}");
}

#[test]
fn a_ban_that_is_over_hides_no_other_after_a_restart() {
    let maps = Arc::new(FakeMaps::default());
    let over = clock::boottime_ns() - 1;
    guard(&maps).change(Origin::List, vec![wanted(network("2001:db8::/33"), over)], Vec::new());
    let second = guard(&maps);
    assert_eq!(second.count(Origin::List), 0);
    second.change(Origin::List, vec![forever("2001:db8::/32")], Vec::new());
    assert!(maps.looks_up(ip("2001:db8::")).is_banned(over));
}

#[test]
fn a_ban_of_an_earlier_daemon_is_removed_at_its_end() {
    let maps = Arc::new(FakeMaps::default());
    let end = clock::boottime_ns() + 20_000_000;
    guard(&maps).change(Origin::CrowdSec, vec![wanted(network("192.0.2.7"), end)], Vec::new());
    let second = guard(&maps);
    while second.is_banned(ip("192.0.2.7")) {
        std::thread::sleep(Duration::from_millis(2));
    }
    second.maintain();
    assert!(clock::boottime_ns() >= end && maps.bans.lock().unwrap().is_empty());
}

#[test]
fn a_full_kernel_gets_another_list_because_the_old_one_goes_first() {
    const COUNT: u32 = 16_385;
    const { assert!(COUNT as usize > WRITTEN_AT_ONCE) };
    let maps = Arc::new(FakeMaps { room: Some(COUNT as usize), ..FakeMaps::default() });
    let guard = Guard::new(Some(Arc::clone(&maps) as Arc<dyn BanMaps>), COUNT as usize);
    let list = |first: u32| {
        (first..first + COUNT)
            .map(|bits| wanted(Network::host(Ipv4Addr::from_bits(bits).into()), Ban::FOREVER))
    };
    let is_banned = |bits| maps.looks_up(Ipv4Addr::from_bits(bits).into()).is_banned(0);
    guard.replace_sorted(Origin::List, list(2 * COUNT));
    // All of its addresses stand before those of the old one.
    guard.replace_sorted(Origin::List, list(COUNT));
    assert!(!guard.is_behind());
    assert!(is_banned(COUNT) && is_banned(2 * COUNT - 1) && !is_banned(2 * COUNT));
    // The same after the kernel refused for a while.
    maps.refuses.store(true, Ordering::Relaxed);
    guard.replace_sorted(Origin::List, list(0));
    assert!(guard.is_behind());
    maps.refuses.store(false, Ordering::Relaxed);
    guard.maintain();
    assert!(!guard.is_behind() && is_banned(0) && is_banned(COUNT - 1) && !is_banned(COUNT));
}

/// How often this thread has given up the processor by itself.
fn pauses() -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let pauses = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    pauses.unwrap().trim().parse().unwrap()
}

#[test]
fn the_table_is_left_to_the_workers_again_and_again() {
    const COUNT: u32 = 20_000;
    let guard = Guard::new(None, COUNT as usize);
    let networks: Vec<_> = (0..COUNT).map(|bits| Network::host(Ipv4Addr::from_bits(bits).into())).collect();
    let before = pauses();
    guard.change(Origin::List, networks.iter().map(|it| wanted(*it, Ban::FOREVER)), Vec::new());
    guard.change(Origin::List, Vec::new(), networks);
    let parts = 2 * COUNT as usize / CHANGES_AT_ONCE;
    assert!(pauses() - before >= parts as u64, "{} pauses in {parts} parts", pauses() - before);
}
