//! What an operator changes while connections are open: they go on as they were opened.

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use injector_testbed::daemon::Injector;
use injector_testbed::netns::{EDGE_OUTSIDE, Family, MAIL, VIP_INLINE};
use injector_testbed::wait::wait_until;

use crate::Run;
use crate::testbed::{
    BACKEND_PORT, PORT, TLS_PORT, Testbed, accept, backend_address, connect, counted, greeted, header,
    is_inline, public_address, works,
};
use crate::wire_testbed::Forwarding;

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("listeners come and go", come_and_go),
    ("a connection is ended by the operator", ended_by_operator),
    ("another address", another_address),
    ("another header", another_header),
    ("another backend", another_backend),
    ("to another engine and back", another_engine),
    ("PROXY ports of another engine's listener", proxy_ports),
    ("a listener under another name", renamed),
    ("listeners in another order, after a restart", reordered),
];

fn reload(injector: &Injector, config: &str) -> anyhow::Result<String> {
    injector.rewrite(config)?;
    injector.command(&["reload"])
}

fn at(family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(VIP_INLINE.of(family), port)
}

/// Waits until new connections to this address are inline's.
fn becomes_inline(testbed: &Testbed, address: SocketAddr, backend: &TcpListener) -> anyhow::Result<()> {
    let served = || {
        let client = connect(&testbed.topology.client, address)?;
        is_inline(&greeted(client, backend)?.1)
    };
    wait_until("inline", served, |inline| *inline).map(drop)
}

fn come_and_go(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let config = testbed.config("smtp", "");
    let injector = testbed.start(&config)?;
    let mut before = testbed.inlined(family, &backend)?;
    let more = format!(
        "\n[[listener]]\nname = \"more\"\nbind = [\"{}\"]\nprotocol = \"smtp\"\nengine = \"inline\"\n\
         backends = [\"{}\"]\n[listener.timeouts]\ndrain = \"1s\"\n",
        at(family, TLS_PORT),
        backend_address(family)
    );
    let printed = reload(&injector, &format!("{config}{more}"))?;
    ensure!(printed == "added: more\n", "{printed}");
    becomes_inline(testbed, at(family, TLS_PORT), &backend)?;
    let mut more = greeted(connect(&testbed.topology.client, at(family, TLS_PORT))?, &backend)?;
    let printed = reload(&injector, &config)?;
    ensure!(printed == "removed: more\n", "{printed}");
    // No socket listens there any more.
    let refused = || Ok(connect(&testbed.topology.client, at(family, TLS_PORT)).is_err());
    wait_until("the listener is gone", refused, |refused| *refused)?;
    works(&mut more.0, &mut more.1).context("until the deadline")?;
    let is_aborted = || {
        let sessions = injector.sessions()?;
        Ok(sessions.iter().any(|session| session.field("reason").as_deref() == Some("aborted")))
    };
    wait_until("the deadline", is_aborted, |aborted| *aborted)?;
    let broken = || Ok(works(&mut more.0, &mut more.1).is_err());
    wait_until("the reset", broken, |broken| *broken)?;
    works(&mut before.0, &mut before.1)
}

fn ended_by_operator(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let injector = testbed.start(&testbed.config("smtp", ""))?;
    let mut ended = testbed.inlined(family, &backend)?;
    let mut other = testbed.inlined(family, &backend)?;
    let address = ended.0.local_addr()?.to_string();
    let listed: serde_json::Value = serde_json::from_str(&injector.command(&["sessions", "--json"])?)?;
    let mut rows = listed["sessions"]["rows"].as_array().into_iter().flatten();
    let row = rows.find(|row| row["client"] == address).context("not listed")?;
    let id = row["id"].as_str().context("no id")?;
    let printed = injector.command(&["sessions", "end", id])?;
    ensure!(printed == "1 session ended\n", "{printed}");
    let broken = || Ok(works(&mut ended.0, &mut ended.1).is_err());
    wait_until("the reset", broken, |broken| *broken)?;
    let is_logged = || {
        let sessions = injector.sessions()?;
        Ok(sessions.iter().any(|session| session.field("reason").as_deref() == Some("ended_by_operator")))
    };
    wait_until("the log line", is_logged, |logged| *logged)?;
    works(&mut other.0, &mut other.1)
}

fn another_address(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let config = testbed.config("smtp", "");
    let injector = testbed.start(&config)?;
    let mut before = testbed.inlined(family, &backend)?;
    let printed = reload(&injector, &config.replace(&format!(":{PORT}\""), &format!(":{TLS_PORT}\"")))?;
    ensure!(printed == "changed: test\n", "{printed}");
    becomes_inline(testbed, at(family, TLS_PORT), &backend)?;
    let refused = || Ok(connect(&testbed.topology.client, public_address(family)).is_err());
    wait_until("the old address is free", refused, |refused| *refused)?;
    works(&mut before.0, &mut before.1)
}

/// New connections get the new one, whole.
fn another_header(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let config = testbed.config("smtp", "");
    let injector = testbed.start(&config)?;
    let mut before = testbed.inlined(family, &backend)?;
    reload(&injector, &format!("{config}\n[listener.receiver]\nauthority = \"mail.example\"\n"))?;
    let longer = || {
        let mut client = testbed.client(family)?;
        let mut server = accept(&backend)?;
        let mut peeked = [0; 16];
        // The fixed part, with the length of the rest.
        wait_until("the header", || Ok(server.peek(&mut peeked)?), |len| *len == 16)?;
        let (named, _) = header(&mut server)?;
        ensure!(named == client.local_addr()?, "the header names {named}");
        works(&mut client, &mut server)?;
        client.write_all(b"QUIT")?;
        Ok((is_inline(&server)?, u16::from_be_bytes([peeked[14], peeked[15]])))
    };
    let plain = if family == Family::V4 { 12 } else { 36 };
    wait_until("the header", longer, |(inline, len)| *inline && *len > plain)?;
    works(&mut before.0, &mut before.1)
}

