//! The testbed itself: its receivers accept a header from an independent sender, and require one.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, ensure};
use injector_testbed::message::DOMAIN;
use injector_testbed::netns::{Family, HostAddresses, MAIL};
use injector_testbed::service::{SMTP, Service};

use crate::external::LIMIT;
use crate::testbed::Testbed;

/// A client that exists only in the header.
const FAR_CLIENT: HostAddresses = HostAddresses {
    v4: std::net::Ipv4Addr::new(203, 0, 113, 9),
    v6: std::net::Ipv6Addr::new(0x2001, 0xdb8, 0xf, 0, 0, 0, 0, 9),
};

/// The address that this client connected to.
const FAR_SERVER: HostAddresses = HostAddresses {
    v4: std::net::Ipv4Addr::new(192, 0, 2, 99),
    v6: std::net::Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0, 0x99),
};

/// swaks sends the header itself, from the edge directly to postscreen. The connection is IPv4
/// whatever the header has, because swaks needs another Perl module for IPv6.
pub(crate) fn swaks(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let postfix = &testbed.host.postfix;
    let mark = postfix.log().mark();
    let (source, destination) = (FAR_CLIENT.of(family).to_string(), FAR_SERVER.of(family).to_string());
    let proxy_family = match family {
        Family::V4 => "AF_INET",
        Family::V6 => "AF_INET6",
    };
    let mut command = testbed.topology.edge.command("swaks");
    command.args(["--server", &MAIL.v4.to_string(), "--port", &SMTP.proxied.to_string()]);
    command.args(["--from", "sender@client.example.test", "--to", &format!("swaks@{DOMAIN}")]);
    command.args(["--helo", "client.example.test", "--timeout", "20"]);
    command.args(["--proxy-version", "2", "--proxy-family", proxy_family]);
    command.args(["--proxy-source", &source, "--proxy-source-port", "40000"]);
    command.args(["--proxy-dest", &destination, "--proxy-dest-port", "25"]);
    let output = command.output().context("cannot run swaks")?;
    let printed = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "swaks: {}\n{printed}", String::from_utf8_lossy(&output.stderr));

    let seen = format!("CONNECT from [{source}]:40000 to [{destination}]:25");
    postfix.log().wait_for(mark, &["postscreen[", &seen], LIMIT)?;
    let queue_id = printed.split_once("queued as ").and_then(|(_, id)| id.split_whitespace().next());
    let queue_id = queue_id.with_context(|| format!("no queue id in\n{printed}"))?;
    let client = postfix.client_of(mark, queue_id, SMTP.proxied, LIMIT)?;
    ensure!(client == SocketAddr::new(FAR_CLIENT.of(family), 40000), "smtpd saw {client}");
    postfix.wait_delivered(mark, queue_id, LIMIT)
}

/// A clear-text port behind the injector closes a connection that begins with a command, without a
/// greeting.
pub(crate) fn demands_header(testbed: &Testbed, service: Service, family: Family) -> anyhow::Result<()> {
    let address = SocketAddr::new(MAIL.of(family), service.proxied);
    let received = testbed.topology.edge.run(|| -> anyhow::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(address)?;
        // Postfix waits 5 s for a header.
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all(b"EHLO client.example.test\r\n")?;
        let mut received = Vec::new();
        stream.read_to_end(&mut received)?;
        Ok(received)
    })?;
    // A reset is correct as well: the command was not read.
    if let Ok(received) = received.or_else(reset_is_silence) {
        ensure!(
            !received.starts_with(b"220"),
            "{address} greets without a header: {}",
            received.escape_ascii()
        );
        return Ok(());
    }
    anyhow::bail!("{address} neither greets nor ends the connection")
}

fn reset_is_silence(error: anyhow::Error) -> anyhow::Result<Vec<u8>> {
    let io = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    if io == Some(std::io::ErrorKind::ConnectionReset) { Ok(Vec::new()) } else { Err(error) }
}
