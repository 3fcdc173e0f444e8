//! What a server's lines show: whether it has read a PROXY header as commands, and where a line of
//! the injector's own may follow.

use super::Protocol;

/// The start of a version 1 header, in a reply that quotes the command.
const V1_COMMANDS: [&[u8]; 3] = [b"PROXY TCP4", b"PROXY TCP6", b"PROXY UNKNOWN"];

impl Protocol {
    /// Whether a server that sends `line` before the client has sent a byte has read the PROXY
    /// header as commands. `first`: the line is the first one of the server.
    ///
    /// - SMTP: replies 500 to 503 answer a command that is not understood (RFC 5321, section 4.2.2),
    ///   and 221 answers the `QUIT` in the signature of version 2. A server that rejects the client
    ///   greets it with 554 or 421 (section 3.1).
    /// - IMAP: `BAD` answers a command (RFC 9051, section 7.1.3). A server that rejects the client
    ///   greets it with `BYE`.
    /// - POP3: `-ERR` answers a command, and is the greeting of a server that rejects the client.
    /// - ManageSieve: `NO` answers a command (RFC 5804, section 1.2), `BYE` rejects the client.
    #[must_use]
    pub fn misreads_header(self, line: &[u8], first: bool) -> bool {
        let quotes = V1_COMMANDS.iter().any(|command| line.windows(command.len()).any(|at| at == *command));
        quotes
            || match self {
                Self::Smtp | Self::Submission | Self::Submissions => {
                    matches!(reply_code(line), Some((b"500" | b"501" | b"502" | b"503" | b"221", _)))
                }
                Self::Imap | Self::Imaps => word(line, 1).is_some_and(|word| word == b"BAD"),
                Self::Pop3 | Self::Pop3s => !first && line.starts_with(b"-ERR"),
                Self::Sieve => word(line, 0).is_some_and(|word| word == b"NO"),
                Self::Plain => false,
            }
    }

    /// Whether `line` is complete and ends a reply of the server, so that a line of the injector may
    /// follow. Other lines may be in the middle of a message, which the client would store with it.
    #[must_use]
    pub fn ends_reply(self, line: &[u8]) -> bool {
        line.ends_with(b"\r\n")
            && match self {
                Self::Smtp | Self::Submission => matches!(reply_code(line), Some((_, b' ' | b'\r'))),
                Self::Imap => imap_line_ends_reply(line),
                Self::Pop3 => line == b".\r\n" || line.starts_with(b"+OK") || line.starts_with(b"-ERR"),
                Self::Sieve => word(line, 0).is_some_and(|word| [&b"OK"[..], b"NO", b"BYE"].contains(&word)),
                Self::Submissions | Self::Imaps | Self::Pop3s | Self::Plain => false,
            }
    }
}

/// The code of an SMTP reply, and the character that follows: `-` in all lines but the last.
fn reply_code(line: &[u8]) -> Option<(&[u8], u8)> {
    let (code, rest) = line.split_at_checked(3)?;
    let next = *rest.first()?;
    (code.iter().all(u8::is_ascii_digit) && matches!(next, b' ' | b'-' | b'\r')).then_some((code, next))
}

/// A tagged status, the greeting, a request for more of a command, or what a server sends during
/// IDLE (RFC 9051, sections 6.3.13 and 7).
fn imap_line_ends_reply(line: &[u8]) -> bool {
    let (first, second, third) = (word(line, 0), word(line, 1), word(line, 2));
    let is = |word: Option<&[u8]>, any: &[&[u8]]| word.is_some_and(|word| any.contains(&word));
    match first {
        Some(b"+") => true,
        Some(b"*") => is(second, &[b"OK", b"PREAUTH"]) || is(third, &[b"EXISTS", b"RECENT", b"EXPUNGE"]),
        Some(_) => is(second, &[b"OK", b"NO", b"BAD"]),
        None => false,
    }
}

