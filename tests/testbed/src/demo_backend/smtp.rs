//! SMTP, only what receiving a message needs (RFC 5321): EHLO, HELO, MAIL, RCPT, DATA, RSET, NOOP,
//! VRFY, QUIT.

use std::io;

use super::wire::Wire;
use super::{Message, Shared};

/// Largest accepted message, in bytes; announced by `SIZE` (RFC 1870).
const LARGEST: usize = 64 * 1024 * 1024;

/// Speaks SMTP until the client quits or the connection breaks.
pub(super) async fn serve(wire: &mut Wire, shared: &Shared) -> io::Result<()> {
    let mut dialogue = Dialogue::default();
    wire.send(b"220 demo.backend ESMTP at your service\r\n").await?;
    while let Some(line) = wire.text().await? {
        let (reply, next) = dialogue.command(&line);
        wire.send(reply.as_bytes()).await?;
        match next {
            Next::Listen => {}
            Next::Close => break,
            Next::Data(message) => {
                let reply = take(wire, shared, message).await?;
                wire.send(reply.as_bytes()).await?;
            }
        }
    }
    Ok(())
}

/// Reads the message text and stores it in the mailbox; returns the reply to the client.
async fn take(wire: &mut Wire, shared: &Shared, mut message: Message) -> io::Result<&'static str> {
    let mut line = Vec::new();
    let mut fits = true;
    let mut at_line_start = true;
    loop {
        line.clear();
        if !wire.line(&mut line).await? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Only CRLF . CRLF ends a message: treating a lone LF as a line end permits SMTP smuggling.
        if at_line_start && line == b".\r\n" {
            break;
        }
        let text = if at_line_start { unstuffed(&line) } else { &line };
        fits = fits && message.content.len() + text.len() <= LARGEST;
        if fits {
            message.content.extend_from_slice(text);
        }
        at_line_start = line.ends_with(b"\r\n");
    }
    if !fits {
        return Ok("552 5.3.4 message too big\r\n");
    }
    shared.mailbox().push(message);
    Ok("250 2.0.0 taken\r\n")
}

/// Removes the dot that a client puts before a line that starts with one (RFC 5321 section 4.5.2).
fn unstuffed(line: &[u8]) -> &[u8] {
    line.strip_prefix(b".").unwrap_or(line)
}

/// What follows a reply.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Listen,
    /// The message text; its envelope is complete.
    Data(Message),
    Close,
}

/// The state of one SMTP session: the greeting, and the envelope so far.
#[derive(Debug, Default)]
struct Dialogue {
    greeted: bool,
    from: Option<String>,
    to: Vec<String>,
}

impl Dialogue {
    /// Handles one command line.
    fn command(&mut self, line: &str) -> (String, Next) {
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        let reply = match verb.to_ascii_uppercase().as_str() {
            "EHLO" => {
                self.greet();
                format!(
                    "250-demo.backend\r\n250-SIZE {LARGEST}\r\n250-8BITMIME\r\n250 ENHANCEDSTATUSCODES\r\n"
                )
            }
            "HELO" => {
                self.greet();
                "250 demo.backend\r\n".to_owned()
            }
            "MAIL" => self.mail(rest).to_owned(),
            "RCPT" => self.rcpt(rest).to_owned(),
            "DATA" => return self.data(),
            "RSET" => {
                self.reset();
                "250 2.0.0 forgotten\r\n".to_owned()
            }
            "NOOP" => "250 2.0.0 still here\r\n".to_owned(),
            "VRFY" => "252 2.5.0 send it and see\r\n".to_owned(),
            "QUIT" => return ("221 2.0.0 goodbye\r\n".to_owned(), Next::Close),
            _ => "502 5.5.1 command not known\r\n".to_owned(),
        };
        (reply, Next::Listen)
    }

    fn greet(&mut self) {
        self.reset();
        self.greeted = true;
    }

    fn reset(&mut self) {
        self.from = None;
        self.to.clear();
    }

    fn mail(&mut self, rest: &str) -> &'static str {
        match path(rest, "FROM:") {
            _ if !self.greeted => "503 5.5.1 send EHLO first\r\n",
            _ if self.from.is_some() => "503 5.5.1 a message is under way\r\n",
            None => "501 5.5.4 MAIL FROM:<address>\r\n",
            Some(address) => {
                self.from = Some(address.to_owned());
                "250 2.1.0 sender ok\r\n"
            }
        }
    }

    fn rcpt(&mut self, rest: &str) -> &'static str {
        match path(rest, "TO:") {
            _ if self.from.is_none() => "503 5.5.1 send MAIL first\r\n",
            None | Some("") => "501 5.5.4 RCPT TO:<address>\r\n",
            Some(address) => {
                self.to.push(address.to_owned());
                "250 2.1.5 recipient ok\r\n"
            }
        }
    }

    fn data(&mut self) -> (String, Next) {
        match self.from.take_if(|_| !self.to.is_empty()) {
            None => ("503 5.5.1 no recipients\r\n".to_owned(), Next::Listen),
            Some(from) => {
                let message = Message { from, to: std::mem::take(&mut self.to), content: Vec::new() };
                ("354 end with <CRLF>.<CRLF>\r\n".to_owned(), Next::Data(message))
            }
        }
    }
}

/// The address in `FROM:<a@b> SIZE=1` or `TO: <a@b>`; `None` if malformed.
fn path<'a>(rest: &'a str, keyword: &str) -> Option<&'a str> {
    let after = rest.get(keyword.len()..).filter(|_| rest[..keyword.len()].eq_ignore_ascii_case(keyword))?;
    let (address, _parameters) = after.trim_start().strip_prefix('<')?.split_once('>')?;
    Some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reply codes to a list of lines.
    fn codes(lines: &[&str]) -> Vec<String> {
        let mut dialogue = Dialogue::default();
        lines.iter().map(|line| dialogue.command(line).0[..3].to_owned()).collect()
    }

    #[test]
    fn commands_out_of_order_are_refused() {
        let cases: &[(&[&str], &[&str])] = &[
            (&["MAIL FROM:<a@b>"], &["503"]),
            (&["EHLO x", "RCPT TO:<a@b>"], &["250", "503"]),
            (&["EHLO x", "MAIL FROM:<>", "DATA"], &["250", "250", "503"]),
            (&["helo x", "mail from: <a@b> SIZE=9", "rcpt to:<c@d>", "data"], &["250", "250", "250", "354"]),
            (&["EHLO x", "MAIL FROM:<a@b>", "MAIL FROM:<a@b>"], &["250", "250", "503"]),
            (&["EHLO x", "MAIL FROM:<a@b>", "RSET", "RCPT TO:<a@b>"], &["250", "250", "250", "503"]),
            (&["EHLO x", "MAIL a@b", "MAIL FROM:a@b", "MAIL é"], &["250", "501", "501", "501"]),
            (&["", "PROXY TCP4 1.2.3.4", "QUIT"], &["502", "502", "221"]),
        ];
        for (lines, expected) in cases {
            assert_eq!(codes(lines), *expected, "{lines:?}");
        }
    }
}
