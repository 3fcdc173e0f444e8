//! What each check does with a connection, and what it expects.

use injector_common::inline::{ACK, ClosedFlow, Key, PSH, SYN};

use super::{
    connection::{CLIENT_FIRST, DROP, ELSEWHERE, FIRST, LOOPBACK, NEXT, REDIRECT, Way},
    segment::Segment,
};
use crate::engine::inline::programs::sweep;

/// One check, over a connection of its own.
pub(super) type Test = fn(&Way<'_>) -> Result<(), String>;

pub(super) fn header_added(way: &Way<'_>) -> Result<(), String> {
    way.is_header(&way.establish()?)
}

pub(super) fn header_waits(way: &Way<'_>) -> Result<(), String> {
    let way = &Way { public: CLIENT_FIRST, ..way.at(way.port) };
    way.accept()?;
    let ack = way.run("backend_out", &way.to_backend(ACK))?;
    if ack.verdict != DROP {
        return Err("the end of the handshake does not wait for the client's first bytes".to_owned());
    }
    let data = Segment { payload: b"ClientHello".to_vec(), ..way.to_backend(ACK | PSH) };
    let ran = way.run("backend_out", &data)?;
    let longer = Segment::read(&ran.packet, way.link).map_err(|fault| format!("the first bytes: {fault}"))?;
    let header =
        longer.payload.strip_suffix(b"ClientHello").ok_or("the client's first bytes are not the last")?;
    way.is_header(header)?;
    let expected = Segment { payload: longer.payload.clone(), sequence: way.there(FIRST), ..data };
    way.is(&ran, NEXT, "backend_out", "the client's first bytes", &expected)?;
    // One that says nothing repeats its answer when the backend asks, and that takes the header.
    let way = &way.at(way.port + 1000);
    way.accept()?;
    way.run("backend_out", &way.to_backend(ACK))?;
    let repeated = way.run("backend_out", &way.to_backend(ACK))?;
    let longer = Segment::read(&repeated.packet, way.link).map_err(|fault| format!("repeated: {fault}"))?;
    way.is_header(&longer.payload)
}

pub(super) fn shifted(way: &Way<'_>) -> Result<(), String> {
    // An acknowledgement of the header that says more goes on.
    way.establish()?;
    let first = way.there(FIRST.wrapping_add(way.header_len()));
    let closed = Segment { window: 0, ..way.of_backend(ACK, first) };
    let earlier = Segment { acknowledgement: FIRST, ..closed.clone() };
    way.becomes("backend_in", "the acknowledgement of the header, with a closed window", &closed, &earlier)?;
    let way = &way.at(way.port + 2000);
    way.establish()?;
    let first = way.there(FIRST.wrapping_add(way.header_len()));
    let lacks = |first: u32| Segment {
        options: sack(first.wrapping_add(100), first.wrapping_add(200)),
        ..way.of_backend(ACK, first)
    };
    way.becomes(
        "backend_in",
        "the acknowledgement of the header, with a SACK block",
        &lacks(first),
        &lacks(FIRST),
    )?;
    let way = &way.at(way.port + 2000);
    way.acknowledge()?;
    let len = way.header_len();
    let data = Segment { payload: b"EHLO client\r\n".to_vec(), ..way.to_backend(ACK | PSH) };
    let later = Segment { sequence: way.there(FIRST.wrapping_add(len)), ..data.clone() };
    way.becomes("backend_out", "data of the client", &data, &later)?;

    // The client's first byte is missing, and some of what follows is there.
    let first = way.there(FIRST.wrapping_add(len));
    let answer = |first: u32| Segment {
        acknowledgement: first,
        options: [timestamps(5, 6), sack(first.wrapping_add(100), first.wrapping_add(200))].concat(),
        payload: b"220 backend\r\n".to_vec(),
        ..way.of_backend(ACK | PSH, 0)
    };
    way.becomes("backend_in", "data and a SACK block of the backend", &answer(first), &answer(FIRST))?;
    let bare = |first: u32| Segment {
        options: [vec![1, 1], sack_option(first.wrapping_add(100), first.wrapping_add(200))].concat(),
        ..way.of_backend(ACK, first)
    };
    way.becomes("backend_in", "a SACK block without timestamps", &bare(first), &bare(FIRST))
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

pub(super) fn header_retransmitted(way: &Way<'_>) -> Result<(), String> {
    // The header was sent and lost. The client's data comes, and the backend asks for what is before it.
    let header = way.establish()?;
    let data = way.header_len();
    let first = way.there(FIRST.wrapping_add(data));
    let question = Segment {
        options: [timestamps(0x0A0B_0C0D, 0x0102_0304), sack(first, first.wrapping_add(13))].concat(),
        ..way.of_backend(ACK, way.there(FIRST))
    };
    let ran = way.run("backend_in", &question)?;
    let answer = Segment {
        // It goes back where it came from.
        ethernet: question.ethernet.map(|[destination, source]| [source, destination]),
        options: timestamps(0x0102_0304, 0x0A0B_0C0D),
        payload: header,
        sequence: way.there(FIRST),
        ..way.to_backend(ACK | PSH)
    };
    way.is(&ran, REDIRECT, "backend_in", "a question for the header", &answer)?;
    // On its way out it is known by its mark, and has its numbers already.
    let left = way.run_with("backend_out", &answer, LOOPBACK, ran.mark)?;
    way.is(&left, NEXT, "backend_out", "the answer", &answer)?;
    if left.mark != 0 {
        return Err(format!("the answer leaves with the mark {:#x}", left.mark));
    }
    // The mark alone opens no way: not on a packet of another device.
    let elsewhere = way.at(way.port + 1000);
    let ran = way.run_with("backend_out", &elsewhere.to_backend(ACK), ELSEWHERE, ran.mark)?;
    if ran.verdict == DROP { Ok(()) } else { Err("a mark opens the way for what has no flow".to_owned()) }
}

pub(super) fn fail_closed(way: &Way<'_>) -> Result<(), String> {
    // Nobody has seen its SYN.
    for (what, segment) in [
        ("a SYN that client_in has not seen", way.to_backend(SYN)),
        ("the end of a handshake without a flow", way.to_backend(ACK)),
        ("data without a flow", Segment { payload: b"QUIT\r\n".to_vec(), ..way.to_backend(ACK | PSH) }),
    ] {
        let ran = way.run("backend_out", &segment)?;
        if ran.verdict != DROP {
            return Err(format!("backend_out gave verdict {} for {what}", ran.verdict.cast_signed()));
        }
        let ran = way.run_with("backend_out", &segment, 0, 0)?;
        way.is(&ran, NEXT, "backend_out", &format!("{what}, from this host itself"), &segment)?;
    }
    // A connection of this host itself may have the ports of one that was forwarded: nothing is translated, and with its SYN
    // the other is over.
    let way = &way.at(way.port + 2000);
    way.acknowledge()?;
    let data = Segment { payload: b"QUIT\r\n".to_vec(), ..way.to_backend(ACK | PSH) };
    let ran = way.run_with("backend_out", &data, 0, 0)?;
    way.is(&ran, NEXT, "backend_out", "data of this host itself on a forwarded connection's ports", &data)?;
    let syn = Segment { acknowledgement: 0, ..way.to_backend(SYN) };
    let ran = way.run_with("backend_out", &syn, 0, 0)?;
    way.is(&ran, NEXT, "backend_out", "a SYN of this host itself on a forwarded connection's ports", &syn)?;
    let ran = way.run("backend_out", &data)?;
    if ran.verdict == DROP {
        Ok(())
    } else {
        Err("a forwarded connection has the ports of this host's".to_owned())
    }
}

pub(super) fn swept(way: &Way<'_>) -> Result<(), String> {
    let flow = || {
        let mut flows = way.bench.maps.flows().into_iter();
        flows.find(|(key, _)| key.source.port == way.port)
    };
    let sweep = |ended: &[ClosedFlow]| {
        let swept = sweep(&way.bench.programs, ended);
        swept.map_err(|error| format!("sweep: BPF_PROG_TEST_RUN: {}", crate::engine::bpf::chain(&error)))
    };
    way.acknowledge()?;
    let (key, flow_now) = flow().ok_or("there is no flow to sweep")?;
    let ended = ClosedFlow::new(key, &flow_now);
    // One that had the same ports, the same one seen before its last packet, and as many that are not there as can be listed.
    let mut others = vec![ClosedFlow { key: Key::default(), ..ended }; ClosedFlow::MOST - 2];
    others.push(ClosedFlow { created_ns: ended.created_ns - 1, ..ended });
    others.push(ClosedFlow { last_ns: ended.last_ns - 1, ..ended });
    if sweep(&others)? != 0 || flow().is_none() {
        return Err("sweep has taken out a connection that goes on".to_owned());
    }
    others.pop();
    others.push(ended);
    if sweep(&others)? != 1 || flow().is_some() {
        return Err("sweep has not taken out a connection that has ended".to_owned());
    }
    Ok(())
}
