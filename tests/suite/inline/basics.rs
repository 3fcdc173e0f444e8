//! One connection, from the SYN to the log line.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};

use anyhow::{Context as _, ensure};
use injector_testbed::netns::Family;

use crate::Run;
use crate::testbed::{Testbed, accept, client_ip, expect, own_header, pass};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("server speaks first", server_first),
    ("client speaks first", client_first),
    ("both directions at once", both_ways),
];

fn server_first(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let injector = testbed.injector("smtp", "")?;
    let mut client = testbed.client(family)?;
    let mut server = accept(&backend)?;
    own_header(&mut server, &client)?;
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    pass(&mut client, &mut server, b"QUIT\r\n")?;
    client.shutdown(Shutdown::Write)?;
    ensure!(server.read(&mut [0; 8])? == 0, "something behind the FIN");
    drop(server);
    ensure!(client.read(&mut [0; 8])? == 0, "something behind the FIN");
    let session = injector.sessions_within(1)?.remove(0);
    ensure!(session.field("reason").as_deref() == Some("client_closed"), "{session:?}");
    ensure!(session.field("engine").as_deref() == Some("inline"), "{session:?}");
    ensure!(session.number("bytes_to_backend") == Some(6), "{session:?}");
    ensure!(session.number("bytes_to_client") == Some(11), "{session:?}");
    let seen = session.field("client").unwrap_or_default();
    ensure!(seen.contains(&client_ip(family).to_string()), "{session:?}");
    Ok(())
}

fn client_first(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let _injector = testbed.injector("imaps", "")?;
    let mut client = testbed.client(family)?;
    client.write_all(b"\x16\x03\x01")?;
    let mut server = accept(&backend)?;
    own_header(&mut server, &client)?;
    expect(&mut server, b"\x16\x03\x01")?;
    pass(&mut server, &mut client, b"hello")
}

fn both_ways(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    const BULK: usize = 32 << 20;
    let backend = testbed.backend(family)?;
    let _injector = testbed.injector("smtp", "")?;
    let mut client = testbed.client(family)?;
    let mut server = accept(&backend)?;
    own_header(&mut server, &client)?;
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    let bytes: Vec<u8> = (0..251).cycle().take(BULK).collect();
    let through = |mut from: &TcpStream, mut to: &TcpStream| {
        std::thread::scope(|scope| {
            let sending =
                scope.spawn(|| from.write_all(&bytes).and_then(|()| from.shutdown(Shutdown::Write)));
            let mut seen = Vec::with_capacity(BULK);
            to.read_to_end(&mut seen).context("receiving")?;
            sending.join().map_err(|_| anyhow::anyhow!("panicked"))?.context("sending")?;
            ensure!(seen == bytes, "{} bytes, not the same", seen.len());
            anyhow::Ok(())
        })
    };
    std::thread::scope(|scope| {
        let up = scope.spawn(|| through(&client, &server));
        through(&server, &client)?;
        up.join().map_err(|_| anyhow::anyhow!("panicked"))?
    })
}
