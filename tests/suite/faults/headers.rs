//! The header as the backend reads it, and failures to send it.

use std::io::Write;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use injector_common::proxy::{Version, parse};
use injector_testbed::bpf::DaemonMap;
use injector_testbed::daemon::{BPF_EVENTS, BYTES, PLANE, SPLICED};
use injector_testbed::sockets::LIMIT;

use crate::Run;
use crate::testbed::{
    Ending, Testbed, accept, accept_now, accept_with_header, client_ip, counted, ended, ending, expect,
    finished, pass, patient, public_address,
};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("header/server speaks first", server_first),
    ("header/client speaks first", client_first),
    ("header/client stays silent", silent_client),
    ("header/client closes without sending", leaving_client),
    ("header/version 1", version_1),
    ("header/every TLV", every_tlv),
    ("header/536 bytes", longest),
    ("early talker", early_talker),
];

/// Failures of the kernel's mechanism.
pub(crate) const SPLICE_TRIALS: &[(&str, Run)] = &[
    ("header/sent without the program", sent_without_program),
    ("header/dropped by the program", dropped),
    ("header/dropped by the program, client first", dropped_client_first),
    ("header/not sent by the program", not_placed),
    ("header/not sent by the program, client first", not_placed_client_first),
    ("header/map update refused", storage_refused),
    ("enrolment/refused", enrolment_refused),
];

fn server_first(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    let mut client = testbed.client()?;
    let (mut server, header, rest) = accept_with_header(&backend)?;
    ensure!(header.source == client.local_addr()?, "{header:?}");
    ensure!(header.source.ip() == client_ip(), "{header:?}");
    ensure!(header.destination == public_address(), "{header:?}");
    ensure!(header.bytes.len() == 28 && rest.is_empty(), "{header:?}, then {rest:?}");
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    pass(&mut client, &mut server, b"EHLO client\r\n")?;
    counted(&injector, "injector_headers_sent_total", &[], 1.0)?;
    let count = injector.metrics()?.sum("injector_header_to_first_byte_seconds_count", &[]);
    ensure!((count - 1.0).abs() < 0.5, "{count} first bytes");
    Ok(())
}

/// Header and payload leave together.
fn client_first(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let _injector = testbed.injector(engine, "imaps", "")?;
    let mut client = testbed.client()?;
    client.write_all(b"\x16\x03\x01 hello")?;
    let (mut server, header, rest) = accept_with_header(&backend)?;
    ensure!(header.source == client.local_addr()?, "{header:?}");
    ensure!(rest == b"\x16\x03\x01 hello", "{rest:?} came with the header");
    pass(&mut server, &mut client, b"\x16\x03\x03 server")
}

/// The header for a silent client is sent alone, in time for the backend.
fn silent_client(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let _injector = testbed.injector(engine, "imaps", "[listener.timeouts]\nheader_wait = \"300ms\"")?;
    let mut client = testbed.client()?;
    let start = Instant::now();
    let (mut server, header, rest) = accept_with_header(&backend)?;
    let waited = start.elapsed();
    ensure!(waited > Duration::from_millis(250) && waited < LIMIT, "after {waited:?}");
    ensure!(header.source == client.local_addr()? && rest.is_empty(), "{header:?} {rest:?}");
    pass(&mut client, &mut server, b"\x16\x03\x01 late")?;
    pass(&mut server, &mut client, b"\x16\x03\x03 server")
}

/// Servers up to Postfix 3.10 log a header followed by an early close as fatal.
fn leaving_client(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "submissions", "")?;
    let client = testbed.client()?;
    let mut server = accept(&backend)?;
    drop(client);
    ensure!(ending(&mut server)? == Ending::Fin(Vec::new()), "the backend read something");
    ended(&injector, "client_closed")?;
    counted(&injector, "injector_headers_sent_total", &[], 0.0)
}

