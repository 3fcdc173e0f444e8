//! Source ports of connections to backends.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};

use anyhow::ensure;
use injector_testbed::netns::Family;
use socket2::{Domain, Socket, Type};

use crate::Run;
use crate::testbed::{LIMIT, Testbed, greeted, public_address};

pub(crate) const TRIALS: &[(&str, Run)] = &[("source ports", source_ports)];

fn source_ports(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let _injector = testbed.injector("smtp", "")?;
    for _ in 0..30 {
        testbed.inlined(family, &backend)?;
    }
    // The client's own port, if no socket of the host may have it.
    for port in [2222, 61_234] {
        let own = || {
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
        let client = testbed.topology.client.run(own)??;
        let (client, server) = greeted(client, &backend)?;
        let peer = server.peer_addr()?.port();
        ensure!(peer == port, "from port {peer} in place of {port}");
        drop((client, server));
    }
    Ok(())
}
