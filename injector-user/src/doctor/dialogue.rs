//! The dialogue that follows a header: what does the server allow the client in the header? Pure:
//! replies go in, actions come out; `exchange` carries them out.
//!
//! - SMTP: EHLO, `MAIL FROM:<>`, RCPT TO a foreign domain, RSET, QUIT. A server that accepts that
//!   recipient relays. DATA is never sent, so no message exists. Checks of the sender accept the
//!   null sender.
//! - IMAP, POP3 and ManageSieve in clear text: the capabilities, which show whether the server
//!   accepts passwords.

use std::net::IpAddr;

use super::{
    dialect::{Dialect, readable},
    observation::{Dialogue, Relay},
};
use crate::protocol::{FirstSpeaker, Protocol};

/// A domain that no mail server hosts (RFC 2606, section 3); its null MX (RFC 7505) accepts no
/// mail.
pub(super) const FOREIGN_RECIPIENT: &str = "relay-test@example.com";

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Send this line and read the reply.
    Send(String),
    /// Start TLS, then call [`Script::tls_started`].
    StartTls,
    /// Send QUIT or LOGOUT, and wait for the server to close.
    Quit,
}

/// The command whose reply is awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Ehlo,
    StartTls,
    Mail,
    Rcpt,
    Rset,
    Capability,
}

impl Command {
    const fn name(self) -> &'static str {
        match self {
            Self::Ehlo => "EHLO",
            Self::StartTls => "STARTTLS",
            Self::Mail => "MAIL FROM",
            Self::Rcpt => "RCPT TO",
            Self::Rset => "RSET",
            Self::Capability => "the capability command",
        }
    }
}

/// The state of a dialogue.
#[derive(Clone, Debug)]
pub(super) struct Script {
    dialect: Dialect,
    /// The client in the header, for EHLO.
    client: IpAddr,
    secured: bool,
    offers_starttls: bool,
    awaited: Command,
    understood: bool,
    result: Option<Dialogue>,
}

impl Script {
    /// The dialogue after this greeting, and its first action. `None` if the protocol has nothing
    /// to ask.
    pub(super) fn start(protocol: Protocol, client: IpAddr, greeting: &[u8]) -> Option<(Self, Action)> {
        let dialect = Dialect::of(protocol);
        let secured = protocol.speaks_first() == FirstSpeaker::Client;
        let script = |awaited| Self {
            dialect,
            client,
            secured,
            offers_starttls: false,
            awaited,
            understood: false,
            result: None,
        };
        match dialect {
            Dialect::Smtp => {
                let mut script = script(Command::Ehlo);
                let action = script.ehlo();
                Some((script, action))
            }
            // In TLS passwords are safe with any header.
            _ if secured => None,
            Dialect::Imap => Some((script(Command::Capability), Action::Send("c CAPABILITY\r\n".to_owned()))),
            Dialect::Pop3 => Some((script(Command::Capability), Action::Send("CAPA\r\n".to_owned()))),
            // The greeting lists the capabilities (RFC 5804, section 1.7).
            Dialect::Sieve => {
                let offered = String::from_utf8_lossy(greeting);
                let mechanisms =
                    offered.lines().find(|line| line.to_ascii_uppercase().starts_with("\"SASL\""));
                let result = Dialogue::ClearTextLogin(mechanisms.is_some_and(has_plain));
                Some((
                    Self { understood: true, result: Some(result), ..script(Command::Capability) },
                    Action::Quit,
                ))
            }
            Dialect::Unknown => None,
        }
    }

    /// The TLS handshake is done: the dialogue starts again (RFC 3207, section 4.2).
    pub(super) fn tls_started(&mut self) -> Action {
        self.secured = true;
        self.ehlo()
    }

    /// The server understood the first command, so it read no part of the header as a command.
    pub(super) const fn is_understood(&self) -> bool {
        self.understood
    }

    /// What came of it.
    pub(super) fn into_result(self) -> Option<Dialogue> {
        self.result
    }

    /// Ends the dialogue early, for this reason.
    pub(super) fn abort(&mut self, why: &str) {
        if self.dialect == Dialect::Smtp && self.result.is_none() {
            self.unknown(format!("{why} after {}", self.awaited.name()));
        }
    }

