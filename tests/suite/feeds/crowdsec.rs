//! The decisions of Debian's CrowdSec.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::ensure;
use injector_testbed::certificate::Certificate;
use injector_testbed::crowdsec::{CrowdSec, LAPI};
use injector_testbed::daemon::Injector;
use injector_testbed::netns::{CLIENT, Family, scratch_dir};
use injector_testbed::wait::wait_until;

use crate::Run;
use crate::testbed::{Testbed, config, key_file};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("crowdsec/decisions of an LAPI", decisions),
    ("crowdsec/an LAPI that is away", away),
    ("crowdsec/TLS by a private authority, and a wrong key", tls),
];

const UP: &str = "injector_guard_crowdsec_up";
const FAILURES: &str = "injector_guard_crowdsec_failures_total";
const IGNORED: &str = "injector_guard_crowdsec_ignored_total";
/// The message about an LAPI without usage metrics.
const NO_USAGE: &str = "this CrowdSec does not know usage metrics";
/// The message about a failed request.
const FAILED: &str = "no decisions of CrowdSec;";

fn table(scheme: &str, key: &Path, more: &str) -> String {
    format!(
        "[guard.crowdsec]\nurl = \"{scheme}://{LAPI}\"\napi_key_file = \"{}\"\ninterval = \"1s\"\n{more}",
        key.display()
    )
}

fn wait_up(injector: &Injector, up: bool) -> anyhow::Result<()> {
    let value = if up { 1.0 } else { 0.0 };
    wait_until(UP, || Ok(injector.metrics()?.sum(UP, &[])), |now| *now == value).map(drop)
}

fn decisions(testbed: &Testbed) -> anyhow::Result<()> {
    let lapi = CrowdSec::start(&testbed.topology.edge, None)?;
    let (_dir, key) = key_file(&lapi.add_bouncer("edge")?)?;
    let injector = testbed.injector(&table("http", &key, ""))?;
    wait_up(&injector, true)?;
    ensure!(testbed.is_served(Family::V4)? && testbed.is_served(Family::V6)?, "banned without a decision");
    // Debian's is older than usage metrics, and answers 404 to them. It is asked once, and nothing stops.
    let unknown = || Ok(injector.log().matches(NO_USAGE).count());
    wait_until(NO_USAGE, unknown, |times| *times == 1)?;

    let (v4, v6) = (CLIENT.v4.to_string(), CLIENT.v6.to_string());
    let started = Instant::now();
    lapi.cscli(&["decisions", "add", "-i", &v4, "-d", "10m"])?;
    let added = Instant::now();
    let from_end = testbed.wait_served(Family::V4, false, added)?;
    println!(
        "  refused {from_end:?} after `cscli decisions add` returned, {:?} after it began",
        from_end + (added - started)
    );
    ensure!(testbed.is_served(Family::V6)?, "another address is banned too");
    let of_cscli =
        || Ok(injector.metrics()?.sum("injector_guard_crowdsec_decisions", &[("origin", "cscli")]));
    wait_until("the count of decisions", of_cscli, |count| *count == 1.0)?;
    lapi.cscli(&["decisions", "add", "-i", &v6, "-d", "10m"])?;
    testbed.wait_served(Family::V6, false, Instant::now())?;
    lapi.cscli(&["decisions", "delete", "-i", &v4])?;
    testbed.wait_served(Family::V4, true, Instant::now())?;
    ensure!(!testbed.is_served(Family::V6)?, "the other ban was lifted too");

    // A range, as a captcha. The edge's own address is in it.
    lapi.cscli(&["decisions", "add", "-r", "198.51.100.0/24", "-t", "captcha"])?;
    testbed.wait_served(Family::V4, false, Instant::now())?;
    lapi.cscli(&["decisions", "delete", "-r", "198.51.100.0/24"])?;
    testbed.wait_served(Family::V4, true, Instant::now())?;

    // What is no ban here.
    lapi.cscli(&["decisions", "add", "--scope", "country", "--value", "DE"])?;
    lapi.cscli(&["decisions", "add", "-i", &v4, "-t", "throttle"])?;
    let ignored = || Ok(injector.metrics()?.sum(IGNORED, &[("reason", "type")]));
    wait_until("the unknown type", ignored, |count| *count >= 1.0)?;
    ensure!(testbed.is_served(Family::V4)?, "an unknown type is a ban");

    // A reload with `captcha = "ignore"`, and one without CrowdSec.
    lapi.cscli(&["decisions", "add", "-i", &v4, "-t", "captcha"])?;
    testbed.wait_served(Family::V4, false, Instant::now())?;
    injector.rewrite(&config(&table("http", &key, "captcha = \"ignore\"\n")))?;
    injector.command(&["reload"])?;
    testbed.wait_served(Family::V4, true, Instant::now())?;
    ensure!(!testbed.is_served(Family::V6)?, "the reload lifted a ban");
    injector.rewrite(&config("[guard]\n"))?;
    injector.command(&["reload"])?;
    testbed.wait_served(Family::V6, true, Instant::now())?;
    ensure!(injector.metrics()?.sum(FAILURES, &[]) == 0.0, "a request failed");
    ensure!(unknown()? == 2, "usage metrics were sent {} times: once by each configuration", unknown()?);
    Ok(())
}

