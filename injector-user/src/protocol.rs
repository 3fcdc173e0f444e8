//! Facts about each mail protocol: which side speaks first, how to reject a client in the protocol,
//! and how long a healthy connection may be idle.
//!
//! This is a pure table. The injector never parses the protocols.

mod replies;

use std::{fmt, time::Duration};

/// The protocol of a listener (`protocol = "…"`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Mail between servers, clear text or STARTTLS (RFC 5321), port 25.
    Smtp,
    /// Mail from users, clear text or STARTTLS (RFC 6409), port 587.
    Submission,
    /// Mail from users over implicit TLS (RFC 8314), port 465.
    Submissions,
    /// Mailbox access, clear text or STARTTLS (RFC 9051), port 143.
    Imap,
    /// Mailbox access over implicit TLS (RFC 8314), port 993.
    Imaps,
    /// Mailbox download, clear text or STLS (RFC 1939), port 110.
    Pop3,
    /// Mailbox download over implicit TLS (RFC 8314), port 995.
    Pop3s,
    /// ManageSieve, clear text or STARTTLS (RFC 5804), port 4190.
    Sieve,
    /// Any other protocol over TCP.
    Plain,
}

/// Which side sends the first byte of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstSpeaker {
    /// The client: a TLS ClientHello.
    Client,
    /// The server: a banner.
    Server,
    /// Either side: the header waits for the client only briefly.
    Unknown,
}

/// Why a client is rejected before its backend has spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// The limit on connections, or on file descriptors, is reached.
    TooManyConnections,
    /// No backend could be reached.
    BackendUnavailable,
    /// The injector is shutting down.
    Stopping,
    /// The operator has ended the session.
    EndedByOperator,
    /// The client's network has as many connections open as one may.
    SourceConnections,
    /// The client's network opens connections too fast.
    SourceRate,
    /// Translation on the way here has replaced the client's address.
    TranslatedSource,
}

impl Rejection {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::TooManyConnections,
        Self::BackendUnavailable,
        Self::Stopping,
        Self::EndedByOperator,
        Self::SourceConnections,
        Self::SourceRate,
        Self::TranslatedSource,
    ];
}

/// The timeouts of a listener that sets none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DefaultTimeouts {
    /// For all attempts to connect to a backend together.
    pub connect: Duration,
    /// Idle time in both directions.
    pub idle: Duration,
    /// How long the header waits to be sent with the client's first bytes. Zero where the server
    /// speaks first.
    pub header_wait: Duration,
    /// Idle time of the open direction after one side has sent its FIN.
    pub half_closed: Duration,
    /// How long a client may stay after its backend has finished and every byte was delivered.
    pub client_fin: Duration,
    /// Time for a peer to acknowledge data.
    pub user_timeout: Duration,
    /// Idle time before the first keepalive probe.
    pub keepalive: Duration,
    /// How long sessions may continue once the listener is drained.
    pub drain: Duration,
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const fn minutes(minutes: u64) -> Duration {
    Duration::from_secs(minutes * 60)
}

impl Protocol {
    /// Every protocol, in the order of lists in messages.
    pub const ALL: [Self; 9] = [
        Self::Smtp,
        Self::Submission,
        Self::Submissions,
        Self::Imap,
        Self::Imaps,
        Self::Pop3,
        Self::Pop3s,
        Self::Sieve,
        Self::Plain,
    ];

