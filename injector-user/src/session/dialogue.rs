//! What user space learns from the lines of a clear-text server: whether it has read the PROXY
//! header as commands, and whether a line of the injector may follow. Pure.

use std::time::{Duration, Instant};

use crate::protocol::Protocol;

/// A server answers the header at once. Later lines, such as that of an inactivity timeout, are
/// not answers to it.
const HEADER_ANSWER_TIME: Duration = Duration::from_secs(10);
/// More than any greeting's line has (RFC 5321, section 4.5.3.1.5).
const MAX_LINE: usize = 1024;

/// More than any greeting has. What a server sends beyond it, before the client has spoken, is not
/// read line by line.
const MAX_GREETING: usize = 4096;

/// The lines of the server, as far as they matter.
#[derive(Debug)]
pub(super) struct ServerLines {
    protocol: Protocol,
    /// What was forwarded ends with a line.
    at_line_start: bool,
    /// That line ends a reply. At first there is none.
    reply_ended: bool,
    /// Until the client sends a byte.
    greeting: Option<Greeting>,
}

#[derive(Debug, Default)]
struct Greeting {
    /// The line that is not complete yet.
    line: Vec<u8>,
    /// When the first line was complete.
    greeted: Option<Instant>,
    /// How many bytes were sent.
    seen: usize,
}

impl ServerLines {
    pub(super) fn new(protocol: Protocol) -> Self {
        Self { protocol, at_line_start: true, reply_ended: true, greeting: Some(Greeting::default()) }
    }

    /// The client has sent a byte: from here on, the server may answer it.
    pub(super) fn client_spoke(&mut self) {
        self.greeting = None;
    }

    /// Whether a line of the injector may follow what was forwarded.
    pub(super) fn may_be_followed(&self) -> bool {
        self.at_line_start && self.reply_ended
    }

    /// Payload was forwarded that was not seen.
    pub(super) fn skip(&mut self) {
        (self.at_line_start, self.reply_ended, self.greeting) = (false, false, None);
    }

    /// Reads what the server sends, before it is forwarded. Returns the line that answers the
    /// header, if there is one; then nothing of `payload` may be forwarded.
    pub(super) fn read(&mut self, payload: &[u8], now: impl FnOnce() -> Instant) -> Option<String> {
        if let Some(greeting) = &mut self.greeting
            && let Some(line) = greeting.answer(self.protocol, payload, now())
        {
            return Some(String::from_utf8_lossy(&line).trim_end().chars().take(80).collect());
        }
        let ends_at_line = payload.ends_with(b"\n");
        // Before the client has asked for something, there is no message to be in the middle of.
        let ends_reply = |line| self.greeting.is_some() || self.protocol.ends_reply(line);
        self.reply_ended = ends_at_line && last_line(payload, self.at_line_start).is_some_and(ends_reply);
        self.at_line_start = ends_at_line;
        None
    }
}

impl Greeting {
    fn answer(&mut self, protocol: Protocol, payload: &[u8], now: Instant) -> Option<Vec<u8>> {
        let late = |greeted: Instant| now.saturating_duration_since(greeted) > HEADER_ANSWER_TIME;
        if self.greeted.is_some_and(late) {
            return None;
        }
        let left = MAX_GREETING.saturating_sub(self.seen);
        self.seen = self.seen.saturating_add(payload.len());
        let payload = payload.get(..left).unwrap_or(payload);
        for piece in payload.split_inclusive(|byte| *byte == b'\n') {
            let room = MAX_LINE.saturating_sub(self.line.len()).min(piece.len());
            self.line.extend_from_slice(piece.get(..room).unwrap_or_default());
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                if protocol.misreads_header(&line, self.greeted.is_none()) {
                    return Some(line);
                }
                self.greeted.get_or_insert(now);
            }
        }
        None
    }
}

/// The last line of a payload that ends with one, if the payload has all of it.
fn last_line(payload: &[u8], at_line_start: bool) -> Option<&[u8]> {
    let before = payload.get(..payload.len().checked_sub(1)?)?;
    // A longer line does not end a reply.
    let tail = before.len().saturating_sub(MAX_LINE);
    match memchr::memrchr(b'\n', before.get(tail..)?) {
        Some(at) => payload.get(tail + at + 1..),
        None => (at_line_start && tail == 0).then_some(payload),
    }
}

/// Whether a client's payload ends with the command that ends the session. A line that began in an
/// earlier payload is not recognized.
pub(super) fn ends_with_quit(protocol: Protocol, payload: &[u8]) -> bool {
    payload.ends_with(b"\n") && last_line(payload, true).is_some_and(|line| protocol.is_quit(line))
}