fn away(testbed: &Testbed) -> anyhow::Result<()> {
    let edge = &testbed.topology.edge;
    let mut lapi = CrowdSec::start(edge, None)?;
    let (_dir, key) = key_file(&lapi.add_bouncer("edge")?)?;
    let injector = testbed.injector(&table("http", &key, ""))?;
    let client = CLIENT.v4.to_string();
    lapi.cscli(&["decisions", "add", "-i", &client, "-d", "10m"])?;
    testbed.wait_served(Family::V4, false, Instant::now())?;
    lapi.kill();
    wait_up(&injector, false)?;
    let failures = || Ok(injector.metrics()?.sum(FAILURES, &[]));
    wait_until("more attempts", failures, |count| *count >= 2.0)?;
    ensure!(!testbed.is_served(Family::V4)?, "the ban ended with the LAPI");
    let logged = injector.log().matches(FAILED).count();
    ensure!(logged == 1, "the same failure is logged {logged} times:\n{}", injector.log());
    // What changed meanwhile counts.
    lapi.run(edge)?;
    lapi.cscli(&["decisions", "delete", "-i", &client])?;
    testbed.wait_served(Family::V4, true, Instant::now())?;
    wait_up(&injector, true)?;
    ensure!(injector.log().contains("CrowdSec answers again"), "{}", injector.log());
    Ok(())
}

fn tls(testbed: &Testbed) -> anyhow::Result<()> {
    let dir = scratch_dir("tls")?;
    fs::create_dir(dir.path().join("other"))?;
    let (own, other) = (Certificate::new(dir.path())?, Certificate::new(&dir.path().join("other"))?);
    let ca = dir.path().join("ca.pem");
    fs::write(&ca, &other.authority_pem)?;
    let lapi = CrowdSec::start(&testbed.topology.edge, Some(&own))?;
    lapi.cscli(&["decisions", "add", "-i", &CLIENT.v4.to_string(), "-d", "10m"])?;
    let (_dir, key) = key_file("wrong")?;
    let injector = testbed.injector(&table("https", &key, &format!("ca_file = \"{}\"\n", ca.display())))?;
    let wait_logged =
        |words: &'static str| wait_until(words, || Ok(injector.log()), |log| log.contains(words)).map(drop);
    // Each of them is logged once: the cause is another one.
    wait_logged("invalid peer certificate")?;
    fs::write(&ca, &own.authority_pem)?;
    wait_logged("the LAPI rejected the API key with status 403")?;
    ensure!(testbed.is_served(Family::V4)?, "banned without a decision");
    fs::write(&key, lapi.add_bouncer("edge")?)?;
    testbed.wait_served(Family::V4, false, Instant::now())?;
    Ok(())
}
