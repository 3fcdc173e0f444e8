//! Parses what servers send: just enough of four protocols to distinguish a greeting from a
//! rejection, and a header that was understood from one that was read as commands.

use crate::protocol::Protocol;

/// The protocol inside TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    /// RFC 5321.
    Smtp,
    /// RFC 9051.
    Imap,
    /// RFC 1939.
    Pop3,
    /// RFC 5804.
    Sieve,
    /// Whatever it is.
    Unknown,
}

/// How much of a greeting the server has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GreetingState {
    /// Less than a greeting.
    Incomplete,
    /// A greeting, or an error reply before its end: the client may send now.
    Complete,
    /// A rejection; the server closes the connection.
    Rejected,
    /// Something that is not a greeting of this protocol.
    Strange,
}

/// What all the bytes of a connection amount to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Response {
    /// The server sent nothing.
    Empty,
    /// A greeting without error replies.
    Greeted(String),
    /// A greeting, then an error reply to what the client sent.
    Misunderstood(String, String),
    /// A rejection.
    Rejected(String),
    /// Not a greeting of this protocol.
    Strange(String),
}

/// What a line means if the client sent nothing but a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// A line of a greeting, but not its last.
    Continued,
    Greeting,
    /// An error reply: the server does not recognise what it was sent as a command.
    Complaint,
    /// A rejection, whatever the client sent.
    NoService,
    Strange,
}

impl Dialect {
    pub(super) const fn of(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Smtp | Protocol::Submission | Protocol::Submissions => Self::Smtp,
            Protocol::Imap | Protocol::Imaps => Self::Imap,
            Protocol::Pop3 | Protocol::Pop3s => Self::Pop3,
            Protocol::Sieve => Self::Sieve,
            Protocol::Plain => Self::Unknown,
        }
    }

    /// Whether the client may send yet.
    pub(super) fn greeting_state(self, said: &[u8]) -> GreetingState {
        for (index, line) in complete_lines(said).enumerate() {
            match self.line(line) {
                Line::Greeting => return GreetingState::Complete,
                Line::Complaint if index > 0 => return GreetingState::Complete,
                Line::NoService | Line::Complaint => return GreetingState::Rejected,
                Line::Strange => return GreetingState::Strange,
                Line::Continued => {}
            }
        }
        // A protocol without lines, such as TLS, may never send a line end.
        if said.first().is_some_and(|byte| !byte.is_ascii_graphic()) || said.len() > 4096 {
            return GreetingState::Strange;
        }
        GreetingState::Incomplete
    }

    /// Classifies all that a server sent after a header or nothing, and after QUIT if it greeted.
    pub(super) fn classify(self, said: &[u8]) -> Response {
        if said.is_empty() {
            return Response::Empty;
        }
        let lines: Vec<&[u8]> = said.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).collect();
        let first = readable(lines.first().copied().unwrap_or_default());
        match lines.first().map(|line| self.line(line)) {
            Some(Line::Greeting | Line::Continued) => {}
            Some(Line::NoService | Line::Complaint) => return Response::Rejected(first),
            _ => return Response::Strange(first),
        }
        for line in lines.iter().skip(1) {
            match self.line(line) {
                Line::Complaint => return Response::Misunderstood(first, readable(line)),
                // IMAP and Sieve reply BYE to LOGOUT as well.
                Line::NoService if self == Self::Smtp => return Response::Rejected(readable(line)),
                _ => {}
            }
        }
        Response::Greeted(first)
    }

    fn line(self, line: &[u8]) -> Line {
        let text = String::from_utf8_lossy(line);
        let text = text.trim_end();
        let mut words = text.split_ascii_whitespace();
        match self {
            Self::Smtp => smtp(text),
            Self::Imap => match (words.next(), words.next().map(str::to_ascii_uppercase).as_deref()) {
                (Some("*"), Some("OK" | "PREAUTH")) => Line::Greeting,
                (Some("*"), Some("BYE")) if text.to_ascii_lowercase().contains("invalid") => Line::Complaint,
                (Some("*"), Some("BYE")) => Line::NoService,
                (Some(_), Some("BAD" | "NO")) => Line::Complaint,
                (Some("*"), _) => Line::Continued,
                _ => Line::Strange,
            },
            Self::Pop3 => match words.next() {
                Some("+OK") => Line::Greeting,
                Some("-ERR") if text.to_ascii_lowercase().contains("command") => Line::Complaint,
                Some("-ERR") => Line::NoService,
                _ => Line::Strange,
            },
            Self::Sieve => match words.next().map(str::to_ascii_uppercase).as_deref() {
                Some("OK") => Line::Greeting,
                Some("NO") => Line::Complaint,
                Some("BYE") => Line::NoService,
                Some(word) if word.starts_with('"') => Line::Continued,
                _ => Line::Strange,
            },
            Self::Unknown => Line::Greeting,
        }
    }
}

/// A reply: three digits, then `-` if more lines follow, and perhaps an enhanced status (RFC 3463).
/// Error replies to what the client sent are 500 to 504 (RFC 5321, section 4.2.2) or X.5.X, as in
/// postscreen's `521 5.5.1 Protocol error`.
fn smtp(text: &str) -> Line {
    let (code, rest) = text.split_at_checked(3).unwrap_or((text, ""));
    if code.len() < 3 || !code.bytes().all(|byte| byte.is_ascii_digit()) {
        return Line::Strange;
    }
    let status = rest.trim_start_matches(['-', ' ']);
    let about_protocol = status.split('.').nth(1) == Some("5") && status.as_bytes().get(1) == Some(&b'.');
    match code.as_bytes().first() {
        Some(b'2') if rest.starts_with('-') => Line::Continued,
        Some(b'2') => Line::Greeting,
        Some(b'4' | b'5') if about_protocol || ("500"..="504").contains(&code) => Line::Complaint,
        Some(b'4' | b'5') => Line::NoService,
        _ => Line::Strange,
    }
}

