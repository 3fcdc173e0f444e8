//! Routes to backends, and changes of routes.

use std::ffi::CString;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use injector_testbed::netns::{CLIENT, EDGE_INSIDE, Family, MAIL, Netns, VIP_INLINE};
use injector_user::engine::inline::routes::{Changes, LinkKind, RouteError, Routes};
use tokio::time::timeout;

use crate::testbed::Testbed;

pub(crate) fn towards(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    testbed.block_on_edge(|| async {
        let routes = Routes::open()?;
        for (place, name) in [(MAIL, "inside"), (CLIENT, "outside")] {
            let interface = routes.towards(place.of(family)).await?;
            ensure!(interface.name == name && interface.kind == LinkKind::Ethernet, "{interface:?}");
            let c_name = CString::new(name)?;
            // SAFETY: if_nametoindex reads the string, which ends with a zero and lives for the
            // whole call.
            let index = unsafe { libc::if_nametoindex(c_name.as_ptr()) };
            ensure!(interface.index == index, "{interface:?} is number {index}");
        }
        for local in [VIP_INLINE, EDGE_INSIDE] {
            let refused = routes.towards(local.of(family)).await;
            ensure!(matches!(refused, Err(RouteError::Local { .. })), "{local:?}: {refused:?}");
        }
        Ok(())
    })
}

pub(crate) fn kinds(testbed: &Testbed) -> anyhow::Result<()> {
    let edge = &testbed.topology.edge;
    edge.ip(&["tuntap", "add", "dev", "tun0", "mode", "tun"])?;
    edge.ip(&["link", "set", "tun0", "up"])?;
    edge.ip(&["route", "add", "10.99.0.0/24", "dev", "tun0"])?;
    edge.ip(&["route", "add", "2001:db8:99::/64", "dev", "tun0"])?;
    for kind in ["unreachable", "blackhole", "prohibit"] {
        edge.ip(&["route", "add", kind, &format!("{}.0.0.0/8", 20 + kind.len())])?;
        edge.ip(&["route", "add", kind, &format!("2001:db8:{}::/64", kind.len())])?;
    }
    testbed.block_on_edge(|| async {
        let routes = Routes::open()?;
        for headerless in ["10.99.0.9", "2001:db8:99::9"] {
            let interface = routes.towards(headerless.parse()?).await?;
            ensure!(interface.name == "tun0" && interface.kind == LinkKind::Headerless, "{interface:?}");
        }
        for local in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            let error = routes.towards(local.parse()?).await.err().context(local)?;
            ensure!(matches!(error, RouteError::Local { .. }), "{local}: {error}");
            ensure!(error.to_string().contains("an address of this host"), "{error}");
        }
        let rejecting = ["unreachable", "blackhole", "prohibit"].map(str::len);
        let v4 = rejecting.map(|len| format!("{}.0.0.1", 20 + len));
        let v6 = rejecting.map(|len| format!("2001:db8:{len}::1"));
        let nowhere = ["203.0.113.9".to_owned(), "2001:db8:ffff::9".to_owned()];
        for address in v4.into_iter().chain(v6).chain(nowhere) {
            let error = routes.towards(address.parse()?).await.err().context(address.clone())?;
            ensure!(matches!(error, RouteError::Unreachable { .. }), "{address}: {error:?}");
            ensure!(error.to_string().contains(&format!("no route to {address}")), "{error}");
        }
        for odd in ["ff02::5", "10.25.0.255"] {
            let error = routes.towards(odd.parse()?).await.err().context(odd)?;
            ensure!(matches!(error, RouteError::NotUnicast { .. }), "{odd}: {error:?}");
        }
        Ok(())
    })
}

pub(crate) fn interfaces(testbed: &Testbed) -> anyhow::Result<()> {
    let edge = &testbed.topology.edge;
    edge.ip(&["link", "add", "spare0", "type", "veth", "peer", "name", "spare1"])?;
    edge.ip(&["link", "set", "spare0", "up"])?;
    let names = |expected: &'static [&str]| {
        testbed.block_on_edge(move || async move {
            let interfaces = Routes::open()?.interfaces().await?;
            let mut names: Vec<_> = interfaces.iter().map(|interface| interface.name.as_str()).collect();
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

pub(crate) fn changes(testbed: &Testbed) -> anyhow::Result<()> {
    let edge = &testbed.topology.edge;
    edge.ip(&["link", "add", "spare0", "type", "veth", "peer", "name", "spare1"])?;
    let mail = MAIL.of(Family::V4);
    testbed.block_on_edge(|| async {
        let mut changes = Changes::watch()?;
        let routes = Routes::open()?;
        quiet(&mut changes).await?;

        after(&mut changes, edge, &["link", "set", "inside", "down"]).await?;
        ensure!(routes.towards(mail).await.is_err(), "still reached");
        after(&mut changes, edge, &["link", "set", "inside", "up"]).await?;
        ensure!(routes.towards(mail).await?.name == "inside");

        let through_spare = format!("{mail}/32");
        after(&mut changes, edge, &["link", "set", "spare0", "up"]).await?;
        after(&mut changes, edge, &["route", "add", &through_spare, "dev", "spare0"]).await?;
        ensure!(routes.towards(mail).await?.name == "spare0");
        after(&mut changes, edge, &["link", "del", "spare0"]).await?;
        ensure!(routes.towards(mail).await?.name == "inside");

        after(&mut changes, edge, &["address", "add", &through_spare, "dev", "outside"]).await?;
        ensure!(matches!(routes.towards(mail).await, Err(RouteError::Local { .. })));
        after(&mut changes, edge, &["address", "del", &through_spare, "dev", "outside"]).await?;

        after(&mut changes, edge, &["rule", "add", "to", &through_spare, "unreachable"]).await?;
        ensure!(matches!(routes.towards(mail).await, Err(RouteError::Unreachable { .. })));
        after(&mut changes, edge, &["rule", "del", "to", &through_spare, "unreachable"]).await?;

        burst(&mut changes, edge).await
    })
}

/// Several changes, 20 ms apart, are reported as one.
async fn burst(changes: &mut Changes, edge: &Netns) -> anyhow::Result<()> {
    for last in 1..=10_u8 {
        let to = IpAddr::from([203, 0, 113, last]);
        edge.ip(&["route", "add", &to.to_string(), "dev", "inside"])?;
        // As in a select loop: waits, and is interrupted.
        let early = timeout(Duration::from_millis(20), changes.next()).await;
        ensure!(early.is_err(), "reported after {last} of 10");
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
