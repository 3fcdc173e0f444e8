//! The nftables table: its owner, its contents, and other tables.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, ensure};
use caps::{CapSet, Capability};
use injector_testbed::netns::{Family, MAIL};
use injector_user::engine::inline::nat::{
    Backend, Change, NftError, Service, chains_that_drop_forwarded, remove,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::testbed::{
    BACKEND_PORT, OTHER_MAIL, PORT, Testbed, backend, elsewhere, greeted, rules, service, socket, table, vip,
};

/// Tables of other programs, which resemble ours as closely as possible.
const FOREIGN: &str = "
table ip injector-test {
    comment \"the same name, another family\"
    map backends { type inet_service : ipv4_addr; elements = { 2222 : 10.25.0.2 } }
    chain prerouting {
        type nat hook prerouting priority dstnat; policy accept;
        ip daddr 192.0.2.13 dnat to tcp dport map @backends
    }
}
table inet injector {
    set banned { type ipv4_addr; flags interval; elements = { 203.0.113.0/24 } }
    chain prerouting {
        type filter hook prerouting priority raw; policy accept;
        ip saddr @banned counter packets 5 bytes 300 drop
    }
    chain postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        oifname \"nowhere\" masquerade
    }
}
";

pub(crate) fn foreign(testbed: &Testbed) -> anyhow::Result<()> {
    let ours = table()?;
    load(testbed, FOREIGN)?;
    let tables = [["ip", "injector-test"], ["inet", "injector"]];
    let listed = || tables.iter().map(|[family, name]| testbed.nft(&["-a", "list", "table", family, name]));
    let listed = || listed().collect::<anyhow::Result<Vec<_>>>();
    let (all, each) = (testbed.ruleset()?, listed()?);
    ensure!(each.iter().all(|table| table.contains("chain prerouting")), "{each:?}");
    let steps: [(&str, &[Service]); 4] = [
        ("applied", &[service()]),
        ("replaced", &[Service { masquerade: true, ..elsewhere() }]),
        ("emptied", &[]),
        ("filled again", &[service()]),
    ];
    for (step, services) in steps {
        testbed.apply(services)?;
        ensure!(listed()? == each, "{step}: {}", testbed.ruleset()?);
    }
    ensure!(testbed.ask(vip(Family::V4))?.server.ip() == MAIL.of(Family::V4));
    testbed.on_edge(|| remove(&ours))??;
    let after = testbed.ruleset()?;
    ensure!(after == all, "before:\n{all}\nafter:\n{after}");
    Ok(())
}

/// A table without services lets established connections finish; without any table the kernel stops
/// translating, and they end.
pub(crate) fn removed(testbed: &Testbed) -> anyhow::Result<()> {
    let ours = table()?;
    testbed.on_edge(|| remove(&ours))?.context("where there is none")?;
    testbed.apply(&[Service { masquerade: true, ..service() }])?;
    for family in Family::ALL {
        testbed.apply(&[Service { masquerade: true, ..service() }])?;
        let socket = socket(&testbed.topology.client, vip(family))?;
        let (_, mut stream) = testbed.runtime.block_on(greeted(socket, vip(family)))?;
        testbed.apply(&[])?;
        ensure!(testbed.ask(vip(family)).is_err(), "new connections are still sent on");
        testbed.runtime.block_on(echo(&mut stream)).context("the established connection")?;
        testbed.on_edge(|| remove(&ours))??;
        let left = testbed.ruleset()?;
        ensure!(left.is_empty(), "left: {left}");
        ensure!(testbed.runtime.block_on(echo(&mut stream)).is_err(), "it is still translated");
    }
    testbed.on_edge(|| remove(&ours))?.context("once more")
}

async fn echo(stream: &mut BufReader<TcpStream>) -> anyhow::Result<()> {
    let mut back = [0; 5];
    let conversation = async {
        stream.write_all(b"still").await?;
        stream.read_exact(&mut back).await
    };
    timeout(Duration::from_secs(5), conversation).await??;
    ensure!(&back == b"still");
    Ok(())
}