fn complete_lines(said: &[u8]) -> impl Iterator<Item = &[u8]> {
    let end = said.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
    said.get(..end).unwrap_or_default().split(|byte| *byte == b'\n').filter(|line| !line.is_empty())
}

/// A line for display: without control characters, and shortened.
pub(super) fn readable(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut shown: String =
        text.trim_end().chars().take(160).map(|c| if c.is_control() { '·' } else { c }).collect();
    if text.trim_end().chars().count() > 160 {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    const POSTFIX: &str = "220 mail.example.test ESMTP Postfix\r\n";
    const IMAP: &str = "* OK [CAPABILITY IMAP4rev1] Dovecot (Debian) ready.\r\n";

    #[test]
    fn the_client_may_send_after_the_last_line_of_a_greeting_or_an_error() {
        use Dialect::{Imap, Pop3, Sieve, Smtp, Unknown};
        use GreetingState::{Complete, Incomplete, Rejected, Strange};
        for (dialect, said, expected) in [
            (Smtp, "", Incomplete),
            (Smtp, "220 mail.exa", Incomplete),
            (Smtp, "220-mail.example.test ESMTP Postfix\r\n", Incomplete),
            (Smtp, "220-mail.example.test ESMTP Postfix\r\n220 mail.example.test\r\n", Complete),
            (
                Smtp,
                "220-mail.example.test ESMTP Postfix\r\n502 5.5.2 Error: command not recognized\r\n",
                Complete,
            ),
            (Smtp, POSTFIX, Complete),
            (Smtp, "421 4.3.2 No system resources\r\n", Rejected),
            (Smtp, "500 Invalid command\r\n", Rejected),
            (Smtp, "* OK ready\r\n", Strange),
            (Smtp, "\u{15}\u{3}\u{1}", Strange),
            (Imap, IMAP, Complete),
            (Imap, "* PREAUTH welcome\r\n", Complete),
            (Imap, "* BYE Too many connections\r\n", Rejected),
            (Imap, "220 mail\r\n", Strange),
            (Pop3, "+OK ready\r\n", Complete),
            (Pop3, "-ERR [SYS/TEMP] later\r\n", Rejected),
            (Sieve, "\"IMPLEMENTATION\" \"Dovecot Pigeonhole\"\r\n", Incomplete),
            (Sieve, "\"IMPLEMENTATION\" \"Dovecot Pigeonhole\"\r\nOK \"ready.\"\r\n", Complete),
            (Sieve, "BYE \"no\"\r\n", Rejected),
            (Unknown, "anything\n", Complete),
        ] {
            assert_eq!(dialect.greeting_state(said.as_bytes()), expected, "{dialect:?} {said:?}");
        }
    }

    /// Replies of Postfix 3.7.11 and Dovecot 2.3.19.1.
    #[test]
    fn error_replies_show_that_the_header_was_read_as_commands() {
        use Dialect::{Imap, Pop3, Smtp};
        type Is = fn(&Response) -> bool;
        let greeted: Is = |response| matches!(response, Response::Greeted(_));
        let misunderstood: Is = |response| matches!(response, Response::Misunderstood(..));
        let rejected: Is = |response| matches!(response, Response::Rejected(_));
        for (dialect, rest, expected) in [
            (Smtp, "221 2.0.0 Bye\r\n", greeted),
            (Smtp, "500 5.5.2 Error: bad syntax\r\n221 2.0.0 Bye\r\n", misunderstood),
            (Smtp, "500 5.5.2 Error: command not recognized\r\n221 2.0.0 Bye\r\n", misunderstood),
            (Smtp, "521 5.5.1 Protocol error\r\n", misunderstood),
            (Smtp, "521 5.5.2 mail.example.test Error: bare <LF> received\r\n", misunderstood),
            (Smtp, "521 5.7.1 Blocked by zen.example\r\n", rejected),
            (Imap, "* BYE Logging out\r\na OK Logout completed.\r\n", greeted),
            (
                Imap,
                "* BAD Error in IMAP command received by server.\r\n* BYE Too many invalid IMAP commands.\r\n",
                misunderstood,
            ),
            (
                Imap,
                "PROXY BAD Error in IMAP command received by server.\r\n* BYE Logging out\r\n",
                misunderstood,
            ),
            (Pop3, "+OK Logging out\r\n", greeted),
            (Pop3, "-ERR Unknown command.\r\n-ERR Too many invalid bad commands.\r\n", misunderstood),
        ] {
            let greeting = match dialect {
                Smtp => POSTFIX,
                Imap => IMAP,
                _ => "+OK Dovecot (Debian) ready.\r\n",
            };
            let response = dialect.classify(format!("{greeting}{rest}").as_bytes());
            assert!(expected(&response), "{rest:?}: {response:?}");
        }
        assert_eq!(Smtp.classify(b""), Response::Empty);
        assert!(rejected(&Smtp.classify(b"421 4.3.0 mail.example.test Server local error\r\n")));
        assert!(matches!(Smtp.classify(b"* OK ready\r\n"), Response::Strange(_)));
    }

    #[test]
    fn displayed_lines_have_no_control_characters() {
        assert_eq!(readable(b"a\x1b[31m\r\n"), "a·[31m");
        assert_eq!(readable(&[b'a'; 500]).chars().count(), 161);
    }
}