/// Only new connections move.
fn another_backend(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let (first, other_address) =
        (testbed.backend(family)?, SocketAddr::new(MAIL.of(family), BACKEND_PORT + 1));
    let other = testbed.topology.mail.run(|| TcpListener::bind(other_address))??;
    let config = testbed.config("smtp", "");
    let injector = testbed.start(&config)?;
    let mut before = testbed.inlined(family, &first)?;
    drop(first);
    let printed = reload(
        &injector,
        &config.replace(&format!(":{BACKEND_PORT}\""), &format!(":{}\"", BACKEND_PORT + 1)),
    )?;
    ensure!(printed == "changed: test\n", "{printed}");
    becomes_inline(testbed, public_address(family), &other)?;
    works(&mut before.0, &mut before.1)
}

fn another_engine(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let other = format!(
        "\n[[listener]]\nname = \"more\"\nbind = [\"{}\"]\nprotocol = \"smtp\"\nengine = \"inline\"\n\
         backends = [\"{}\"]\n",
        at(family, TLS_PORT),
        backend_address(family)
    );
    // The other one keeps the engine loaded.
    let config = testbed.config("smtp", "") + &other;
    let injector = testbed.start(&config)?;
    let mut before = testbed.inlined(family, &backend)?;
    reload(&injector, &config.replacen("engine = \"inline\"", "engine = \"relay\"", 1))?;
    let by_socket = || Ok(!is_inline(&testbed.joined(family, &backend)?.1)?);
    wait_until("the socket", by_socket, |by_socket| *by_socket)?;
    let mut relayed = testbed.joined(family, &backend)?;
    works(&mut before.0, &mut before.1)?;
    reload(&injector, &config)?;
    becomes_inline(testbed, public_address(family), &backend)?;
    works(&mut relayed.0, &mut relayed.1)?;
    works(&mut before.0, &mut before.1)
}

/// Inline's connections live on, so nothing else may reach the backend's PROXY port.
fn proxy_ports(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let config = testbed.config("smtp", "");
    let injector = testbed.start(&config)?;
    let mut before = testbed.inlined(family, &backend)?;
    reload(&injector, &config.replacen("engine = \"inline\"", "engine = \"relay\"", 1))?;
    let by_socket = || Ok(!is_inline(&testbed.joined(family, &backend)?.1)?);
    wait_until("the socket", by_socket, |by_socket| *by_socket)?;
    let _forwarding = Forwarding::new(&testbed.topology.edge)?;
    let dropped = counted(&injector, "proxy_port")?;
    let connect = || TcpStream::connect_timeout(&backend_address(family), Duration::from_millis(300));
    let client = &testbed.topology.client;
    let (to, via) = (MAIL.of(family).to_string(), EDGE_OUTSIDE.of(family).to_string());
    client.ip(&["route", "add", &to, "via", &via])?;
    let outcome = client.run(connect);
    client.ip(&["route", "del", &to])?;
    let outcome = outcome?;
    ensure!(outcome.is_err(), "the backend's port is reached");
    ensure!(counted(&injector, "proxy_port")? > dropped, "not counted: {outcome:?}");
    works(&mut before.0, &mut before.1)
}

/// A connection is logged under the name by which it came.
fn renamed(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let config = testbed.config("smtp", "");
    let injector = testbed.start(&config)?;
    let (mut client, mut server) = testbed.inlined(family, &backend)?;
    let address = client.local_addr()?;
    let printed = reload(&injector, &config.replace("name = \"test\"", "name = \"other\""))?;
    ensure!(printed == "added: other\nremoved: test\n", "{printed}");
    becomes_inline(testbed, public_address(family), &backend)?;
    works(&mut client, &mut server)?;
    drop((client, server));
    let listener = || {
        let sessions = injector.sessions()?;
        let own = sessions.iter().find(|session| session.client() == Some(address));
        Ok(own.and_then(|session| session.field("listener")))
    };
    let name = wait_until("the log line", listener, Option::is_some)?;
    ensure!(name.as_deref() == Some("test"), "{name:?}");
    Ok(())
}

/// Connections belong to the listener's name, not to its position in the file.
fn reordered(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let config = testbed.config("smtp", "");
    let (top, test) = config.split_once("[[listener]]").context("no listener")?;
    let elsewhere = |text: String, family| {
        text.replace(&public_address(family).to_string(), &at(family, PORT + 1).to_string())
    };
    let other = test.replace("name = \"test\"", "name = \"first\"");
    let other = Family::ALL.into_iter().fold(other, elsewhere);
    let _attached = testbed.attached();
    let injector =
        Injector::start(&testbed.topology.edge, &format!("{top}[[listener]]{test}[[listener]]{other}"))?;
    let (mut client, mut server) = testbed.inlined(family, &backend)?;
    let address = client.local_addr()?;
    injector.stop()?;
    let injector =
        Injector::start(&testbed.topology.edge, &format!("{top}[[listener]]{other}[[listener]]{test}"))?;
    works(&mut client, &mut server)?;
    let listed = injector.command(&["sessions", "test"])?;
    ensure!(listed.contains(&address.to_string()), "{listed}");
    drop((client, server));
    let listener = || {
        let sessions = injector.sessions()?;
        let own = sessions.iter().find(|session| session.client() == Some(address));
        Ok(own.and_then(|session| session.field("listener")))
    };
    let name = wait_until("the log line", listener, Option::is_some)?;
    ensure!(name.as_deref() == Some("test"), "{name:?}");
    Ok(())
}