/// Whether a client's payload can be text: it does not begin with control characters other than those
/// of text. The first bytes of TLS are `0x16 0x03` (RFC 8446, section 5.1).
pub(super) fn is_text(payload: &[u8]) -> bool {
    payload.iter().take(2).all(|byte| *byte >= b' ' || matches!(byte, b'\t' | b'\n' | b'\r'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The line that answers the header, in pieces of these lengths.
    fn answer(protocol: Protocol, text: &[u8], pieces: &[usize]) -> Option<String> {
        let (mut lines, now) = (ServerLines::new(protocol), Instant::now());
        let mut rest = text;
        for len in pieces.iter().copied().cycle() {
            let (piece, after) = rest.split_at(len.clamp(1, rest.len()));
            if let Some(line) = lines.read(piece, || now) {
                return Some(line);
            }
            if after.is_empty() {
                return None;
            }
            rest = after;
        }
        None
    }

    const STANDARD_PORT: &[u8] =
        b"220 mail ESMTP Postfix\r\n500 5.5.2 Error: bad syntax\r\n500 5.5.2 Error: bad syntax\r\n221 2.0.0 Bye\r\n";
    const GREETING: &[u8] = b"220-mail ESMTP\r\n220 wait for it\r\n";

    proptest! {
        #[test]
        fn pieces_do_not_matter(pieces in prop::collection::vec(1..40_usize, 1..20)) {
            let found = answer(Protocol::Smtp, STANDARD_PORT, &pieces);
            prop_assert_eq!(found.as_deref(), Some("500 5.5.2 Error: bad syntax"));
            prop_assert_eq!(answer(Protocol::Smtp, GREETING, &pieces), None);
        }

        /// A server's bytes never cause a panic, and a line follows only a complete line.
        #[test]
        fn any_bytes_are_read(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 1..20)) {
            for protocol in Protocol::ALL {
                let mut lines = ServerLines::new(protocol);
                for piece in &pieces {
                    if lines.read(piece, Instant::now).is_none() {
                        prop_assert!(!lines.may_be_followed() || piece.ends_with(b"\n"));
                    }
                }
            }
        }
    }

    #[test]
    fn an_answer_to_the_client_or_a_late_line_is_not_an_answer_to_the_header() {
        let now = Instant::now();
        let mut lines = ServerLines::new(Protocol::Smtp);
        assert_eq!(lines.read(b"220 mail\r\n", || now), None);
        lines.client_spoke();
        assert_eq!(lines.read(b"500 5.5.2 what?\r\n", || now), None);
        let mut lines = ServerLines::new(Protocol::Pop3);
        assert_eq!(lines.read(b"+OK ready\r\n", || now), None);
        let late = now + Duration::from_secs(180);
        assert_eq!(lines.read(b"-ERR Disconnected for inactivity.\r\n", || late), None);
    }

    #[test]
    fn a_line_may_follow_a_complete_reply() {
        let now = Instant::now();
        let mut lines = ServerLines::new(Protocol::Smtp);
        lines.client_spoke();
        assert!(lines.may_be_followed());
        for (payload, may) in [
            (&b"220 mail\r\n"[..], true),
            (b"250-one\r\n", false),
            (b"250-two\r\n250 three\r\n", true),
            (b"250 o", false),
            (b"k\r\n", false),
            (b"250 ok\r\n", true),
        ] {
            assert_eq!(lines.read(payload, || now), None);
            assert_eq!(lines.may_be_followed(), may, "{payload:?}");
        }
        lines.skip();
        assert!(!lines.may_be_followed());
        assert_eq!(lines.read(b"the end\r\n250 ok\r\n", || now), None);
        assert!(lines.may_be_followed());
    }

    #[test]
    fn a_line_may_follow_any_line_of_a_greeting() {
        let (mut lines, now) = (ServerLines::new(Protocol::Imap), Instant::now());
        assert_eq!(lines.read(b"hello there\r\n", || now), None);
        assert!(lines.may_be_followed());
        lines.client_spoke();
        assert_eq!(lines.read(b"hello there\r\n", || now), None);
        assert!(!lines.may_be_followed());
    }

    #[test]
    fn a_client_ends_its_session_with_the_last_line() {
        use Protocol::{Imap, Pop3, Sieve, Smtp};
        for (protocol, payload, expected) in [
            (Smtp, "QUIT\r\n", true),
            (Smtp, "quit \n", true),
            (Smtp, "DATA\r\n.\r\nQUIT\r\n", true),
            (Pop3, "RETR 1\r\nQuit\r\n", true),
            (Imap, "a17 LOGOUT\r\n", true),
            (Imap, "LOGOUT\r\n", false),
            (Imap, "a17 UID LOGOUT\r\n", false),
            (Sieve, "logout\r\n", true),
            (Smtp, "QUIT", false),
            (Smtp, "QUIT\r\nNOOP\r\n", false),
            (Smtp, "VRFY QUIT\r\n", false),
            (Smtp, "\r\n", false),
            (Smtp, "", false),
            (Protocol::Plain, "QUIT\r\n", false),
        ] {
            assert_eq!(ends_with_quit(protocol, payload.as_bytes()), expected, "{protocol} {payload:?}");
        }
    }

    #[test]
    fn tls_is_not_text() {
        assert!(is_text(b"EHLO client\r\n\tM\xc3\xbcller") && !is_text(b"\x16\x03\x01\x02\x00"));
    }

    #[test]
    fn what_follows_a_greeting_of_4096_bytes_is_no_answer() {
        let mut lines = ServerLines::new(Protocol::Smtp);
        assert_eq!(lines.read(&[b'x'; MAX_GREETING], Instant::now), None);
        assert_eq!(lines.read(b"\r\n500 5.5.2 what?\r\n", Instant::now), None);
    }
}
