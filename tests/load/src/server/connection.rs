//! One connection of the server, from event to event.

use std::io;
use std::net::{IpAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use injector_common::proxy;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::order::Counts;
use crate::service::{Door, Service, Talk};

/// What the thread does with a connection after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing: more will come.
    Wait,
    /// It has to hear of room in the send buffer as well, from now on.
    WaitForRoom,
    /// It is done.
    Close,
    /// It went wrong.
    Fail,
}

/// Where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The first bytes have to be a header.
    Header,
    /// A question of this step of the dialogue, of which so many bytes have come; or bulk.
    Payload { step: usize, come: usize },
    /// Bulk until then.
    Sending(Instant),
}

/// A connection that was accepted.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    service: &'static Service,
    state: State,
}

/// Bytes that are looked at rather than dropped: a header with a question behind it.
const LOOK: usize = 64 << 10;

impl Connection {
    pub(super) fn new(stream: TcpStream, service: &'static Service, door: Door) -> Self {
        let state = match door {
            Door::Header => State::Header,
            Door::Bare => State::Payload { step: 0, come: 0 },
        };
        Self { stream, service, state }
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Goes on after an event; `client` is the address that a header must carry.
    pub(super) fn go_on(
        &mut self,
        readable: bool,
        client: IpAddr,
        payload: &[u8],
        buffer: &mut [u8],
        counts: &mut Counts,
    ) -> Next {
        if let State::Sending(until) = self.state {
            return self.send(until, payload, counts);
        }
        if !readable {
            return Next::Wait;
        }
        let dropped = self.service.talk == Talk::Sink && self.state != State::Header;
        let (room, flags) =
            if dropped { (buffer.len(), RecvFlags::TRUNC) } else { (LOOK, RecvFlags::empty()) };
        let length = match recv(self.stream.as_fd(), &mut buffer[..room], flags) {
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
            self.state = State::Payload { step: 0, come: 0 };
            if let Talk::Dialogue { greeting, .. } = self.service.talk
                && greeting > 0
                && say(&self.stream, payload, greeting).is_err()
            {
                return Next::Fail;
            }
        }
        counts.bytes_in += (length - start) as u64;
        let rest = if dropped { &[] } else { &buffer[start..length] };
        self.payload(rest, payload, counts)
    }

    /// The client has finished. In the middle of a dialogue that is in order, too: at the end of a run clients just leave.
    fn finished(&self, counts: &mut Counts) -> Next {
        if self.state == State::Header {
            counts.silent += 1;
        }
        if self.service.talk == Talk::Source { Next::Fail } else { Next::Close }
    }

    fn payload(&mut self, came: &[u8], payload: &[u8], counts: &mut Counts) -> Next {
        match self.service.talk {
            Talk::Sink => Next::Wait,
            Talk::Source => match <[u8; 4]>::try_from(came) {
                Ok(millis) => {
                    let duration = Duration::from_millis(u32::from_be_bytes(millis).into());
                    self.state = State::Sending(Instant::now() + duration);
                    Next::WaitForRoom
                }
                // Behind a header that came alone, or in pieces, which four bytes never do.
                Err(_) if came.is_empty() => Next::Wait,
                Err(_) => Next::Fail,
            },
            Talk::Dialogue { steps, ends, .. } => self.answer(came.len(), steps, ends, payload, counts),
        }
    }

    fn answer(
        &mut self,
        length: usize,
        steps: &[(usize, usize)],
        ends: bool,
        payload: &[u8],
        counts: &mut Counts,
    ) -> Next {
        let State::Payload { step, come } = self.state else { return Next::Fail };
        let (question, answer) = steps[step];
        let come = come + length;
        if come < question {
            self.state = State::Payload { step, come };
            return Next::Wait;
        }
        // Clients wait for each answer.
        if come > question || say(&self.stream, payload, answer).is_err() {
            return Next::Fail;
        }
        counts.bytes_out += answer as u64;
        self.state = State::Payload { step: (step + 1) % steps.len(), come: 0 };
        if ends && step + 1 == steps.len() { Next::Close } else { Next::Wait }
    }

    fn send(&mut self, until: Instant, payload: &[u8], counts: &mut Counts) -> Next {
        match send(self.stream.as_fd(), payload, SendFlags::NOSIGNAL) {
            Ok(length) => counts.bytes_out += length as u64,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return Next::Fail,
        }
        if Instant::now() >= until { Next::Close } else { Next::Wait }
    }
}

/// The length of the header at the start, if it is whole and carries the client's address.
fn header(bytes: &[u8], client: IpAddr) -> Option<usize> {
    let parsed = proxy::parse(bytes).ok()?;
    let source = parsed.command.addresses()?.source();
    (source.ip() == client).then_some(parsed.len)
}

/// Writes so many bytes at once; they always fit, for the other end has read all that came before.
pub(super) fn say(stream: &TcpStream, payload: &[u8], length: usize) -> io::Result<()> {
    let said = send(stream.as_fd(), &payload[..length], SendFlags::NOSIGNAL)?;
    if said == length { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
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
