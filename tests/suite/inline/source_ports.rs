//! Source ports of connections to backends: each connection has one that the backend takes at once.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use injector_testbed::netns::{Family, MAIL};
use injector_testbed::sockets::AT_ONCE;
use injector_testbed::wait::wait_until;
use socket2::{Domain, Socket, Type};

use crate::Run;
use crate::testbed::{
    BACKEND_PORT, LIMIT, Testbed, accept, counted, expect, greeted, own_header, patient, public_address,
};
use crate::wire_testbed::SysctlGuard;

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("source ports", source_ports),
    ("a client's port again and again", again),
    ("no source port is left", none_left),
];

/// A connection from this port.
fn from_port(testbed: &Testbed, family: Family, port: u16) -> anyhow::Result<TcpStream> {
    let connect = || {
        let socket = Socket::new(Domain::for_address(public_address(family)), Type::STREAM, None)?;
        let any: IpAddr = match family {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(any, port).into())?;
        socket.connect_timeout(&public_address(family).into(), LIMIT)?;
        std::io::Result::Ok(TcpStream::from(socket))
    };
    let client = testbed.topology.client.run(connect)??;
    patient(&client)?;
    Ok(client)
}

fn source_ports(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let _injector = testbed.injector("smtp", "")?;
    for _ in 0..30 {
        testbed.inlined(family, &backend)?;
    }
    // The client's own port, if no socket of the host may have it.
    for port in [2222, 61_234] {
        let (client, server) = greeted(from_port(testbed, family, port)?, &backend)?;
        let peer = server.peer_addr()?.port();
        ensure!(peer == port, "from port {peer} in place of {port}");
        drop((client, server));
    }
    Ok(())
}

/// A backend at a port that no other trial uses, which therefore remembers no connection, and the
/// configuration for it.
fn own_backend(testbed: &Testbed, family: Family, port: u16) -> anyhow::Result<(TcpListener, String)> {
    let address = SocketAddr::new(MAIL.of(family), port);
    let backend = testbed.topology.mail.listen(address)?;
    Ok((backend, testbed.config_with("", "smtp", &format!("backends = [\"{address}\"]\n"))))
}

/// A session that the backend ends: it keeps the addresses and ports in TIME_WAIT. Returns the port
/// from which it came to the backend.
fn ended_by_backend(mut client: TcpStream, backend: &TcpListener) -> anyhow::Result<u16> {
    let mut server = accept(backend)?;
    own_header(&mut server, &client)?;
    client.write_all(b"QUIT\r\n")?;
    expect(&mut server, b"QUIT\r\n")?;
    server.write_all(b"221 bye\r\n")?;
    let port = server.peer_addr()?.port();
    drop(server);
    expect(&mut client, b"221 bye\r\n")?;
    ensure!(client.read(&mut [0; 8])? == 0, "no clean end");
    Ok(port)
}

/// A lost SYN is sent again after a second.
fn at_once(start: Instant) -> anyhow::Result<()> {
    let took = start.elapsed();
    ensure!(took < AT_ONCE, "it took {took:?}");
    Ok(())
}

/// The client gets the same port towards the backend, and the backend does not take it for the
/// connection that it remembers.
fn again(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    /// No socket gets it by itself.
    const CLIENT_PORT: u16 = 20_404;
    const SESSIONS: usize = 12;
    let (backend, config) = own_backend(testbed, family, BACKEND_PORT + 20)?;
    let injector = testbed.start(&config)?;
    // Only the sequence number makes a SYN newer than a connection in TIME_WAIT.
    let _numbers = SysctlGuard::new(&testbed.topology.client, "net/ipv4/tcp_timestamps", "0")?;
    let mut ports = Vec::new();
    for session in 0..SESSIONS {
        let start = Instant::now();
        // The port is the client's again once its last FIN is acknowledged.
        let client =
            wait_until("the port", || Ok(from_port(testbed, family, CLIENT_PORT).ok()), Option::is_some)?
                .context("no client")?;
        ports.push(ended_by_backend(client, &backend)?);
        at_once(start).with_context(|| format!("session {session}"))?;
    }
    ensure!(ports.iter().all(|port| *port == ports[0]), "{ports:?}");
    let opened = counted(&injector, "opened")?;
    ensure!(opened == SESSIONS as u64, "{opened} opened");
    // A client whose SYN is answered by an acknowledgement resets that, and sends the SYN again soon
    // (tcp_rcv_synsent_state_process, net/ipv4/tcp_input.c).
    let repeated = counted(&injector, "syn_repeated")?;
    ensure!(repeated == 0, "{repeated} SYNs were sent again");
    Ok(())
}

/// What finds no port is served by the socket; a port in TIME_WAIT goes to no other client.
fn none_left(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    const SESSIONS: u64 = 1300;
    /// The host's sockets may have all others: the program accepts no fewer than 1,024.
    const PORTS: std::ops::Range<u16> = 1024..2048;
    let (backend, config) = own_backend(testbed, family, BACKEND_PORT + 21)?;
    let range = format!("{} 65535", PORTS.end);
    let _few = SysctlGuard::new(&testbed.topology.edge, "net/ipv4/ip_local_port_range", &range)?;
    let injector = testbed.start(&config)?;
    let mut inline = 0;
    for session in 0..SESSIONS {
        let start = Instant::now();
        let client = testbed.client(family)?;
        let port = ended_by_backend(client, &backend).with_context(|| format!("session {session}"))?;
        at_once(start).with_context(|| format!("session {session}, from port {port}"))?;
        inline += u64::from(PORTS.contains(&port));
    }
    let repeated = counted(&injector, "syn_repeated")?;
    ensure!(repeated == 0, "{repeated} SYNs were sent again");
    let left = counted(&injector, "to_socket_no_port")?;
    ensure!(left > 200 && inline > 700, "{inline} by inline, {left} found no port");
    ensure!(inline + left == SESSIONS, "{inline} by inline, {left} found no port");
    Ok(())
}
