//! Devices, and changes of devices, addresses, routes and rules.

use std::ffi::CString;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use injector_testbed::netns::{Family, MAIL, Netns};
use injector_user::engine::attach::routes::{self, Changes, LinkKind};
use tokio::time::timeout;

use crate::testbed::Testbed;

pub(crate) fn interfaces(testbed: &Testbed) -> anyhow::Result<()> {
    let edge = &testbed.topology.edge;
    edge.ip(&["link", "add", "spare0", "type", "veth", "peer", "name", "spare1"])?;
    edge.ip(&["link", "set", "spare0", "up"])?;
    let names = |expected: &'static [&str]| {
        testbed.block_on_edge(move || async move {
            let interfaces = routes::interfaces()?;
            let up = interfaces.iter().filter(|interface| interface.up && !interface.loopback);
            let mut names: Vec<_> = up.map(|interface| interface.name.as_str()).collect();
            names.sort_unstable();
            ensure!(names == expected, "{names:?} instead of {expected:?}");
            Ok(())
        })
    };
    names(&["inside", "outside", "spare0"])?;
    edge.ip(&["link", "set", "inside", "down"])?;
    names(&["outside", "spare0"])?;
    edge.ip(&["link", "del", "spare0"])?;
    names(&["outside"])
}

pub(crate) fn kinds(testbed: &Testbed) -> anyhow::Result<()> {
    let edge = &testbed.topology.edge;
    edge.ip(&["tuntap", "add", "dev", "tun0", "mode", "tun"])?;
    testbed.block_on_edge(|| async {
        let interfaces = routes::interfaces()?;
        let find = |name: &str| interfaces.iter().find(|it| it.name == name).context("no such interface");
        let (tun, inside, lo) = (find("tun0")?, find("inside")?, find("lo")?);
        ensure!(tun.kind == LinkKind::Headerless && !tun.up && !tun.loopback, "{tun:?}");
        ensure!(inside.kind == LinkKind::Ethernet && inside.up && !inside.loopback, "{inside:?}");
        ensure!(lo.loopback && lo.index == 1, "{lo:?}");
        let c_name = CString::new("inside")?;
        // SAFETY: if_nametoindex reads the string, which ends with a zero and lives for the whole
        // call.
        let index = unsafe { libc::if_nametoindex(c_name.as_ptr()) };
        ensure!(inside.index == index, "{inside:?} is number {index}");
        Ok(())
    })
}

pub(crate) fn changes(testbed: &Testbed) -> anyhow::Result<()> {
    let edge = &testbed.topology.edge;
    edge.ip(&["link", "add", "spare0", "type", "veth", "peer", "name", "spare1"])?;
    let mail = MAIL.of(Family::V4);
    testbed.block_on_edge(|| async {
        let mut changes = Changes::watch()?;
        quiet(&mut changes).await?;

        after(&mut changes, edge, &["link", "set", "inside", "down"]).await?;
        after(&mut changes, edge, &["link", "set", "inside", "up"]).await?;
        let through_spare = format!("{mail}/32");
        after(&mut changes, edge, &["link", "set", "spare0", "up"]).await?;
        after(&mut changes, edge, &["route", "add", &through_spare, "dev", "spare0"]).await?;
        after(&mut changes, edge, &["link", "set", "spare0", "name", "renamed0"]).await?;
        after(&mut changes, edge, &["link", "del", "renamed0"]).await?;
        after(&mut changes, edge, &["address", "add", &through_spare, "dev", "outside"]).await?;
        after(&mut changes, edge, &["address", "del", &through_spare, "dev", "outside"]).await?;
        after(&mut changes, edge, &["rule", "add", "to", &through_spare, "unreachable"]).await?;
        after(&mut changes, edge, &["rule", "del", "to", &through_spare, "unreachable"]).await?;

        burst(&mut changes, edge).await
    })
}

/// Several changes, a few milliseconds apart, are reported as one.
async fn burst(changes: &mut Changes, edge: &Netns) -> anyhow::Result<()> {
    for last in 1..=4_u8 {
        let to = IpAddr::from([203, 0, 113, last]);
        edge.ip(&["route", "add", &to.to_string(), "dev", "inside"])?;
        // As in a select loop: waits, and is interrupted.
        let early = timeout(Duration::from_millis(5), changes.next()).await;
        ensure!(early.is_err(), "reported after {last} of 4");
    }
    timeout(Duration::from_secs(2), changes.next())
        .await
        .context("what a cancelled call received is lost")??;
    quiet(changes).await
}

/// Makes a change and waits until it is reported.
async fn after(changes: &mut Changes, edge: &Netns, ip: &[&str]) -> anyhow::Result<()> {
    edge.ip(ip)?;
    let start = Instant::now();
    let reported = timeout(Duration::from_secs(5), changes.next()).await;
    reported.with_context(|| format!("ip {}: no change was reported", ip.join(" ")))??;
    ensure!(start.elapsed() < Duration::from_secs(2), "ip {}: after {:?}", ip.join(" "), start.elapsed());
    Ok(())
}

/// Waits until delayed events of earlier changes (such as usable IPv6 addresses) have passed.
async fn quiet(changes: &mut Changes) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_secs(15);
    while timeout(Duration::from_secs(1), changes.next()).await.is_ok() {
        ensure!(Instant::now() < end, "changes are reported without end");
    }
    Ok(())
}