/// All elements of rules, read back from the kernel.
pub(crate) fn recognized(testbed: &Testbed) -> anyhow::Result<()> {
    let any = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    let weighted = |family| [backend(MAIL, family, 3), backend(OTHER_MAIL, family, 2)];
    let weighted: Vec<_> = Family::ALL.into_iter().flat_map(weighted).collect();
    // More backends than sort as text in numeric order, and an address that nft may print as
    // 64:ff9b::a19:2.
    let many = (1..=12).map(|port| Backend { address: SocketAddr::new(MAIL.v4.into(), port * 9), weight: 1 });
    let embedded = Backend { address: "[64:ff9b::10.25.0.2]:25".parse()?, weight: 1 };
    let at = |port| Family::ALL.map(|family| SocketAddr::new(vip(family).ip(), port)).to_vec();
    let services = [
        Service { masquerade: true, ..service() },
        Service { name: "25".to_owned(), listen: at(465), backends: weighted.clone(), ..service() },
        Service {
            name: "any".to_owned(),
            listen: any.map(|ip| SocketAddr::new(ip, PORT)).into(),
            backends: weighted,
            masquerade: true,
        },
        Service {
            name: "many".to_owned(),
            listen: at(993),
            backends: many.chain([embedded]).collect(),
            masquerade: true,
        },
    ];
    let rules = rules(&services)?;
    let other = crate::testbed::rules(&services[..3])?;
    testbed.on_edge(|| {
        ensure!(!rules.is_applied()?, "before");
        ensure!(rules.apply()? == Change::Created);
        ensure!(rules.is_applied()?, "after");
        ensure!(rules.apply()? == Change::Unchanged);
        ensure!(!other.is_applied()?, "one service less");
        ensure!(other.apply()? == Change::Replaced);
        ensure!(other.is_applied()? && !rules.is_applied()?);
        Ok(())
    })??;
    for meddling in [
        "flush chain inet injector-test postrouting",
        "insert rule inet injector-test prerouting tcp dport 25 accept",
        "add chain inet injector-test extra",
    ] {
        testbed.nft(&[meddling])?;
        let change = testbed.on_edge(|| {
            ensure!(!other.is_applied()?, "not noticed");
            let change = other.apply()?;
            ensure!(other.is_applied()?, "not mended");
            Ok(change)
        });
        let change = change?.with_context(|| meddling.to_owned())?;
        let expected = if meddling.starts_with("add chain") { Change::Remade } else { Change::Replaced };
        ensure!(change == expected, "{meddling}: {change:?}");
    }
    Ok(())
}

/// A table with our name that another version could have left.
pub(crate) fn other_layout(testbed: &Testbed) -> anyhow::Result<()> {
    load(
        testbed,
        "table inet injector-test {
            map vips { type ipv4_addr : verdict; elements = { 192.0.2.12 : jump smtp } }
            chain prerouting { type filter hook prerouting priority raw; policy drop; ip daddr vmap @vips; }
            chain smtp { tcp dport 25 drop; }
        }",
    )?;
    let rules = rules(&[service()])?;
    let change = testbed.on_edge(|| rules.apply())??;
    ensure!(change == Change::Remade, "{change:?}");
    let listed = testbed.nft(&["list", "table", "inet", "injector-test"])?;
    ensure!(!listed.contains("vips") && !listed.contains("drop"), "{listed}");
    ensure!(testbed.ask(vip(Family::V4))?.server == SocketAddr::new(MAIL.of(Family::V4), BACKEND_PORT));
    Ok(())
}

/// Even root does not get the capability at exec(2) if it is not in the bounding set.
pub(crate) fn not_permitted(testbed: &Testbed) -> anyhow::Result<()> {
    let ours = table()?;
    let rules = rules(&[service()])?;
    testbed.on_edge(|| {
        caps::drop(None, CapSet::Bounding, Capability::CAP_NET_ADMIN)?;
        for outcome in [rules.apply().map(drop), remove(&ours), chains_that_drop_forwarded().map(drop)] {
            let Err(error) = outcome else { anyhow::bail!("it was permitted") };
            ensure!(matches!(error, NftError::NotPermitted { .. }), "{error:?}");
            ensure!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
        }
        Ok(())
    })??;
    ensure!(testbed.ruleset()?.is_empty());
    Ok(())
}

/// As the daemon runs after dropping root: one capability, which nft has to inherit.
pub(crate) fn without_root(testbed: &Testbed) -> anyhow::Result<()> {
    let ours = table()?;
    const OVERFLOW_UID: libc::uid_t = 65534;
    let rules = rules(&[service()])?;
    testbed.on_edge(|| {
        // SAFETY: both take only numbers. The raw system call changes this thread alone, not the
        // whole process as setresuid(3) would.
        let changed = unsafe {
            libc::prctl(libc::PR_SET_KEEPCAPS, 1) == 0
                && libc::syscall(libc::SYS_setresuid, OVERFLOW_UID, OVERFLOW_UID, OVERFLOW_UID) == 0
        };
        ensure!(changed, "{}", std::io::Error::last_os_error());
        let only = [Capability::CAP_NET_ADMIN].into();
        caps::set(None, CapSet::Effective, &only)?;
        caps::set(None, CapSet::Permitted, &only)?;
        ensure!(rules.apply()? == Change::Created);
        ensure!(rules.is_applied()?);
        remove(&ours)?;
        let kept = caps::read(None, CapSet::Ambient)?;
        ensure!(kept.is_empty(), "the caller's thread hands on {kept:?} from now on");
        Ok(())
    })?
}

pub(crate) fn dropping_chains(testbed: &Testbed) -> anyhow::Result<()> {
    load(
        testbed,
        "
        table ip filter {
            chain FORWARD { type filter hook forward priority 0; policy drop; }
        }
        table inet own {
            chain forward { type filter hook forward priority 0; policy accept; drop; }
        }
        ",
    )?;
    testbed.apply(&[service()])?;
    let chains = testbed.on_edge(chains_that_drop_forwarded)??;
    let names: Vec<_> = chains.iter().map(ToString::to_string).collect();
    ensure!(names == ["ip filter FORWARD"], "{names:?}");
    Ok(())
}

fn load(testbed: &Testbed, rules: &str) -> anyhow::Result<()> {
    testbed.nft(&[rules]).map(drop)
}