fn word(line: &[u8], number: usize) -> Option<&[u8]> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    line.split(|byte| *byte == b' ').nth(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Protocol::{Imap, Plain, Pop3, Sieve, Smtp, Submission};

    #[test]
    fn answers_to_the_header_are_distinguished_from_greetings_and_rejections() {
        for (protocol, line, first, misread) in [
            (Smtp, "220 mail ESMTP Postfix", true, false),
            (Smtp, "220-mail ESMTP", true, false),
            (Smtp, "554 5.7.1 no service for you", true, false),
            (Smtp, "521 5.7.1 blocked", false, false),
            (Smtp, "421 4.3.2 too busy", true, false),
            (Smtp, "450 4.7.1 try later", true, false),
            (Smtp, "500 5.5.2 Error: bad syntax", true, true),
            (Smtp, "500 5.5.2 Error: bad syntax", false, true),
            (Submission, "502 5.5.2 Error: command not recognized", false, true),
            (Smtp, "503 5.5.1 bad sequence", false, true),
            (Smtp, "221 2.0.0 Bye", false, true),
            (Smtp, "554 5.5.1 \"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\"?", true, true),
            (Smtp, "5000 is not a reply", true, false),
            (Imap, "* OK ready", true, false),
            (Imap, "* BYE too many connections", true, false),
            (Imap, "* BAD Error in IMAP command received by server.", false, true),
            (Imap, "QUIT BAD Error in IMAP command received by server.", false, true),
            (Imap, "* OK BAD weather", true, false),
            (Pop3, "+OK ready", true, false),
            (Pop3, "-ERR [SYS/TEMP] try later", true, false),
            (Pop3, "-ERR Unknown command.", false, true),
            (Pop3, "-ERR unknown command PROXY TCP4", true, true),
            (Sieve, "\"SIEVE\" \"fileinto\"", true, false),
            (Sieve, "OK ready", false, false),
            (Sieve, "BYE (TRYLATER) \"busy\"", true, false),
            (Sieve, "NO \"Error in MANAGESIEVE command received by server.\"", false, true),
            (Plain, "500 5.5.2 Error: bad syntax", true, false),
        ] {
            let line = format!("{line}\r\n");
            assert_eq!(
                protocol.misreads_header(line.as_bytes(), first),
                misread,
                "{protocol} {first} {line:?}"
            );
        }
    }

    #[test]
    fn a_line_may_follow_only_what_ends_a_reply() {
        for (protocol, line, ends) in [
            (Smtp, "220 mail\r\n", true),
            (Smtp, "250-PIPELINING\r\n", false),
            (Smtp, "250 8BITMIME\r\n", true),
            (Smtp, "250 8BITMIME", false),
            (Smtp, "hello\r\n", false),
            (Imap, "* OK [CAPABILITY IMAP4rev1] ready\r\n", true),
            (Imap, "* OK Still here\r\n", true),
            (Imap, "+ idling\r\n", true),
            (Imap, "* 23 EXISTS\r\n", true),
            (Imap, "* 12 FETCH (BODY[] {342}\r\n", false),
            (Imap, "Subject: a letter\r\n", false),
            (Imap, "a3 OK FETCH completed\r\n", true),
            (Pop3, "+OK 2 messages\r\n", true),
            (Pop3, "1 120\r\n", false),
            (Pop3, ".\r\n", true),
            (Sieve, "OK\r\n", true),
            (Sieve, "\"SIEVE\" \"fileinto\"\r\n", false),
            (Protocol::Imaps, "a3 OK FETCH completed\r\n", false),
            (Plain, "250 ok\r\n", false),
        ] {
            assert_eq!(protocol.ends_reply(line.as_bytes()), ends, "{protocol} {line:?}");
        }
    }

    #[test]
    fn the_injectors_own_lines_are_not_taken_for_answers_to_the_header() {
        for protocol in Protocol::ALL {
            for why in super::super::Rejection::ALL {
                let Some(line) = protocol.rejection_line(why) else { continue };
                assert!(!protocol.misreads_header(line, true), "{protocol} {why:?}");
            }
        }
    }
}