    /// The first complete reply in `received`, and its length in bytes.
    pub(super) fn parse(&self, heard: &[u8]) -> Option<(Reply, usize)> {
        let mut reply = Reply::default();
        let mut len = 0;
        for line in heard.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n")) {
            len += line.len();
            reply.lines.push(readable(line));
            if self.is_last(&reply) {
                return Some((reply, len));
            }
        }
        None
    }

    fn is_last(&self, reply: &Reply) -> bool {
        let line = reply.last();
        match self.dialect {
            Dialect::Smtp => line.as_bytes().get(3) != Some(&b'-'),
            Dialect::Imap => line.starts_with("c ") || line.starts_with("* BYE"),
            Dialect::Pop3 => line == "." || line.starts_with("-ERR"),
            Dialect::Sieve | Dialect::Unknown => true,
        }
    }

    /// The next action after a reply.
    pub(super) fn next(&mut self, reply: &Reply) -> Action {
        match self.dialect {
            Dialect::Smtp => self.smtp(reply),
            _ => self.capabilities(reply),
        }
    }

    fn smtp(&mut self, reply: &Reply) -> Action {
        let accepted = reply.code() / 100 == 2;
        let demands_tls = reply.code() == 530 && self.offers_starttls && !self.secured;
        match self.awaited {
            Command::Ehlo if accepted => {
                self.understood = true;
                self.offers_starttls = reply.lines.iter().any(|line| {
                    line.get(4..).is_some_and(|keyword| keyword.eq_ignore_ascii_case("STARTTLS"))
                });
                self.send(Command::Mail, "MAIL FROM:<>\r\n")
            }
            Command::StartTls if accepted => Action::StartTls,
            Command::Mail if accepted => {
                self.send(Command::Rcpt, &format!("RCPT TO:<{FOREIGN_RECIPIENT}>\r\n"))
            }
            Command::Mail if demands_tls => self.send(Command::StartTls, "STARTTLS\r\n"),
            Command::Rcpt => {
                let said = reply.last().to_owned();
                let answer = if accepted { Relay::Accepted(said) } else { relay_from_refusal(reply) };
                self.result = Some(Dialogue::Relay(answer));
                if reply.code() == 421 { Action::Quit } else { self.send(Command::Rset, "RSET\r\n") }
            }
            Command::Mail if is_about_access(reply) => {
                self.result = Some(Dialogue::Relay(Relay::Refused(reply.last().to_owned())));
                Action::Quit
            }
            Command::Rset => Action::Quit,
            Command::Ehlo | Command::StartTls | Command::Mail | Command::Capability => {
                self.unknown(format!("{:?} to {}", reply.last(), self.awaited.name()));
                Action::Quit
            }
        }
    }

    fn capabilities(&mut self, reply: &Reply) -> Action {
        let login = match self.dialect {
            // RFC 9051, section 6.2.3.
            Dialect::Imap => reply.last().starts_with("c OK").then(|| {
                let words = reply.lines.iter().flat_map(|line| line.split_ascii_whitespace());
                !words.into_iter().any(|word| word.eq_ignore_ascii_case("LOGINDISABLED"))
            }),
            // RFC 2449, section 6: USER, or SASL with PLAIN.
            Dialect::Pop3 => (reply.last() == ".").then(|| {
                let sasl = |line: &str| line.to_ascii_uppercase().starts_with("SASL ") && has_plain(line);
                reply.lines.iter().any(|line| line.eq_ignore_ascii_case("USER") || sasl(line))
            }),
            _ => None,
        };
        self.understood = login.is_some();
        self.result = login.map(Dialogue::ClearTextLogin);
        Action::Quit
    }

    fn ehlo(&mut self) -> Action {
        // An address literal (RFC 5321, section 4.1.3) causes no DNS query.
        let literal = match self.client {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("IPv6:{ip}"),
        };
        self.send(Command::Ehlo, &format!("EHLO [{literal}]\r\n"))
    }

    fn send(&mut self, command: Command, line: &str) -> Action {
        self.awaited = command;
        Action::Send(line.to_owned())
    }

    fn unknown(&mut self, why: String) {
        self.result = Some(Dialogue::Relay(Relay::Unknown(why)));
    }
}

/// The lines of a reply, for display.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Reply {
    lines: Vec<String>,
}

impl Reply {
    fn last(&self) -> &str {
        self.lines.last().map_or("", String::as_str)
    }

    /// 0 where it has none.
    fn code(&self) -> u16 {
        self.last().get(..3).and_then(|code| code.parse().ok()).unwrap_or_default()
    }

    /// The subject of the enhanced status, such as 7 of `5.7.1` (RFC 3463, section 3).
    fn status_subject(&self) -> Option<u8> {
        let mut parts = self.last().get(4..)?.split(' ').next()?.split('.');
        let class = parts.next()?;
        (["2", "4", "5"].contains(&class)).then(|| parts.next()?.parse().ok())?
    }
}

/// What a negative reply to RCPT means for relaying. Postfix defers what it does not relay by
/// default: `454 4.7.1 <…>: Relay access denied`. Other temporary failures, such as greylisting,
/// prove nothing. Neither do errors about syntax, nor about the recipient's domain: servers check
/// it after the right to relay.
fn relay_from_refusal(reply: &Reply) -> Relay {
    let said = reply.last().to_owned();
    let address_or_protocol = matches!(reply.status_subject(), Some(1 | 4 | 5));
    let permanent = (510..600).contains(&reply.code()) && !address_or_protocol;
    if permanent || mentions_relaying(&said) {
        Relay::Refused(said)
    } else {
        Relay::Unknown(format!("{said:?}"))
    }
}

