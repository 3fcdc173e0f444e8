//! What the programs drop, with and without a daemon, and what is left of them.

use std::io::{ErrorKind, Read as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use etherparse::PacketBuilder;
use injector_testbed::bpf::{DaemonMap, ForeignProgram, Program};
use injector_testbed::daemon::Injector;
use injector_testbed::netns::{Family, MAIL};
use injector_testbed::process::bind_thread;
use injector_user::os::clock::boottime_ns;

use crate::Run;
use crate::testbed::{
    ANY_PORT, Answer, FOREVER, OVER, PORT, Testbed, client, client_network, listeners, unused, wait_for,
    whole,
};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("a ban drops SYNs of all engines' listeners, and nothing else", banned),
    ("what cannot be banned is not looked up", looked_up),
    ("a ban holds once it is printed, also of a source that sends all the time", at_once),
    ("a ban by command ends the connections of every engine", ends_connections),
    ("bans hold and end without the daemon", without_daemon),
    ("XDP, generic", |testbed| xdp(testbed, "generic", "xdpgeneric")),
    ("XDP, native", |testbed| xdp(testbed, "native", "xdp")),
    ("XDP, another program in its place", xdp_taken),
    ("a listener of all addresses, and packets for other hosts", unspecified),
    ("devices that come later", later_device),
    ("a second daemon is refused", second_daemon),
    ("another size keeps the bans", resized),
    ("nothing is left", nothing_left),
    ("the self-test passes", self_test),
];

const ENGINES: [&str; 3] = ["splice", "relay", "inline"];
/// Where the engine does not matter.
const RELAY: [&str; 1] = ["relay"];

fn banned(testbed: &Testbed) -> anyhow::Result<()> {
    let _injector = testbed.start(&ENGINES, "")?;
    for family in Family::ALL {
        let (listeners, address) = (listeners(&ENGINES, family), client(family));
        let [driver, ingress, inline] = testbed.dropped_by_ban(&ENGINES, family)?;
        // One SYN, or its repetition, to each.
        ensure!(driver == 0, "XDP dropped {driver}, although auto does not use it on veth");
        ensure!(ingress >= 2 && inline > 0, "the ingress dropped {ingress}, and inline {inline}");
        testbed.ban(address, whole(family), OVER)?;
        testbed.expect("a ban that is over", &listeners, Answer::Accepted)?;
        let (network, prefix) = client_network(family);
        testbed.ban(network, prefix, FOREVER)?;
        testbed.expect("a network", &listeners, Answer::Dropped)?;
        testbed.allow(address)?;
        testbed.expect("allowed in a banned network", &listeners, Answer::Accepted)?;
    }
    Ok(())
}

/// The programs skip maps without bans, and packets for ports without a listener.
fn looked_up(testbed: &Testbed) -> anyhow::Result<()> {
    let _injector = testbed.start(&ENGINES, "")?;
    let listeners = listeners(&ENGINES, Family::V4);
    let (network, prefix) = client_network(Family::V4);
    testbed.ban(network, prefix, FOREVER)?;
    // The daemon writes its own bits whenever addresses of the host change, as after its start.
    let accepted = |what, networks, addresses| {
        let attempt = || {
            testbed.set_looked_up(networks, addresses)?;
            testbed.expect(what, &listeners, Answer::Accepted)
        };
        attempt().or_else(|_| attempt()).or_else(|_| attempt())
    };
    accepted("a network, without the bit for networks", false, true)?;
    testbed.set_looked_up(true, false)?;
    testbed.expect("a network, with the bit for networks", &listeners, Answer::Dropped)?;
    testbed.ban(network, prefix, OVER)?;
    testbed.ban(client(Family::V4), 32, FOREVER)?;
    accepted("an address, without the bit for addresses", true, false)?;
    testbed.set_looked_up(false, true)?;
    testbed.expect("an address, with the bit for addresses", &listeners, Answer::Dropped)?;
    testbed.forget_port(PORT)?;
    // Engine inline knows its listeners by itself.
    testbed.expect("a port that no listener has", &listeners[..2], Answer::Accepted)
}

