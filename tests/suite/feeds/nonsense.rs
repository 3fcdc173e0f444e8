//! A LAPI that answers nonsense, too much, or too slowly: mail goes on, and memory has a limit.

use std::fs;
use std::io::Write as _;
use std::net::{Ipv4Addr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use injector_testbed::sockets::LIMIT;

use crate::Run;
use crate::lapi_stub::{ADDRESS, Answer, Stub, respond};
use crate::testbed::{Testbed, key_file};

pub(crate) const TRIALS: &[(&str, Run)] = &[("crowdsec/nonsense", nonsense)];

/// The injector's `guard.max_bans`.
const MAX_BANS: usize = 10_000;
/// How much more memory it may take, in KiB. Ten thousand bans take 2 MiB.
const MAX_GROWTH: u64 = 32 << 10;
/// The longest time of a session. Two cores are shared with everything else that runs.
const MAX_SESSION: Duration = Duration::from_secs(2);

/// After each of them the injector asks for all decisions; the last one does not end while the trial runs.
const CHANGES: &[Answer] = &[
    |stream| respond(stream, "200 OK", "<!DOCTYPE html><html><body><h1>502 Bad Gateway</h1></body></html>"),
    ten_million,
    one_string,
    one_header,
    one_byte_a_second,
];

fn entry(address: Ipv4Addr) -> String {
    format!(
        r#"{{"duration":"3h59m57.12s","id":1,"origin":"CAPI","scenario":"crowdsecurity/ssh-bf","scope":"Ip","type":"ban","value":"{address}"}}"#
    )
}

/// All decisions: one.
fn good(stream: &mut TcpStream) -> std::io::Result<()> {
    respond(
        stream,
        "200 OK",
        &format!(r#"{{"deleted":null,"new":[{}]}}"#, entry(Ipv4Addr::new(203, 0, 113, 1))),
    )
}

fn head(stream: &mut TcpStream) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n")
}

fn ten_million(stream: &mut TcpStream) -> std::io::Result<()> {
    head(stream)?;
    stream.write_all(br#"{"new":["#)?;
    for block in 0..10_000u32 {
        let addresses = (0..1000).map(|at| Ipv4Addr::from(0x0B00_0000 + block * 1000 + at));
        let entries: Vec<_> = addresses.map(entry).collect();
        stream.write_all(entries.join(",").as_bytes())?;
        stream.write_all(b",")?;
    }
    stream.write_all(br#"{}]}"#)
}

fn one_string(stream: &mut TcpStream) -> std::io::Result<()> {
    head(stream)?;
    stream.write_all(br#"{"new":[{"value":""#)?;
    loop {
        stream.write_all(&[b'x'; 65_536])?;
    }
}

fn one_header(stream: &mut TcpStream) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 200 OK\r\nX-Long: ")?;
    loop {
        stream.write_all(&[b'x'; 65_536])?;
    }
}

fn one_byte_a_second(stream: &mut TcpStream) -> std::io::Result<()> {
    head(stream)?;
    loop {
        stream.write_all(b" ")?;
        thread::sleep(Duration::from_secs(1));
    }
}

fn peak_memory(pid: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn nonsense(testbed: &Testbed) -> anyhow::Result<()> {
    let stub = Stub::start(&testbed.topology.edge, good, CHANGES)?;
    let (_dir, key) = key_file("key")?;
    let table = format!(
        "[guard]\nmax_bans = {MAX_BANS}\n\n[guard.crowdsec]\nurl = \"http://{ADDRESS}\"\napi_key_file = \"{}\"\n\
         interval = \"1s\"\nusage_metrics = false\n",
        key.display()
    );
    let injector = testbed.injector(&table)?;
    testbed.session()?;
    let before = peak_memory(injector.pid())?;
    let (mut sessions, mut longest) = (0, Duration::ZERO);
    let (start, mut slow_since) = (Instant::now(), None);
    while slow_since.is_none_or(|since: Instant| since.elapsed() < Duration::from_secs(1)) {
        ensure!(start.elapsed() < 3 * LIMIT, "only {} answers were asked for", stub.answered());
        let next = Instant::now() + Duration::from_millis(100);
        longest = longest.max(testbed.session()?);
        sessions += 1;
        if stub.answered() >= CHANGES.len() {
            slow_since.get_or_insert_with(Instant::now);
        }
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let growth = peak_memory(injector.pid())?.saturating_sub(before);
    println!("  {sessions} sessions, the longest {longest:?}; {growth} KiB more memory than at first");
    ensure!(longest < MAX_SESSION, "a session took {longest:?}");
    ensure!(growth < MAX_GROWTH, "{growth} KiB more memory");
    let metrics = injector.metrics()?;
    let failures = metrics.sum("injector_guard_crowdsec_failures_total", &[]);
    // All but the last, which goes on.
    ensure!(failures >= (CHANGES.len() - 1) as f64, "only {failures} of the answers are failures");
    let bans = metrics.sum("injector_guard_bans", &[("origin", "crowdsec")]);
    ensure!(bans == 1.0, "{bans} bans instead of the one of the last good answer");
    // The thread that waits for the LAPI does not delay the exit.
    let stopping = Instant::now();
    injector.stop()?;
    ensure!(stopping.elapsed() < Duration::from_secs(5), "the exit took {:?}", stopping.elapsed());
    Ok(())
}
