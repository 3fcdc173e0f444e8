//! How the programs are attached, beside those of others, and what `injector status` and `injector
//! doctor` say of it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind, Read as _};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use injector_testbed::bpf;
use injector_testbed::daemon::{self, Injector};
use injector_testbed::netns::{Family, Netns};
use serde_json::{Value, json};

use crate::Run;
use crate::testbed::{Answer, Testbed, client, listeners, wait_for};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("clsact, behind inline and beside another program's filter", clsact),
    ("clsact, a filter in front that accepts packets: the second gate", second_gate),
    ("status and doctor name what is missing", missing),
    ("a daemon that may not read programs knows its own by their pins", unreadable),
    ("devices in other network namespaces, with the same index", other_namespace),
];

const ENGINES: [&str; 3] = ["splice", "relay", "inline"];
const RELAY: [&str; 1] = ["relay"];

/// Matches no packet: the next filter runs.
const PASSES_ON: [&str; 6] = ["match", "u32", "0xffffffff", "0xffffffff", "at", "16"];
/// Matches every packet: `TC_ACT_OK`, and no other filter runs.
const ACCEPTS: [&str; 6] = ["match", "u32", "0", "0", "at", "0"];

/// A filter of another program at the ingress of `outside`, removed on drop with the qdisc.
struct Foreign<'a>(&'a Testbed);

impl<'a> Foreign<'a> {
    /// At the second priority, with these words of tc-u32(8).
    fn new(testbed: &'a Testbed, matches: &[&str]) -> anyhow::Result<Self> {
        tc(testbed, &["qdisc", "add", "dev", "outside", "clsact"])?;
        let foreign = Self(testbed);
        let filter = ["filter", "add", "dev", "outside", "ingress", "pref", "2", "protocol", "all", "u32"];
        tc(testbed, &[&filter, matches, &["classid", "1:1"]].concat())?;
        Ok(foreign)
    }
}

impl Drop for Foreign<'_> {
    fn drop(&mut self) {
        if let Err(error) = tc(self.0, &["qdisc", "del", "dev", "outside", "clsact"]) {
            eprintln!("{error:#}");
        }
    }
}

fn tc(testbed: &Testbed, words: &[&str]) -> anyhow::Result<String> {
    let output = testbed.topology.edge.command("tc").args(words).output()?;
    ensure!(output.status.success(), "tc {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Whose filters run at the ingress of `outside`, in their order.
fn filters(testbed: &Testbed) -> anyhow::Result<Vec<&'static str>> {
    let shown = tc(testbed, &["filter", "show", "dev", "outside", "ingress"])?;
    // `… handle 0x… inline direct-action …`, and `… fh 800::800 … classid 1:1 …` (or flowid).
    let owner = |line: &str| match line {
        line if line.contains(" inline ") => Some("inline"),
        line if line.contains(" guard ") => Some("guard"),
        line if line.contains("800::800") => Some("foreign"),
        _ => None,
    };
    Ok(shown.lines().filter_map(owner).collect())
}

fn with_clsact(config: &str) -> String {
    config.replacen("[inline]\n", "[inline]\nattachment = \"clsact\"\n", 1)
}

fn clsact(testbed: &Testbed) -> anyhow::Result<()> {
    let foreign = Foreign::new(testbed, &PASSES_ON)?;
    let config = testbed.config(&ENGINES, "");
    let edge = &testbed.topology.edge;
    let injector = Injector::start(edge, &with_clsact(&config))?;
    ensure!(filters(testbed)? == ["inline", "foreign", "guard"], "filters: {:?}", filters(testbed)?);
    ensure!(testbed.programs("outside")? == 0, "tcx programs beside the filters");
    let device = &injector.status()?["guard"]["devices"][0];
    ensure!(device["ingress"] == "clsact", "status: {device}");
    for family in Family::ALL {
        let [_, ingress, inline] = testbed.dropped_by_ban(&ENGINES, family)?;
        ensure!(ingress >= 2 && inline > 0, "the ingress dropped {ingress}, and inline {inline}");
    }
    let banned = listeners(&ENGINES, Family::V4);
    drop(injector);
    testbed.expect("filters without a daemon", &banned, Answer::Dropped)?;
    // The next daemon takes tcx: its filters go, and the other program's stays.
    let injector = Injector::start_next(edge, &config)?;
    ensure!(filters(testbed)? == ["foreign"], "filters beside tcx: {:?}", filters(testbed)?);
    ensure!(testbed.programs("outside")? == 2, "tcx has no programs");
    testbed.expect("tcx after clsact", &banned, Answer::Dropped)?;
    drop(injector);
    let injector = Injector::start_next(edge, &with_clsact(&config))?;
    ensure!(filters(testbed)? == ["inline", "foreign", "guard"], "filters: {:?}", filters(testbed)?);
    testbed.expect("clsact after tcx", &banned, Answer::Dropped)?;
    drop(injector);
    testbed.detach()?;
    ensure!(filters(testbed)? == ["inline", "foreign"], "filters after detach: {:?}", filters(testbed)?);
    drop(foreign);
    Ok(())
}

/// The guard's filter is behind another one that accepts all packets. The daemon resets the connections.
fn second_gate(testbed: &Testbed) -> anyhow::Result<()> {
    let _foreign = Foreign::new(testbed, &ACCEPTS)?;
    let injector = Injector::start(&testbed.topology.edge, &with_clsact(&testbed.config(&RELAY, "")))?;
    let address = client(Family::V4);
    let [listener] = listeners(&RELAY, Family::V4)[..] else { bail!("one listener") };
    // The reset may come before connect(2) returns.
    let read = || {
        let mut stream = TcpStream::connect_timeout(&listener, Duration::from_secs(3))?;
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        stream.read(&mut [0; 1])
    };
    injector.command(&["ban", &address.to_string()])?;
    let before = testbed.dropped()?;
    let seen = testbed.topology.client.run(read)?;
    ensure!(
        seen.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset),
        "a banned client read {seen:?}"
    );
    ensure!(
        testbed.dropped()? == before,
        "the guard's filter dropped packets, although another accepts them"
    );
    let rejected = || {
        injector.metrics().map(|all| all.sum("injector_connections_rejected_total", &[("reason", "banned")]))
    };
    wait_for("the count of rejected connections", || Ok(rejected()? >= 1.0))
}