fn version_1(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let _injector = testbed.injector(engine, "smtp", "[listener.receiver]\nversion = \"v1\"")?;
    let client = testbed.client()?;
    let (_server, header, _) = accept_with_header(&backend)?;
    let local = client.local_addr()?;
    let line = format!("PROXY TCP4 {} 192.0.2.10 {} 2500\r\n", local.ip(), local.port());
    ensure!(header.bytes == line.as_bytes(), "{:?}", String::from_utf8_lossy(&header.bytes));
    Ok(())
}

fn every_tlv(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let extra = "[listener.receiver]\ncrc32c = true\nunique_id = true\nauthority = \"mail.example\"\nnoop = 5\n\
                 custom = [{ kind = 0xE1, value = \"edge\" }]";
    let _injector = testbed.injector(engine, "smtp", extra)?;
    let client = testbed.client()?;
    let (_server, header, _) = accept_with_header(&backend)?;
    ensure!(header.source == client.local_addr()?, "{header:?}");
    let parsed = parse(&header.bytes)?;
    ensure!(parsed.version == Version::Two && parsed.is_checksummed(), "{parsed:?}");
    ensure!(parsed.tlv(0x02) == Some(b"mail.example"), "{parsed:?}");
    ensure!(parsed.tlv(0xE1) == Some(b"edge"), "{parsed:?}");
    ensure!(parsed.tlv(0x05).is_some_and(|id| id.len() == 32), "{parsed:?}");
    Ok(())
}

/// The longest header that can be configured.
fn longest(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let noop = 536 - 52 - 3;
    let extra = format!("[listener.receiver]\nmax_header = 536\nnoop = {noop}");
    let _injector = testbed.injector(engine, "smtp", &extra)?;
    let mut client = testbed.client()?;
    let (mut server, header, rest) = accept_with_header(&backend)?;
    // Over IPv4 the addresses take 24 bytes less.
    ensure!(header.bytes.len() == 512 && rest.is_empty(), "{} bytes", header.bytes.len());
    ensure!(header.bytes.get(31..).is_some_and(|noop| noop.iter().all(|byte| *byte == 0)), "{header:?}");
    pass(&mut server, &mut client, b"220 long\r\n")
}

/// The backend (postscreen) decides about a client that sends before the banner: its bytes follow
/// the header.
fn early_talker(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let _injector = testbed.injector(engine, "smtp", "")?;
    let mut client = testbed.client()?;
    client.write_all(b"EHLO early\r\n")?;
    let (mut server, header, rest) = accept_with_header(&backend)?;
    ensure!(header.source == client.local_addr()?, "{header:?}");
    let left = b"EHLO early\r\n".strip_prefix(&rest[..]).context("other bytes behind the header")?;
    expect(&mut server, left)?;
    pass(&mut server, &mut client, b"554 too early\r\n")
}

/// `splice.header = "send"`: the backend reads the same header, the program does nothing, and the
/// kernel forwards the payload.
fn sent_without_program(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const SEND: &str = "\n\n[splice]\nheader = \"send\"\nenrol_after_messages = 1";
    for (protocol, first) in [("smtp", &b""[..]), ("imaps", b"\x16\x03\x01 hello")] {
        let backend = testbed.backend()?;
        let injector = testbed.injector(engine, protocol, SEND)?;
        let injected =
            || Ok::<_, anyhow::Error>(injector.metrics()?.sum(BPF_EVENTS, &[("program", "inject")]));
        let before = injected()?;
        let mut client = testbed.client()?;
        client.write_all(first)?;
        let (mut server, header, rest) = accept_with_header(&backend)?;
        ensure!(header.source == client.local_addr()? && rest == first, "{header:?}, then {rest:?}");
        for _ in 0..3 {
            pass(&mut server, &mut client, b"220 server\r\n")?;
            pass(&mut client, &mut server, b"NOOP\r\n")?;
        }
        ensure!((injected()? - before).abs() < 0.5, "the program was at work");
        counted(&injector, "injector_headers_sent_total", &[], 1.0)?;
        drop((client, server));
        finished(&injector, 1)?;
        let spliced = injector.metrics()?.sum(BYTES, &[(PLANE, SPLICED)]);
        ensure!(spliced > 0.0, "nothing was spliced");
    }
    Ok(())
}

