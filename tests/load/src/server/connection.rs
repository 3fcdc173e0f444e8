//! The state machine of one server connection.

use std::io;
use std::net::{IpAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use injector_common::proxy;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::job::ServerCounts;
use crate::service::{PortKind, Script, Service};

/// What the thread does with a connection after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Wait for the next event.
    Wait,
    /// From now on, also wait for space in the send buffer.
    WaitWritable,
    /// Close it: it is complete.
    Close,
    /// Close it and count a failure.
    Fail,
}

/// What the connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A header.
    Header,
    /// A request of this step of the dialogue, of which `received` bytes have arrived; or bulk.
    Payload { step: usize, received: usize },
    /// Sends bulk until this time.
    Sending(Instant),
}

/// An accepted connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    service: &'static Service,
    state: State,
}

/// Bytes that are read and inspected: a header followed by a request.
const INSPECT_LIMIT: usize = 64 << 10;

impl Connection {
    pub(super) fn new(stream: TcpStream, service: &'static Service, port_kind: PortKind) -> Self {
        let state = match port_kind {
            PortKind::Header => State::Header,
            PortKind::Bare => State::Payload { step: 0, received: 0 },
        };
        Self { stream, service, state }
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Advances after an event; `client` is the address that a header must carry.
    pub(super) fn advance(
        &mut self,
        readable: bool,
        client: IpAddr,
        payload: &[u8],
        buffer: &mut [u8],
        counts: &mut ServerCounts,
    ) -> Next {
        if let State::Sending(until) = self.state {
            return self.send(until, payload, counts);
        }
        if !readable {
            return Next::Wait;
        }
        let dropped = self.service.script == Script::Sink && self.state != State::Header;
        let (limit, flags) =
            if dropped { (buffer.len(), RecvFlags::TRUNC) } else { (INSPECT_LIMIT, RecvFlags::empty()) };
        let length = match recv(self.stream.as_fd(), &mut buffer[..limit], flags) {
            Ok((_, length)) => length,
            Err(Errno::AGAIN | Errno::INTR) => return Next::Wait,
            Err(_) => return Next::Fail,
        };
        if length == 0 {
            return self.finished(counts);
        }
        let mut start = 0;
        if self.state == State::Header {
            match header(&buffer[..length], client) {
                Some(length) => start = length,
                None => {
                    counts.bad_headers += 1;
                    return Next::Close;
                }
            }
            counts.headers += 1;
            self.state = State::Payload { step: 0, received: 0 };
            if let Script::Dialogue { greeting, .. } = self.service.script
                && greeting > 0
                && send_all(&self.stream, payload, greeting).is_err()
            {
                return Next::Fail;
            }
        }
        counts.bytes_in += (length - start) as u64;
        let rest = if dropped { &[] } else { &buffer[start..length] };
        self.payload(rest, payload, counts)
    }

    /// The client has closed. This may happen within a dialogue: at the end of a run clients close
    /// at once.
    fn finished(&self, counts: &mut ServerCounts) -> Next {
        if self.state == State::Header {
            counts.silent += 1;
        }
        if self.service.script == Script::Source { Next::Fail } else { Next::Close }
    }

    fn payload(&mut self, received: &[u8], payload: &[u8], counts: &mut ServerCounts) -> Next {
        match self.service.script {
            Script::Sink => Next::Wait,
            Script::Source => match <[u8; 4]>::try_from(received) {
                Ok(millis) => {
                    let duration = Duration::from_millis(u32::from_be_bytes(millis).into());
                    self.state = State::Sending(Instant::now() + duration);
                    Next::WaitWritable
                }
                // After a header that arrived alone, or in segments, which four bytes never do.
                Err(_) if received.is_empty() => Next::Wait,
                Err(_) => Next::Fail,
            },
            Script::Dialogue { steps, ends, .. } => {
                self.respond(received.len(), steps, ends, payload, counts)
            }
        }
    }

    fn respond(
        &mut self,
        length: usize,
        steps: &[(usize, usize)],
        ends: bool,
        payload: &[u8],
        counts: &mut ServerCounts,
    ) -> Next {
        let State::Payload { step, received } = self.state else { return Next::Fail };
        let (request, response) = steps[step];
        let received = received + length;
        if received < request {
            self.state = State::Payload { step, received };
            return Next::Wait;
        }
        // Clients wait for each response before the next request.
        if received > request || send_all(&self.stream, payload, response).is_err() {
            return Next::Fail;
        }
        counts.bytes_out += response as u64;
        self.state = State::Payload { step: (step + 1) % steps.len(), received: 0 };
        if ends && step + 1 == steps.len() { Next::Close } else { Next::Wait }
    }

    fn send(&mut self, until: Instant, payload: &[u8], counts: &mut ServerCounts) -> Next {
        match send(self.stream.as_fd(), payload, SendFlags::NOSIGNAL) {
            Ok(length) => counts.bytes_out += length as u64,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return Next::Fail,
        }
        if Instant::now() >= until { Next::Close } else { Next::Wait }
    }
}

/// The length of the header at the start, if it is complete and carries the client's address.
fn header(bytes: &[u8], client: IpAddr) -> Option<usize> {
    let parsed = proxy::parse(bytes).ok()?;
    let source = parsed.command.addresses()?.source();
    (source.ip() == client).then_some(parsed.len)
}

/// Sends `length` bytes at once. They always fit, because the other end has read everything before.
pub(super) fn send_all(stream: &TcpStream, payload: &[u8], length: usize) -> io::Result<()> {
    let sent = send(stream.as_fd(), &payload[..length], SendFlags::NOSIGNAL)?;
    if sent == length { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use injector_common::proxy::{Addresses, Command, SAFE_LEN, v2};

    fn whole(source: &str) -> Vec<u8> {
        let ends = Addresses::new(source.parse().unwrap(), "192.0.2.10:25".parse().unwrap());
        let mut bytes = [0; SAFE_LEN];
        let length = v2::encode(&Command::Proxy(ends), &[], &mut bytes).unwrap();
        bytes[..length].to_vec()
    }

    #[test]
    fn a_header_must_be_whole_and_the_clients() {
        let client: IpAddr = "198.51.100.7".parse().unwrap();
        let mut bytes = whole("198.51.100.7:1234");
        assert_eq!(header(&bytes, client), Some(28));
        assert_eq!(header(&bytes[..27], client), None, "in pieces");
        assert_eq!(header(&whole("10.25.0.1:1234"), client), None, "the edge's own");
        bytes.extend_from_slice(b"EHLO");
        assert_eq!(header(&bytes, client), Some(28));
        assert_eq!(header(&[b'x'; 64], client), None);
        assert_eq!(header(b"PROXY TCP4 198.51.100.7 192.0.2.10 1234 25\r\n", client), Some(44));
    }
}