/// Programs that it may not read may be an earlier injector's of engine inline, of which the daemon warns. Those
/// of the guard are not.
fn unreadable(testbed: &Testbed) -> anyhow::Result<()> {
    const WARNING: &str = "this process may not read what they are";
    let start = |config: &str| {
        let by = ["setpriv", "--bounding-set=-sys_admin", "sh", "-c"];
        Injector::start_by(&testbed.topology.edge, &by, config)
    };
    let config = testbed.config(&RELAY, "");
    // The second one finds the programs of the first.
    for daemon in ["first", "second"] {
        let injector = start(&config)?;
        ensure!(
            injector.status()?["guard"]["devices"][0]["ingress"] == "tcx",
            "the {daemon} has no programs"
        );
        ensure!(!injector.log().contains(WARNING), "the {daemon}: {}", injector.log());
    }
    Ok(())
}

fn missing(testbed: &Testbed) -> anyhow::Result<()> {
    let guard = "xdp = \"generic\"\ndevices = [\"outside\", \"nonexistent\"]";
    let injector = testbed.start(&RELAY, guard)?;
    let attached = json!({ "name": "outside", "ingress": "tcx", "ingress_error": null, "xdp": "generic", "xdp_error": null });
    let absent = json!({ "name": "nonexistent", "ingress": null, "ingress_error": "it does not exist", "xdp": null, "xdp_error": null });
    let status = || Ok::<_, anyhow::Error>(injector.status()?["guard"].clone());
    ensure!(status()?["devices"] == json!([attached, absent]), "{:#}", status()?);
    ensure!(
        faults(testbed, &injector)? == ["nonexistent: no program at the ingress: it does not exist"],
        "doctor"
    );
    let pins = fs::read_dir(testbed.pin().join("layout1/maps"))?.map(|pin| Ok(pin?.path()));
    let pins = pins.collect::<io::Result<BTreeSet<_>>>()?;
    ensure!(pins.len() > 5, "{pins:?}");
    pins.iter().try_for_each(fs::remove_file)?;
    // A notification of the kernel has the daemon look at once.
    testbed.topology.edge.ip(&["link", "set", "dev", "inside", "alias", "seen"])?;
    wait_for("the missing pins", || {
        Ok(serde_json::from_value::<BTreeSet<PathBuf>>(status()?["missing_pins"].clone())? == pins)
    })?;
    let faults = faults(testbed, &injector)?;
    ensure!(faults.len() == 1 + pins.len(), "doctor: {faults:?}");
    ensure!(faults[1..].iter().all(|fault| fault.ends_with(" was removed")), "doctor: {faults:?}");
    let page = injector.command(&["status"])?;
    ensure!(page.contains("  programs on outside (tcx, XDP generic)\n"), "{page}");
    let log = injector.log();
    ensure!(log.contains("pins of the guard's maps were removed"), "{log}");
    Ok(())
}