/// Permanent, and about who the client is.
fn is_about_access(reply: &Reply) -> bool {
    let permanent = (510..600).contains(&reply.code());
    permanent && (reply.code() == 530 || reply.status_subject() == Some(7)) || mentions_relaying(reply.last())
}

fn mentions_relaying(said: &str) -> bool {
    let said = said.to_ascii_lowercase();
    said.contains("relay") && ["denied", "not ", "unable"].iter().any(|word| said.contains(word))
}

fn has_plain(line: &str) -> bool {
    let mut words = line.split(|c: char| c.is_ascii_whitespace() || c == '"');
    words.any(|word| word.eq_ignore_ascii_case("PLAIN"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCALHOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    /// Plays the replies in order, and returns the lines sent and the result.
    fn play(protocol: Protocol, greeting: &str, replies: &[&str]) -> (Vec<String>, Option<Dialogue>) {
        let (mut script, mut action) = Script::start(protocol, LOCALHOST, greeting.as_bytes()).unwrap();
        let (mut sent, mut replies) = (Vec::new(), replies.iter());
        loop {
            action = match action {
                Action::Send(line) => {
                    sent.push(line.trim_end().to_owned());
                    let Some(text) = replies.next() else {
                        script.abort("the server closed the connection");
                        break;
                    };
                    let (reply, len) = script.parse(text.as_bytes()).expect(text);
                    assert_eq!(len, text.len(), "{text:?}");
                    script.next(&reply)
                }
                Action::StartTls => {
                    sent.push("TLS".to_owned());
                    script.tls_started()
                }
                Action::Quit => break,
            };
        }
        assert_eq!(replies.next(), None);
        (sent, script.into_result())
    }

    fn relay(result: Option<Dialogue>) -> Relay {
        match result {
            Some(Dialogue::Relay(relay)) => relay,
            other => panic!("{other:?}"),
        }
    }

    const EHLO: &str = "250-mail.example.test\r\n250-STARTTLS\r\n250 CHUNKING\r\n";

    #[test]
    fn a_foreign_recipient_is_named_and_data_is_not_sent() {
        let replies = [EHLO, "250 2.1.0 Ok\r\n", "250 2.1.5 Ok\r\n", "250 2.0.0 Ok\r\n"];
        let (sent, result) = play(Protocol::Smtp, "220 mail\r\n", &replies);
        assert_eq!(sent, ["EHLO [127.0.0.1]", "MAIL FROM:<>", "RCPT TO:<relay-test@example.com>", "RSET"]);
        assert_eq!(relay(result), Relay::Accepted("250 2.1.5 Ok".to_owned()));
    }

    #[test]
    fn starttls_is_used_if_required() {
        let demand = "530 5.7.0 Must issue a STARTTLS command first\r\n";
        let denied = "554 5.7.1 <relay-test@example.com>: Recipient address rejected: Access denied\r\n";
        let go = "220 2.0.0 Ready to start TLS\r\n";
        let ok = "250 2.1.0 Ok\r\n";
        let (sent, result) =
            play(Protocol::Submission, "220 mail\r\n", &[EHLO, demand, go, "250 mail\r\n", ok, denied, ok]);
        assert_eq!(sent[1..5], ["MAIL FROM:<>", "STARTTLS", "TLS", "EHLO [127.0.0.1]"]);
        assert_eq!(relay(result), Relay::Refused(denied.trim_end().to_owned()));
        // STARTTLS is not offered, or required again: the server wants a login.
        let (_, result) = play(Protocol::Submission, "220 mail\r\n", &["250 mail\r\n", demand]);
        assert!(matches!(relay(result), Relay::Refused(_)));
        let (_, result) = play(Protocol::Submission, "220 mail\r\n", &[EHLO, demand, go, EHLO, demand]);
        assert!(matches!(relay(result), Relay::Refused(_)));
    }

    #[test]
    fn the_reply_to_the_recipient_decides() {
        type Is = fn(&Relay) -> bool;
        let refused: Is = |relay| matches!(relay, Relay::Refused(_));
        let unknown: Is = |relay| matches!(relay, Relay::Unknown(_));
        let accepted: Is = |relay| matches!(relay, Relay::Accepted(_));
        for (said, expected) in [
            ("250 2.1.5 Ok\r\n", accepted),
            ("251 User not local; will forward\r\n", accepted),
            ("454 4.7.1 <relay-test@example.com>: Relay access denied\r\n", refused),
            ("554 5.7.1 <relay-test@example.com>: Relay access denied\r\n", refused),
            ("550 relay not permitted\r\n", refused),
            ("550-Please log in.\r\n550 5.7.1 Relaying denied\r\n", refused),
            ("550 5.1.2 Relay not allowed.\r\n", refused),
            ("530 5.7.0 Authentication required\r\n", refused),
            ("451 4.7.1 Greylisted, come back later\r\n", unknown),
            ("450 4.3.2 Service currently unavailable\r\n", unknown),
            (
                "556 5.1.10 <relay-test@example.com>: Recipient address rejected: Domain has null MX\r\n",
                unknown,
            ),
            ("503 5.5.1 Error: need MAIL command\r\n", unknown),
            ("421 4.3.2 Shutting down\r\n", unknown),
            ("what?\r\n", unknown),
        ] {
            let closes = said.starts_with("421");
            let replies = [EHLO, "250 2.1.0 Ok\r\n", said, "250 2.0.0 Ok\r\n"];
            let replies = if closes { &replies[..3] } else { &replies[..] };
            let (_, result) = play(Protocol::Smtp, "220 mail\r\n", replies);
            let relay = relay(result);
            assert!(expected(&relay), "{said:?}: {relay:?}");
        }
    }

    #[test]
    fn an_aborted_dialogue_names_the_command() {
        let why = |replies: &[&str]| match relay(play(Protocol::Smtp, "220 mail\r\n", replies).1) {
            Relay::Unknown(why) => why,
            other => panic!("{other:?}"),
        };
        assert_eq!(why(&[]), "the server closed the connection after EHLO");
        assert_eq!(why(&[EHLO, "250 2.1.0 Ok\r\n"]), "the server closed the connection after RCPT TO");
        assert_eq!(why(&["502 5.5.2 Error\r\n"]), "\"502 5.5.2 Error\" to EHLO");
        assert_eq!(why(&[EHLO, "450 4.7.1 later\r\n"]), "\"450 4.7.1 later\" to MAIL FROM");
        assert_eq!(why(&[EHLO, "550 5.1.8 no\r\n"]), "\"550 5.1.8 no\" to MAIL FROM");
        // An earlier result stays.
        let replies = [EHLO, "250 2.1.0 Ok\r\n", "250 2.1.5 Ok\r\n"];
        let (_, result) = play(Protocol::Smtp, "220 mail\r\n", &replies);
        assert!(matches!(relay(result), Relay::Accepted(_)));
    }

    #[test]
    fn a_reply_is_complete_with_its_last_line() {
        let (script, _) = Script::start(Protocol::Smtp, LOCALHOST, b"").unwrap();
        for part in ["", "250", "250-mail\r\n", "250-mail\r\n250 CHUNK"] {
            assert_eq!(script.parse(part.as_bytes()), None, "{part:?}");
        }
        let (reply, len) = script.parse(b"250-mail\r\n250 A\r\n250 B\r\n").unwrap();
        assert_eq!((reply.lines.len(), len), (2, 17));
    }

    #[test]
    fn capabilities_show_whether_clear_text_passwords_are_accepted() {
        let login = |protocol, greeting, replies: &[&str]| play(protocol, greeting, replies).1;
        let imap = |words| format!("* CAPABILITY IMAP4rev1 {words}\r\nc OK done.\r\n");
        let yes = Some(Dialogue::ClearTextLogin(true));
        let no = Some(Dialogue::ClearTextLogin(false));
        assert_eq!(login(Protocol::Imap, "* OK\r\n", &[&imap("STARTTLS LOGINDISABLED")]), no);
        assert_eq!(login(Protocol::Imap, "* OK\r\n", &[&imap("STARTTLS AUTH=PLAIN")]), yes);
        assert_eq!(login(Protocol::Imap, "* OK\r\n", &["* BYE\r\n"]), None);
        assert_eq!(login(Protocol::Imap, "* OK\r\n", &[]), None);
        assert_eq!(login(Protocol::Pop3, "+OK\r\n", &["+OK\r\nTOP\r\nSASL\r\n.\r\n"]), no);
        assert_eq!(login(Protocol::Pop3, "+OK\r\n", &["+OK\r\nUSER\r\nSASL PLAIN\r\n.\r\n"]), yes);
        assert_eq!(login(Protocol::Pop3, "+OK\r\n", &["-ERR what?\r\n"]), None);
        assert_eq!(login(Protocol::Sieve, "\"SASL\" \"\"\r\nOK\r\n", &[]), no);
        assert_eq!(login(Protocol::Sieve, "\"SASL\" \"PLAIN LOGIN\"\r\nOK\r\n", &[]), yes);
        for protocol in [Protocol::Imaps, Protocol::Pop3s, Protocol::Plain] {
            assert!(Script::start(protocol, LOCALHOST, b"").is_none(), "{protocol}");
        }
    }
}