fn ends_connections(testbed: &Testbed) -> anyhow::Result<()> {
    /// Of this trial's own backend: the others' are full of connections that they do not accept.
    const BACKEND_PORT: u16 = 12601;
    let _backend = testbed.topology.mail.listen(SocketAddr::new(MAIL.of(Family::V4), BACKEND_PORT))?;
    let config = testbed.config(&ENGINES, "").replace(":12500\"", &format!(":{BACKEND_PORT}\""));
    let injector = Injector::start(&testbed.topology.edge, &config)?;
    let address = client(Family::V4).to_string();
    let count = || -> anyhow::Result<usize> {
        let listed: serde_json::Value = serde_json::from_str(&injector.command(&["sessions", "--json"])?)?;
        let rows = listed["sessions"]["rows"].as_array().with_context(|| listed.to_string())?;
        let is_of_client = |row: &&serde_json::Value| {
            row["client"].as_str().is_some_and(|client| client.starts_with(&format!("{address}:")))
        };
        Ok(rows.iter().filter(is_of_client).count())
    };
    // Inline's of earlier trials, which their backend has not closed.
    let before = count()?;
    let connect = || listeners(&ENGINES, Family::V4).into_iter().map(TcpStream::connect).collect();
    let open: std::io::Result<Vec<_>> = testbed.topology.client.run(connect)?;
    wait_for("a connection of each engine", || Ok(count()? == before + 3))?;
    let printed = injector.command(&["ban", &address])?;
    ensure!(printed.ends_with(&format!("; {} sessions ended\n", before + 3)), "{printed}");
    for mut stream in open? {
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        // Where the daemon forwards, it says why.
        let end = stream.read_to_end(&mut Vec::new());
        let goes_on = end.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
        ensure!(!goes_on, "{} goes on", stream.peer_addr()?);
    }
    wait_for("the end of all connections", || Ok(count()? == 0))
}