    /// Names that others use: service names of IANA and their former ones, and those of mail servers
    /// and clients. The configuration does not take them, and suggests the protocol.
    pub const OTHER_NAMES: [(&'static str, Self); 16] = [
        ("esmtp", Self::Smtp),
        ("msa", Self::Submission),
        ("smtp-submission", Self::Submission),
        // The registry's name of port 465 until RFC 8314, section 7.3.
        ("smtps", Self::Submissions),
        ("ssmtp", Self::Submissions),
        ("urd", Self::Submissions),
        ("imap2", Self::Imap),
        ("imap4", Self::Imap),
        ("imap4s", Self::Imaps),
        ("simap", Self::Imaps),
        ("pop", Self::Pop3),
        ("pop-3", Self::Pop3),
        ("pops", Self::Pop3s),
        ("spop3", Self::Pop3s),
        ("managesieve", Self::Sieve),
        ("tcp", Self::Plain),
    ];

    /// The name in the configuration, in logs and in labels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Smtp => "smtp",
            Self::Submission => "submission",
            Self::Submissions => "submissions",
            Self::Imap => "imap",
            Self::Imaps => "imaps",
            Self::Pop3 => "pop3",
            Self::Pop3s => "pop3s",
            Self::Sieve => "sieve",
            Self::Plain => "plain",
        }
    }

    /// Which side sends the first byte: with implicit TLS the client (RFC 8446, section 2),
    /// otherwise the server with its banner (RFC 5321 section 3.1, RFC 9051 section 2.2, RFC 1939
    /// section 4, RFC 5804 section 1.1).
    pub const fn speaks_first(self) -> FirstSpeaker {
        match self {
            Self::Submissions | Self::Imaps | Self::Pop3s => FirstSpeaker::Client,
            Self::Smtp | Self::Submission | Self::Imap | Self::Pop3 | Self::Sieve => FirstSpeaker::Server,
            Self::Plain => FirstSpeaker::Unknown,
        }
    }

    /// The line to send instead of the banner before closing. `None` where the client understands
    /// only a reset: inside TLS, and in an unknown protocol.
    ///
    /// - SMTP: reply 421 may be given at any time by a service that must close (RFC 5321, sections
    ///   3.8 and 4.2.3), with status 4.3.2, system not accepting network messages (RFC 3463,
    ///   section 3.4); 4.7.0, of security or policy, for what only this source may not (section 3.8);
    ///   4.3.5, system incorrectly configured (section 3.4), where the network lost the client's address.
    ///   Senders queue and retry.
    /// - IMAP: `BYE` in place of the greeting refuses the connection (RFC 3501 and RFC 9051,
    ///   section 7.1.5); `UNAVAILABLE`: a subsystem is down for now (RFC 5530, section 3; RFC 9051,
    ///   section 7.1).
    /// - POP3: `-ERR` (RFC 1939, section 3) with `SYS/TEMP`: not the user's fault and likely to
    ///   pass (RFC 3206, section 4).
    /// - ManageSieve: `BYE` is allowed at any time (RFC 5804, section 1.2), `TRYLATER` (section
    ///   1.3).
    pub const fn rejection_line(self, why: Rejection) -> Option<&'static [u8]> {
        use Rejection::{
            BackendUnavailable, EndedByOperator, SourceConnections, SourceRate, Stopping, TooManyConnections,
            TranslatedSource,
        };
        let line: &'static str = match (self, why) {
            (Self::Smtp | Self::Submission, TooManyConnections) => {
                "421 4.3.2 Too many connections, try again later\r\n"
            }
            (Self::Smtp | Self::Submission, BackendUnavailable) => {
                "421 4.3.2 Mail service not available, try again later\r\n"
            }
            (Self::Smtp | Self::Submission, Stopping) => {
                "421 4.3.2 Service shutting down, try again later\r\n"
            }
            (Self::Smtp | Self::Submission, EndedByOperator) => {
                "421 4.3.2 Connection closed by the administrator, try again later\r\n"
            }
            (Self::Imap, EndedByOperator) => "* BYE Connection closed by the administrator\r\n",
            (Self::Pop3, EndedByOperator) => {
                "-ERR [SYS/TEMP] Connection closed by the administrator, try again later\r\n"
            }
            (Self::Sieve, EndedByOperator) => {
                "BYE (TRYLATER) \"Connection closed by the administrator, try again later\"\r\n"
            }
            (Self::Imap, TooManyConnections) => "* BYE Too many connections, try again later\r\n",
            (Self::Imap, BackendUnavailable) => {
                "* BYE [UNAVAILABLE] Mail service not available, try again later\r\n"
            }
            (Self::Imap, Stopping) => "* BYE Service shutting down, try again later\r\n",
            (Self::Pop3, TooManyConnections) => "-ERR [SYS/TEMP] Too many connections, try again later\r\n",
            (Self::Pop3, BackendUnavailable) => {
                "-ERR [SYS/TEMP] Mail service not available, try again later\r\n"
            }
            (Self::Pop3, Stopping) => "-ERR [SYS/TEMP] Service shutting down, try again later\r\n",
            (Self::Sieve, TooManyConnections) => {
                "BYE (TRYLATER) \"Too many connections, try again later\"\r\n"
            }
            (Self::Sieve, BackendUnavailable) => {
                "BYE (TRYLATER) \"Mail service not available, try again later\"\r\n"
            }
            (Self::Sieve, Stopping) => "BYE (TRYLATER) \"Service shutting down, try again later\"\r\n",
            (Self::Smtp | Self::Submission, SourceConnections) => {
                "421 4.7.0 Too many connections from your network, try again later\r\n"
            }
            (Self::Smtp | Self::Submission, SourceRate) => {
                "421 4.7.0 Too many new connections from your network, try again later\r\n"
            }
            (Self::Imap, SourceConnections) => {
                "* BYE Too many connections from your network, try again later\r\n"
            }
            (Self::Imap, SourceRate) => {
                "* BYE Too many new connections from your network, try again later\r\n"
            }
            (Self::Pop3, SourceConnections) => {
                "-ERR [SYS/TEMP] Too many connections from your network, try again later\r\n"
            }
            (Self::Pop3, SourceRate) => {
                "-ERR [SYS/TEMP] Too many new connections from your network, try again later\r\n"
            }
            (Self::Sieve, SourceConnections) => {
                "BYE (TRYLATER) \"Too many connections from your network, try again later\"\r\n"
            }
            (Self::Sieve, SourceRate) => {
                "BYE (TRYLATER) \"Too many new connections from your network, try again later\"\r\n"
            }
            (Self::Smtp | Self::Submission, TranslatedSource) => {
                "421 4.3.5 Your address was lost on the way here, try again later\r\n"
            }
            (Self::Imap, TranslatedSource) => {
                "* BYE [UNAVAILABLE] Your address was lost on the way here, try again later\r\n"
            }
            (Self::Pop3, TranslatedSource) => {
                "-ERR [SYS/TEMP] Your address was lost on the way here, try again later\r\n"
            }
            (Self::Sieve, TranslatedSource) => {
                "BYE (TRYLATER) \"Your address was lost on the way here, try again later\"\r\n"
            }
            (Self::Submissions | Self::Imaps | Self::Pop3s | Self::Plain, _) => return None,
        };
        Some(line.as_bytes())
    }

    /// The command that ends a session, without TLS. `None` in an unknown protocol. See RFC 5321
    /// section 4.1.1.10, RFC 9051 section 6.1.3 (with the tag `a`), RFC 1939 section 5, RFC 5804
    /// section 2.3.
    pub const fn quit_command(self) -> Option<&'static [u8]> {
        match self {
            Self::Smtp | Self::Submission | Self::Submissions | Self::Pop3 | Self::Pop3s => Some(b"QUIT\r\n"),
            Self::Imap | Self::Imaps => Some(b"a LOGOUT\r\n"),
            Self::Sieve => Some(b"LOGOUT\r\n"),
            Self::Plain => None,
        }
    }

    /// Whether a client ends its session with this line, in clear text: [`Self::quit_command`] in any case, and with any tag.
    pub fn is_quit(self, line: &[u8]) -> bool {
        let words = |line: &'_ [u8]| -> (usize, Vec<u8>) {
            let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
            let last = words.next_back().unwrap_or_default().to_ascii_uppercase();
            (words.count(), last)
        };
        self.quit_command().is_some_and(|quit| words(line) == words(quit))
    }

    /// A command that does nothing, which a server that serves the client accepts at any time.
    /// `None` where no receiver is known to greet a client that it then refuses to serve. RFC 5321,
    /// section 4.1.1.9; also before STARTTLS where that is required (RFC 3207, section 4).
    pub const fn noop_command(self) -> Option<&'static [u8]> {
        match self {
            Self::Smtp | Self::Submission | Self::Submissions => Some(b"NOOP\r\n"),
            _ => None,
        }
    }

    /// The timeouts for a listener that sets none.
    ///
    /// Idle is longer than any pause that the protocol allows, so that the server's own limit comes
    /// first:
    ///
    /// - SMTP: a client waits up to 10 minutes for the answer to the end of the data (RFC 5321,
    ///   section 4.5.3.2.6).
    /// - IMAP: a server must allow at least 30 minutes (RFC 9051, section 5.4), and IDLE is renewed
    ///   every 29 (RFC 2177, section 3).
    /// - POP3: at least 10 minutes (RFC 1939, section 3).
    /// - ManageSieve: at least 30 minutes (RFC 5804, section 1.2).
    ///
    /// A peer may keep its window closed while it processes data. Senders of mail wait 3 minutes
    /// for each block (RFC 5321, section 4.5.3.2.5), so the injector gives up after that.
    pub const fn timeouts(self) -> DefaultTimeouts {
        DefaultTimeouts {
            connect: seconds(5),
            idle: match self {
                Self::Smtp | Self::Submission | Self::Submissions | Self::Pop3 | Self::Pop3s => minutes(11),
                Self::Imap | Self::Imaps | Self::Sieve => minutes(35),
                Self::Plain => minutes(60),
            },
            header_wait: match self.speaks_first() {
                FirstSpeaker::Client => seconds(1),
                // Every connection in which the server speaks first waits this long once.
                FirstSpeaker::Unknown => Duration::from_millis(100),
                FirstSpeaker::Server => Duration::ZERO,
            },
            half_closed: match self {
                // A client may pipeline its message and QUIT, send its FIN, and still wait for the
                // reply to the data.
                Self::Smtp | Self::Submission | Self::Submissions => minutes(11),
                Self::Imap | Self::Imaps | Self::Pop3 | Self::Pop3s | Self::Sieve => minutes(1),
                Self::Plain => minutes(5),
            },
            client_fin: match self {
                // A server of these finishes by closing: it reads nothing more.
                Self::Smtp
                | Self::Submission
                | Self::Submissions
                | Self::Imap
                | Self::Imaps
                | Self::Pop3
                | Self::Pop3s
                | Self::Sieve => seconds(15),
                Self::Plain => minutes(5),
            },
            user_timeout: minutes(5),
            keepalive: minutes(1),
            drain: match self {
                // Long enough for a message and its reply on all but the slowest links. The sender
                // of an aborted message still has it in its queue.
                Self::Smtp | Self::Submission | Self::Submissions | Self::Pop3 | Self::Pop3s => minutes(2),
                // IDLE is renewed every 29 minutes (RFC 2177, section 3): most clients reconnect
                // before that, and the others reconnect at once.
                Self::Imap | Self::Imaps | Self::Sieve => minutes(30),
                Self::Plain => minutes(5),
            },
        }
    }

    /// The port that the documentation gives to the listener that requires a header.
    pub const fn alternative_port(self) -> Option<u16> {
        match self {
            Self::Smtp => Some(2525),
            Self::Submission => Some(5587),
            Self::Submissions => Some(4465),
            Self::Imap => Some(10143),
            Self::Imaps => Some(10993),
            Self::Pop3 => Some(10110),
            Self::Pop3s => Some(10995),
            Self::Sieve => Some(14190),
            Self::Plain => None,
        }
    }

    /// The standard port, used only in messages and by the doctor (RFC 5321, 6409, 8314, 9051, 1939,
    /// 5804).
    pub const fn standard_port(self) -> Option<u16> {
        match self {
            Self::Smtp => Some(25),
            Self::Submission => Some(587),
            Self::Submissions => Some(465),
            Self::Imap => Some(143),
            Self::Imaps => Some(993),
            Self::Pop3 => Some(110),
            Self::Pop3s => Some(995),
            Self::Sieve => Some(4190),
            Self::Plain => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_has_a_refusal_line_exactly_if_its_server_speaks_first() {
        for protocol in Protocol::ALL {
            for why in Rejection::ALL {
                assert_eq!(
                    protocol.rejection_line(why).is_some(),
                    protocol.speaks_first() == FirstSpeaker::Server,
                    "{protocol} {why:?}"
                );
            }
        }
    }

    #[test]
    fn refusals_are_one_line_of_the_protocol() {
        // RFC 5321 section 4.5.3.1.5 and RFC 2449 section 4 limit a line to 512 bytes with CRLF.
        let start = |protocol, why| match protocol {
            Protocol::Smtp | Protocol::Submission => match why {
                Rejection::SourceConnections | Rejection::SourceRate => "421 4.7.0 ",
                Rejection::TranslatedSource => "421 4.3.5 ",
                _ => "421 4.3.2 ",
            },
            Protocol::Imap => "* BYE ",
            Protocol::Pop3 => "-ERR [SYS/TEMP] ",
            Protocol::Sieve => "BYE (TRYLATER) \"",
            other => panic!("{other} has no rejection line"),
        };
        for protocol in Protocol::ALL {
            for why in Rejection::ALL {
                let Some(line) = protocol.rejection_line(why) else { continue };
                let line = std::str::from_utf8(line).unwrap();
                assert!(line.is_ascii() && line.len() <= 512, "{line:?}");
                assert!(line.starts_with(start(protocol, why)), "{line:?}");
                assert_eq!(line.find("\r\n"), Some(line.len() - 2), "{line:?}");
                let quotes = if protocol == Protocol::Sieve { 2 } else { 0 };
                assert_eq!(line.matches('"').count(), quotes, "{line:?}");
            }
        }
    }

    #[test]
    fn the_idle_timeout_exceeds_the_pauses_that_the_protocol_allows() {
        let least = |protocol| match protocol {
            Protocol::Smtp | Protocol::Submission | Protocol::Submissions => minutes(10),
            Protocol::Imap | Protocol::Imaps | Protocol::Sieve => minutes(30),
            Protocol::Pop3 | Protocol::Pop3s => minutes(10),
            Protocol::Plain => minutes(30),
        };
        for protocol in Protocol::ALL {
            assert!(protocol.timeouts().idle > least(protocol), "{protocol}");
        }
    }

    #[test]
    fn the_header_waits_only_where_a_client_may_speak_first() {
        for protocol in Protocol::ALL {
            let waits = !protocol.timeouts().header_wait.is_zero();
            assert_eq!(waits, protocol.speaks_first() != FirstSpeaker::Server, "{protocol}");
        }
    }

    #[test]
    fn names_are_distinct() {
        let names: std::collections::BTreeSet<_> = Protocol::ALL.map(Protocol::name).into_iter().collect();
        assert_eq!(names.len(), Protocol::ALL.len());
        for (other, protocol) in Protocol::OTHER_NAMES {
            assert!(
                !names.contains(other),
                "{other} is the name of a protocol, not another one of {protocol}"
            );
        }
    }
}