/// The backend has read nothing, and both connections are reset.
fn dropped(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    server_first_fails(testbed, engine, DaemonMap::drop_messages)
}

fn dropped_client_first(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    client_first_fails(testbed, engine, DaemonMap::drop_messages)
}

/// Payload that was given to the kernel without a header is not delivered.
fn not_placed(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    server_first_fails(testbed, engine, DaemonMap::pass_messages)
}

fn not_placed_client_first(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    client_first_fails(testbed, engine, DaemonMap::pass_messages)
}

type Corrupt = fn(&DaemonMap) -> anyhow::Result<()>;

fn server_first_fails(testbed: &Testbed, engine: &str, corrupt: Corrupt) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    corrupt(&DaemonMap::of(injector.pid(), "INJECT")?)?;
    if let Some(mut client) = testbed.client_unless_reset()? {
        ensure!(ending(&mut client)? == Ending::Reset(Vec::new()), "the client was not reset");
    }
    ended(&injector, "header_failed")?;
    backend_read_nothing(&backend)?;
    counted(&injector, "injector_headers_failed_total", &[], 1.0)?;
    counted(&injector, "injector_headers_sent_total", &[], 0.0)
}

fn client_first_fails(testbed: &Testbed, engine: &str, corrupt: Corrupt) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "submissions", "")?;
    corrupt(&DaemonMap::of(injector.pid(), "INJECT")?)?;
    let mut client = testbed.client()?;
    client.write_all(b"\x16\x03\x01 hello")?;
    ensure!(ending(&mut client)? == Ending::Reset(Vec::new()), "the client was not reset");
    ended(&injector, "header_failed")?;
    backend_read_nothing(&backend)
}

/// The backend has no connection, because the header would have completed its handshake; or, if the
/// daemon was slow, one that is reset.
fn backend_read_nothing(backend: &TcpListener) -> anyhow::Result<()> {
    backend.set_nonblocking(true)?;
    let Some(mut server) = accept_now(backend)? else { return Ok(()) };
    server.set_nonblocking(false)?;
    patient(&server)?;
    ensure!(ending(&mut server)? == Ending::Reset(Vec::new()), "the backend read something");
    Ok(())
}

/// Nothing has been sent yet: user space sends the header, and the connection continues.
fn storage_refused(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    DaemonMap::of(injector.pid(), "HEADERS")?.freeze()?;
    let mut client = testbed.client()?;
    let (mut server, header, _) = accept_with_header(&backend)?;
    ensure!(header.source == client.local_addr()?, "{header:?}");
    pass(&mut server, &mut client, b"220 by user space\r\n")?;
    pass(&mut client, &mut server, b"EHLO client\r\n")?;
    counted(&injector, "injector_headers_sent_total", &[], 1.0)?;
    counted(&injector, "injector_enrolment_failures_total", &[("reason", "not_permitted")], 1.0)
}

/// The connection stays in user space and loses nothing.
fn enrolment_refused(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    DaemonMap::of(injector.pid(), "VERDICT")?.freeze()?;
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    for _ in 0..3 {
        pass(&mut server, &mut client, b"250 fine\r\n")?;
        pass(&mut client, &mut server, b"NOOP\r\n")?;
    }
    drop(client);
    ensure!(ending(&mut server)? == Ending::Fin(Vec::new()), "no clean end");
    drop(server);
    let sessions = finished(&injector, 1)?;
    ensure!(sessions[0].number("spliced_to_backend") == Some(0), "{sessions:?}");
    ensure!(sessions[0].number("bytes_to_backend") == Some(18), "{sessions:?}");
    counted(&injector, "injector_enrolment_failures_total", &[("reason", "not_permitted")], 2.0)
}