/// The programs remember which sources are not banned, and their processor asks at any moment of a change.
fn at_once(testbed: &Testbed) -> anyhow::Result<()> {
    const ROUNDS: usize = 10;
    /// `TC_ACT_SHOT`.
    const DROP: u32 = 2;
    const SOURCE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);

    let injector = testbed.start(&RELAY, "")?;
    // Without any ban, nothing is looked up.
    injector.command(&["ban", "203.0.113.1"])?;
    let [SocketAddr::V4(listener)] = listeners(&RELAY, Family::V4)[..] else { bail!("another listener") };
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [0; 6])
        .ipv4(SOURCE.octets(), listener.ip().octets(), 64)
        .tcp(40_000, listener.port(), 1, 64_240)
        .syn();
    let mut packet = Vec::new();
    builder.write(&mut packet, &[])?;
    let program = Program::of(injector.pid(), "guard")?;
    let (is_banned, is_over, passed) = (AtomicBool::new(false), AtomicBool::new(false), AtomicUsize::new(0));
    let send = |processor: usize| -> anyhow::Result<()> {
        bind_thread(processor)?;
        while !is_over.load(Ordering::Acquire) {
            let banned = is_banned.load(Ordering::Acquire);
            let answer = program.test_run(&packet, 100)?.answer;
            // What was asked before the end of a ban says nothing.
            if banned && is_banned.load(Ordering::Acquire) && answer != DROP {
                passed.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    };
    let send = &send;
    let change = || -> anyhow::Result<()> {
        for _ in 0..ROUNDS {
            injector.command(&["ban", &SOURCE.to_string()])?;
            is_banned.store(true, Ordering::Release);
            thread::sleep(Duration::from_millis(5));
            is_banned.store(false, Ordering::Release);
            injector.command(&["unban", &SOURCE.to_string()])?;
        }
        Ok(())
    };
    let outcome = testbed.topology.edge.run(|| {
        thread::scope(|scope| {
            let processors = thread::available_parallelism()?.get();
            let senders: Vec<_> = (0..processors).map(|it| scope.spawn(move || send(it))).collect();
            let outcome = change();
            is_over.store(true, Ordering::Release);
            let sent = senders.into_iter().map(|sender| sender.join().map_err(|_| anyhow!("panicked"))?);
            sent.collect::<anyhow::Result<()>>().and(outcome)
        })
    })?;
    outcome?;
    let passed = passed.into_inner();
    ensure!(passed == 0, "of {ROUNDS} bans, packets passed {passed} times after it was printed");
    Ok(())
}

fn without_daemon(testbed: &Testbed) -> anyhow::Result<()> {
    let injector = testbed.start(&RELAY, "")?;
    let address = client(Family::V4);
    testbed.ban(address, 32, FOREVER)?;
    // Dropping it kills it.
    drop(injector);
    let listeners = listeners(&RELAY, Family::V4);
    testbed.expect("a ban without a daemon", &listeners, Answer::Dropped)?;
    let soon = boottime_ns() + 300_000_000;
    testbed.ban(address, 32, soon)?;
    // The SYN that is repeated finds no listener.
    testbed.expect("the end of a ban", &listeners, Answer::Refused)?;
    ensure!(boottime_ns() >= soon, "the ban ended too early");
    Ok(())
}

fn xdp(testbed: &Testbed, setting: &str, shown: &str) -> anyhow::Result<()> {
    let injector = testbed.start(&ENGINES, &format!("xdp = \"{setting}\""))?;
    let link = testbed.link("outside")?;
    ensure!(link.contains(&format!(" {shown} ")), "ip link: {link}\n{}", injector.log());
    for family in Family::ALL {
        let [driver, others @ ..] = testbed.dropped_by_ban(&ENGINES, family)?;
        ensure!(driver >= 3 && others == [0; 2], "XDP dropped {driver}, and others behind it {others:?}");
    }
    // Once it is no longer configured, it goes.
    drop(injector);
    let _injector = testbed.start(&RELAY, "xdp = \"off\"")?;
    let link = testbed.link("outside")?;
    ensure!(!link.contains("xdp"), "ip link: {link}");
    Ok(())
}

fn xdp_taken(testbed: &Testbed) -> anyhow::Result<()> {
    let foreign = testbed.topology.edge.run(|| ForeignProgram::passing_xdp("outside"))??;
    let injector = testbed.start(&RELAY, "xdp = \"generic\"")?;
    let log = injector.log();
    ensure!(log.contains("another XDP program is attached to it: id"), "{log}");
    let [driver, ingress, _] = testbed.dropped_by_ban(&RELAY, Family::V4)?;
    ensure!(driver == 0 && ingress > 0, "XDP dropped {driver}, and the ingress {ingress}");
    drop(foreign);
    drop(injector);
    Ok(())
}

/// `0.0.0.0` and `[::]` stand for the IPv4 addresses of this host, not for those of hosts behind it.
fn unspecified(testbed: &Testbed) -> anyhow::Result<()> {
    for (xdp, bind) in [("off", "[::]"), ("generic", "0.0.0.0")] {
        let config = testbed.config(&RELAY, &format!("xdp = \"{xdp}\""));
        let [relay] = listeners(&RELAY, Family::V4)[..] else { bail!("one listener") };
        let config = config.replace(&relay.to_string(), &format!("{bind}:{ANY_PORT}"));
        let injector = Injector::start(&testbed.topology.edge, &config)?;
        let own = SocketAddr::new(unused(Family::V4), ANY_PORT);
        let behind = SocketAddr::new(MAIL.of(Family::V4), ANY_PORT);
        testbed.ban(client(Family::V4), 32, OVER)?;
        testbed.expect("no ban", &[own, behind], Answer::Accepted)?;
        testbed.ban(client(Family::V4), 32, FOREVER)?;
        // The next hop need not be known.
        testbed.topology.edge.ip(&["neigh", "flush", "dev", "inside"])?;
        let seen = testbed.answers(&[(own, Answer::Dropped), (behind, Answer::Accepted)])?;
        ensure!(
            seen == [Answer::Dropped, Answer::Accepted],
            "{bind}, xdp {xdp}: this host and the one behind it are {seen:?}"
        );
        // Or the next daemon would take the ban over, and reset the connections without one.
        testbed.ban(client(Family::V4), 32, OVER)?;
        // The next daemon would take the ban over, and reset the client's connections.
        drop(injector);
        testbed.detach()?;
    }
    Ok(())
}

fn later_device(testbed: &Testbed) -> anyhow::Result<()> {
    let injector = testbed.start(&ENGINES, "")?;
    let edge = &testbed.topology.edge;
    edge.ip(&["link", "add", "late", "type", "veth", "peer", "name", "later"])?;
    edge.ip(&["link", "set", "late", "up"])?;
    // Those of inline and of the guard.
    wait_for("the programs of a new device", || Ok(testbed.programs("late")? == 2))?;
    edge.ip(&["link", "set", "late", "down"])?;
    edge.ip(&["link", "set", "late", "name", "renamed"])?;
    edge.ip(&["link", "set", "renamed", "up"])?;
    ensure!(testbed.programs("renamed")? == 2, "a device that was renamed has other programs");
    let pins = || Ok::<_, anyhow::Error>(std::fs::read_dir(testbed.pin().join("layout1/links"))?.count());
    let before = pins()?;
    edge.ip(&["link", "del", "renamed"])?;
    wait_for("the pin of a device that is gone", || Ok(pins()? == before - 1))?;
    drop(injector);
    Ok(())
}

fn second_daemon(testbed: &Testbed) -> anyhow::Result<()> {
    let _injector = testbed.start(&RELAY, "")?;
    let other = testbed.config(&RELAY, "").replace("9145", "9146").replace(":2500\"", ":2501\"");
    let Err(refused) = Injector::start(&testbed.topology.edge, &other) else {
        bail!("a second guard was started")
    };
    let refused = format!("{refused:#}");
    ensure!(refused.contains("has [guard] in this network namespace: stop it first"), "{refused}");
    ensure!(testbed.detach().is_err(), "what a daemon uses was removed");
    Ok(())
}

fn resized(testbed: &Testbed) -> anyhow::Result<()> {
    let injector = testbed.start(&RELAY, "max_bans = 1000")?;
    testbed.ban(client(Family::V4), 32, FOREVER)?;
    drop(injector);
    let _injector = testbed.start(&RELAY, "max_bans = 2000")?;
    testbed.expect("a ban of the smaller map", &listeners(&RELAY, Family::V4), Answer::Dropped)?;
    let maps = testbed.pin().join("layout1/maps");
    ensure!(!maps.join("BANNED_ADDRESSES-old").exists(), "the former map is left");
    let capacity = DaemonMap::pinned(&maps.join("BANNED_ADDRESSES"))?.capacity()?;
    ensure!(capacity == 2000, "the map has room for {capacity}");
    Ok(())
}

fn nothing_left(testbed: &Testbed) -> anyhow::Result<()> {
    let injector = testbed.start(&RELAY, "xdp = \"generic\"")?;
    ensure!(testbed.link("outside")?.contains("xdpgeneric"), "no XDP");
    let with = testbed.programs("outside")?;
    drop(injector);
    let printed = testbed.detach()?;
    for what in ["BANNED_ADDRESSES", "links", "xdp-generic"] {
        ensure!(printed.contains(what), "{what} is not among what was removed: {printed}");
    }
    let without = testbed.programs("outside")?;
    ensure!(without + 1 == with, "{with} programs before, and {without} after");
    let link = testbed.link("outside")?;
    ensure!(!link.contains("xdp"), "ip link: {link}");
    ensure!(!testbed.pin().exists(), "{} is left", testbed.pin().display());
    ensure!(testbed.detach()?.contains("nothing was left"), "a second time there was something");
    // The same when a daemon starts without [guard].
    drop(testbed.start(&RELAY, "")?);
    let config = testbed.config(&RELAY, "");
    let (before, after) = config.split_once("[guard]").unwrap_or_default();
    let (_, listeners) = after.split_once("\n\n").unwrap_or_default();
    let injector = Injector::start(&testbed.topology.edge, &format!("{before}\n{listeners}"))?;
    let log = injector.log();
    ensure!(log.contains("what an earlier daemon's guard left was removed"), "{log}");
    ensure!(!testbed.pin().exists() && testbed.programs("outside")? == without, "something is left");
    Ok(())
}

fn self_test(testbed: &Testbed) -> anyhow::Result<()> {
    let mut command = testbed.topology.edge.command(injector_testbed::daemon::binary()?);
    let output = command.args(["selftest", "--json"]).output()?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let guard = &report["guard"];
    ensure!(guard["failure"].is_null(), "{guard:#}");
    let count = |what: &str| guard[what].as_array().map_or(0, Vec::len);
    ensure!((count("checks"), count("programs")) == (7, 3), "{guard:#}");
    Ok(())
}
