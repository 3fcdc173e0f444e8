//! The checks.

use injector_common::inline::{ACK, ClosedFlow, Key, PSH, SYN};

use super::{
    connection::{CLIENT_FIRST, Connection, DROP, FIRST, LOOPBACK, OTHER_DEVICE, PASS, REDIRECT},
    segment::Segment,
};
use crate::engine::inline::programs::sweep;

/// One check, over a connection of its own.
pub(super) type Test = fn(&Connection<'_>) -> Result<(), String>;

pub(super) fn header_added(connection: &Connection<'_>) -> Result<(), String> {
    connection.expect_header(&connection.establish()?)
}

pub(super) fn header_waits(connection: &Connection<'_>) -> Result<(), String> {
    let connection = &Connection { public: CLIENT_FIRST, ..connection.with_port(connection.port) };
    connection.accept()?;
    let ack = connection.run("backend_out", &connection.to_backend(ACK))?;
    if ack.verdict != DROP {
        return Err("backend_out does not hold back the end of the handshake until the client's first bytes"
            .to_owned());
    }
    let data = Segment { payload: b"ClientHello".to_vec(), ..connection.to_backend(ACK | PSH) };
    let ran = connection.run("backend_out", &data)?;
    let longer =
        Segment::read(&ran.packet, connection.link).map_err(|fault| format!("the first bytes: {fault}"))?;
    let header =
        longer.payload.strip_suffix(b"ClientHello").ok_or("the client's first bytes are not the last")?;
    connection.expect_header(header)?;
    let expected =
        Segment { payload: longer.payload.clone(), sequence: connection.backend_sequence(FIRST), ..data };
    connection.expect_segment(&ran, PASS, "backend_out", "the client's first bytes", &expected)?;
    // If the client sends nothing, it repeats its ACK when the backend retransmits; that ACK
    // carries the header.
    let connection = &connection.with_port(connection.port + 1000);
    connection.accept()?;
    connection.run("backend_out", &connection.to_backend(ACK))?;
    let repeated = connection.run("backend_out", &connection.to_backend(ACK))?;
    let longer =
        Segment::read(&repeated.packet, connection.link).map_err(|fault| format!("repeated: {fault}"))?;
    connection.expect_header(&longer.payload)
}

pub(super) fn shifted(connection: &Connection<'_>) -> Result<(), String> {
    // An acknowledgement of the header that carries more information is passed on.
    connection.establish()?;
    let first = connection.backend_sequence(FIRST.wrapping_add(connection.header_len()));
    let closed = Segment { window: 0, ..connection.backend_segment(ACK, first) };
    let earlier = Segment { acknowledgement: FIRST, ..closed.clone() };
    connection.expect_passed(
        "backend_in",
        "the acknowledgement of the header, with a closed window",
        &closed,
        &earlier,
    )?;
    let connection = &connection.with_port(connection.port + 2000);
    connection.establish()?;
    let first = connection.backend_sequence(FIRST.wrapping_add(connection.header_len()));
    let lacks = |first: u32| Segment {
        options: sack(first.wrapping_add(100), first.wrapping_add(200)),
        ..connection.backend_segment(ACK, first)
    };
    connection.expect_passed(
        "backend_in",
        "the acknowledgement of the header, with a SACK block",
        &lacks(first),
        &lacks(FIRST),
    )?;
    let connection = &connection.with_port(connection.port + 2000);
    connection.acknowledge()?;
    let len = connection.header_len();
    let data = Segment { payload: b"EHLO client\r\n".to_vec(), ..connection.to_backend(ACK | PSH) };
    let later = Segment { sequence: connection.backend_sequence(FIRST.wrapping_add(len)), ..data.clone() };
    connection.expect_passed("backend_out", "data of the client", &data, &later)?;

    // The client's first byte is missing, and some later bytes have arrived.
    let first = connection.backend_sequence(FIRST.wrapping_add(len));
    let answer = |first: u32| Segment {
        acknowledgement: first,
        options: [timestamps(5, 6), sack(first.wrapping_add(100), first.wrapping_add(200))].concat(),
        payload: b"220 backend\r\n".to_vec(),
        ..connection.backend_segment(ACK | PSH, 0)
    };
    connection.expect_passed(
        "backend_in",
        "data and a SACK block of the backend",
        &answer(first),
        &answer(FIRST),
    )?;
    let bare = |first: u32| Segment {
        options: [vec![1, 1], sack_option(first.wrapping_add(100), first.wrapping_add(200))].concat(),
        ..connection.backend_segment(ACK, first)
    };
    connection.expect_passed("backend_in", "a SACK block without timestamps", &bare(first), &bare(FIRST))
}

fn timestamps(value: u32, echo: u32) -> Vec<u8> {
    [&[1, 1, 8, 10][..], &value.to_be_bytes(), &echo.to_be_bytes()].concat()
}

fn sack(left: u32, right: u32) -> Vec<u8> {
    [vec![1, 1], sack_option(left, right)].concat()
}

fn sack_option(left: u32, right: u32) -> Vec<u8> {
    [&[5, 10][..], &left.to_be_bytes(), &right.to_be_bytes()].concat()
}

pub(super) fn header_retransmitted(connection: &Connection<'_>) -> Result<(), String> {
    // The header was sent and lost. The client's data arrives, and the backend asks for the bytes
    // before it.
    let header = connection.establish()?;
    let data = connection.header_len();
    let first = connection.backend_sequence(FIRST.wrapping_add(data));
    let question = Segment {
        options: [timestamps(0x0A0B_0C0D, 0x0102_0304), sack(first, first.wrapping_add(13))].concat(),
        ..connection.backend_segment(ACK, connection.backend_sequence(FIRST))
    };
    let ran = connection.run("backend_in", &question)?;
    let answer = Segment {
        // It returns to the device that it came from.
        ethernet: question.ethernet.map(|[destination, source]| [source, destination]),
        options: timestamps(0x0102_0304, 0x0A0B_0C0D),
        payload: header,
        sequence: connection.backend_sequence(FIRST),
        ..connection.to_backend(ACK | PSH)
    };
    connection.expect_segment(&ran, REDIRECT, "backend_in", "a question for the header", &answer)?;
    // On its way out its mark identifies it, and its numbers are final.
    let left = connection.run_with("backend_out", &answer, LOOPBACK, ran.mark)?;
    connection.expect_segment(&left, PASS, "backend_out", "the answer", &answer)?;
    if left.mark != 0 {
        return Err(format!("the answer leaves with the mark {:#x}", left.mark));
    }
    // The mark is not enough on a packet from another device.
    let elsewhere = connection.with_port(connection.port + 1000);
    let ran = connection.run_with("backend_out", &elsewhere.to_backend(ACK), OTHER_DEVICE, ran.mark)?;
    if ran.verdict == DROP { Ok(()) } else { Err("a mark lets a packet without a flow through".to_owned()) }
}

pub(super) fn fail_closed(connection: &Connection<'_>) -> Result<(), String> {
    // `client_in` has not seen its SYN.
    for (what, segment) in [
        ("a SYN that client_in has not seen", connection.to_backend(SYN)),
        ("the end of a handshake without a flow", connection.to_backend(ACK)),
        (
            "data without a flow",
            Segment { payload: b"QUIT\r\n".to_vec(), ..connection.to_backend(ACK | PSH) },
        ),
    ] {
        let ran = connection.run("backend_out", &segment)?;
        if ran.verdict != DROP {
            return Err(format!("backend_out gave verdict {} for {what}", ran.verdict.cast_signed()));
        }
        let ran = connection.run_with("backend_out", &segment, 0, 0)?;
        connection.expect_segment(
            &ran,
            PASS,
            "backend_out",
            &format!("{what}, from this host itself"),
            &segment,
        )?;
    }
    // A connection of this host itself may have the ports of a forwarded one. It is not translated,
    // and its SYN ends the forwarded connection.
    let connection = &connection.with_port(connection.port + 2000);
    connection.acknowledge()?;
    let data = Segment { payload: b"QUIT\r\n".to_vec(), ..connection.to_backend(ACK | PSH) };
    let ran = connection.run_with("backend_out", &data, 0, 0)?;
    connection.expect_segment(
        &ran,
        PASS,
        "backend_out",
        "data of this host itself on a forwarded connection's ports",
        &data,
    )?;
    let syn = Segment { acknowledgement: 0, ..connection.to_backend(SYN) };
    let ran = connection.run_with("backend_out", &syn, 0, 0)?;
    connection.expect_segment(
        &ran,
        PASS,
        "backend_out",
        "a SYN of this host itself on a forwarded connection's ports",
        &syn,
    )?;
    let ran = connection.run("backend_out", &data)?;
    if ran.verdict == DROP {
        Ok(())
    } else {
        Err("backend_out still forwards on ports that a connection of this host now uses".to_owned())
    }
}

pub(super) fn swept(connection: &Connection<'_>) -> Result<(), String> {
    let flow = || {
        let mut flows = connection.programs.maps.flows().into_iter();
        flows.find(|(key, _)| key.source.port == connection.port)
    };
    let sweep = |ended: &[ClosedFlow]| {
        let swept = sweep(&connection.programs.programs, ended);
        swept.map_err(|error| format!("sweep: BPF_PROG_TEST_RUN: {}", crate::engine::bpf::chain(&error)))
    };
    connection.acknowledge()?;
    let (key, flow_now) = flow().ok_or("FLOWS has no flow to sweep")?;
    let ended = ClosedFlow::new(key, &flow_now);
    // A flow that had the same ports earlier, the same flow before its last packet, and as many
    // missing flows as fit.
    let mut others = vec![ClosedFlow { key: Key::default(), ..ended }; ClosedFlow::MOST - 2];
    others.push(ClosedFlow { created_ns: ended.created_ns - 1, ..ended });
    others.push(ClosedFlow { last_ns: ended.last_ns - 1, ..ended });
    if sweep(&others)? != 0 || flow().is_none() {
        return Err("sweep has removed a connection that is still open".to_owned());
    }
    others.pop();
    others.push(ended);
    if sweep(&others)? != 1 || flow().is_some() {
        return Err("sweep has not removed a connection that has ended".to_owned());
    }
    Ok(())
}
