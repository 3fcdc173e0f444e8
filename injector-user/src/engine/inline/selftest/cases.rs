//! The checks.

use injector_common::inline::{ACK, PSH, Phase, RST, SYN};

use super::{
    connection::{CLIENT_FIRST, Connection, DROP, FIRST, PASS, TRANSLATED, place},
    segment::Segment,
};

/// One check, over a connection of its own.
pub(super) type Test = fn(&Connection<'_>) -> Result<(), String>;

pub(super) fn header_added(connection: &Connection<'_>) -> Result<(), String> {
    let header = connection.establish()?;
    connection.expect_header(&header)?;
    if (connection.count(Phase::Pending), connection.count(Phase::Established)) == (0, 1) {
        Ok(())
    } else {
        Err("CONNECTIONS has no established connection".to_owned())
    }
}

pub(super) fn header_waits(connection: &Connection<'_>) -> Result<(), String> {
    let connection = &Connection { public: CLIENT_FIRST, ..connection.with_port(connection.port) };
    connection.accept()?;
    connection.expect_verdict(
        "the end of the handshake, before the first bytes",
        &connection.client_segment(ACK),
        DROP,
    )?;
    let data = Segment { payload: b"ClientHello".to_vec(), ..connection.client_segment(ACK | PSH) };
    let longer = connection.sent(&connection.run(&data)?, "the client's first bytes")?;
    let header =
        longer.payload.strip_suffix(b"ClientHello").ok_or("the client's first bytes are not the last")?;
    connection.expect_header(header)?;
    let expected = Segment {
        payload: longer.payload.clone(),
        ..connection.to_backend(&data, connection.backend_sequence(FIRST))
    };
    if longer != expected {
        return Err(format!("the client's first bytes leave as {longer:?}, and should as {expected:?}"));
    }
    // If the client sends nothing, it repeats its ACK when the backend retransmits; that ACK
    // carries the header.
    let connection = &connection.with_port(connection.port + 1000);
    connection.accept()?;
    connection.run(&connection.client_segment(ACK))?;
    let repeated = connection.run(&connection.client_segment(ACK))?;
    connection.expect_header(&connection.sent(&repeated, "the end of the handshake, repeated")?.payload)
}

pub(super) fn shifted(connection: &Connection<'_>) -> Result<(), String> {
    // An acknowledgement of the header that carries more information is passed on.
    connection.establish()?;
    let closed = Segment { window: 0, ..connection.backend_segment(ACK, connection.behind_header(FIRST)) };
    let earlier = connection.to_client(&closed, FIRST);
    connection.expect("the acknowledgement of the header, with a closed window", &closed, &earlier)?;

    let connection = &connection.with_port(connection.port + 1000);
    connection.acknowledge()?;
    let data = Segment { payload: b"EHLO client\r\n".to_vec(), ..connection.client_segment(ACK | PSH) };
    let later = connection.to_backend(&data, connection.behind_header(FIRST));
    connection.expect("data of the client", &data, &later)?;

    // The client's first byte is missing, and some later bytes have arrived.
    let first = connection.behind_header(FIRST);
    let answer = Segment {
        options: [timestamps(5, 6), sack(first)].concat(),
        payload: b"220 backend\r\n".to_vec(),
        ..connection.backend_segment(ACK | PSH, first)
    };
    let expected =
        Segment { options: [timestamps(5, 6), sack(FIRST)].concat(), ..connection.to_client(&answer, FIRST) };
    connection.expect("data and a SACK block of the backend", &answer, &expected)
}

fn timestamps(value: u32, echo: u32) -> Vec<u8> {
    [&[1, 1, 8, 10][..], &value.to_be_bytes(), &echo.to_be_bytes()].concat()
}

fn sack(first: u32) -> Vec<u8> {
    let [left, right] = [100, 200].map(|bytes| first.wrapping_add(bytes).to_be_bytes());
    [&[1, 1, 5, 10][..], &left, &right].concat()
}

pub(super) fn header_retransmitted(connection: &Connection<'_>) -> Result<(), String> {
    // The header was sent and lost. The client's data arrives, and the backend asks for the bytes
    // before it.
    let header = connection.establish()?;
    let question = Segment {
        options: [timestamps(0x0A0B_0C0D, 0x0102_0304), sack(connection.behind_header(FIRST))].concat(),
        ..connection.backend_segment(ACK, connection.backend_sequence(FIRST))
    };
    let ack = connection.client_segment(ACK | PSH);
    let answer = Segment {
        options: timestamps(0x0102_0304, 0x0A0B_0C0D),
        payload: header,
        ..connection.to_backend(&ack, connection.backend_sequence(FIRST))
    };
    connection.expect("a question for the header", &question, &answer)
}

pub(super) fn fail_closed(connection: &Connection<'_>) -> Result<(), String> {
    // What is forwarded to a PROXY port and belongs to no connection.
    let stray = Segment {
        destination: connection.backend(),
        payload: b"QUIT\r\n".to_vec(),
        ..connection.client_segment(ACK | PSH)
    };
    connection.expect_verdict("data for the PROXY port without a connection", &stray, DROP)?;
    let syn = Segment { flags: SYN, acknowledgement: 0, payload: Vec::new(), ..stray };
    connection.expect_verdict("a SYN for the PROXY port", &syn, DROP)?;
    // The host's own sockets get what belongs to no connection, and the client's bytes never take
    // the header's place.
    connection.expect_verdict("an ACK without a connection", &connection.client_segment(ACK), PASS)?;
    connection.establish()?;
    let before = Segment {
        sequence: FIRST.wrapping_sub(connection.header_len()),
        payload: vec![b'x'; usize::try_from(connection.header_len()).unwrap_or(0)],
        ..connection.client_segment(ACK | PSH)
    };
    connection.expect_verdict("data in the header's place", &before, DROP)
}

pub(super) fn left_to_sockets(connection: &Connection<'_>) -> Result<(), String> {
    let data = Segment { payload: b"early".to_vec(), ..connection.client_segment(SYN) };
    connection.expect_verdict("a SYN with data", &data, PASS)?;
    let other = Connection { public: 26, ..connection.with_port(connection.port) };
    connection.expect_verdict("a SYN for another port", &other.client_segment(SYN), PASS)?;
    let translated = Segment {
        source: place(connection.ipv6, TRANSLATED, connection.port),
        ..connection.client_segment(SYN)
    };
    connection.expect_verdict("a SYN of a translated source", &translated, PASS)?;
    // The backend refuses: the client receives nothing, and its next SYN goes to the socket.
    connection.open()?;
    let refusal = connection.backend_segment(RST | ACK, connection.backend_sequence(FIRST));
    connection.expect_verdict("a refusal", &refusal, DROP)?;
    let syn = Segment { sequence: FIRST.wrapping_sub(1), ..connection.client_segment(SYN) };
    connection.expect_verdict("the SYN after a refusal", &syn, PASS)
}