/// A device that was moved to another network namespace keeps its programs. They are not those of the device that has
/// its index here, and a daemon leaves alone what it does not find in its own namespace.
fn other_namespace(testbed: &Testbed) -> anyhow::Result<()> {
    const INDEX: &str = "4711";
    const OTHER_INDEX: &str = "4712";
    let (edge, elsewhere) = (&testbed.topology.edge, Netns::new("elsewhere-guard")?);
    let add = |peer_index: &str| {
        let device = ["link", "add", "moved", "index", INDEX, "type", "veth"];
        edge.ip(&[&device[..], &["peer", "name", "peer", "index", peer_index]].concat())?;
        ["moved", "peer"].iter().try_for_each(|device| edge.ip(&["link", "set", device, "up"]))
    };
    let both = |programs: usize, link: &str| programs == 2 && link.contains("xdpgeneric");
    let here = || Ok(both(testbed.programs("moved")?, &testbed.link("moved")?));
    let there = |device: &str| {
        let link = elsewhere.command("ip").args(["-details", "link", "show", "dev", device]).output()?;
        let programs = elsewhere.run(|| bpf::tcx_links(device))??.len();
        anyhow::Ok(both(programs, &String::from_utf8_lossy(&link.stdout)))
    };
    let config = testbed.config(&ENGINES, "xdp = \"generic\"");
    add(OTHER_INDEX)?;
    let injector = Injector::start(edge, &config)?;
    wait_for("the programs of a device", here)?;
    drop(injector);
    for device in ["moved", "peer"] {
        edge.ip(&["link", "set", device, "netns", elsewhere.name()])?;
        elsewhere.ip(&["link", "set", device, "up"])?;
        ensure!(there(device)?, "{device} has lost its programs");
    }
    // As the pins of the other namespace's daemons are named.
    let (own, other) = (edge.run(inode)??, elsewhere.run(inode)??);
    let parts = ["guard/layout1/links", "guard/layout1/xdp-generic", "inline/v7/links"];
    let pins = parts.map(|part| testbed.pin().with_file_name(part));
    for part in &pins {
        let [from, to] = [own, other].map(|namespace| part.join(format!("{namespace}-{OTHER_INDEX}")));
        fs::rename(from, to)?;
    }
    add("4713")?;
    let injector = Injector::start(edge, &config)?;
    wait_for("the programs of a device with the same index", here)?;
    for part in &pins {
        let pin = part.join(format!("{other}-{OTHER_INDEX}"));
        ensure!(pin.exists(), "{} was removed", pin.display());
    }
    ensure!(there("peer")?, "the device in the other namespace has lost its programs");
    edge.ip(&["link", "del", "moved"])?;
    drop(injector);
    Ok(())
}

/// The inode of this thread's network namespace.
fn inode() -> std::io::Result<u64> {
    Ok(fs::metadata("/proc/thread-self/ns/net")?.ino())
}

/// What `injector doctor` finds of the guard, up to the consequence.
fn faults(testbed: &Testbed, injector: &Injector) -> anyhow::Result<Vec<String>> {
    let file = injector.admin_socket().with_file_name("injector.toml");
    let mut command = testbed.topology.edge.command(daemon::binary()?);
    command.args(["doctor", "--json", "--timeout", "100ms", "--config"]).arg(file);
    let output = command.output()?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let findings = report["guard"].as_array().context("no findings")?;
    let of_guard = |finding: &Value| finding["verdict"] == "guard_incomplete" && finding["fault"] == true;
    ensure!(findings.iter().all(of_guard), "{findings:?}");
    let message = |finding: &Value| {
        let message = finding["message"].as_str().unwrap_or_default();
        message
            .split([';'])
            .next()
            .unwrap_or_default()
            .split(": the bans in it")
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    Ok(findings.iter().map(message).collect())
}
