//! Messages that are compared byte for byte after a round trip through SMTP, a mailbox and IMAP.

use anyhow::{Context, ensure};

/// The domain for which the mail host delivers.
pub const DOMAIN: &str = "example.test";

/// The first header of every message: servers add theirs before it, and nothing after it.
const FIRST_HEADER: &str = "X-Injector-Test";

/// Longest line without its CRLF (RFC 5321, section 4.5.3.1.6).
const LONGEST_LINE: usize = 998;

/// A message as the client sends it: CRLF line ends, without dot-stuffing.
#[derive(Clone, Debug)]
pub struct Message {
    id: String,
    /// Header and body.
    pub bytes: Vec<u8>,
}

impl Message {
    /// A message of half a megabyte to `user` in [`DOMAIN`], different from any with another id.
    ///
    /// The body has a line of every length from 0 to 998, lines that need dot-stuffing or look like
    /// the end of the message, and every byte that 8BITMIME permits (RFC 6152), so that a lost,
    /// duplicated or moved byte is detected.
    #[must_use]
    pub fn new(id: &str, user: &str) -> Self {
        let mut bytes = Self::begin(id, user, "8bit");
        for line in ["", ".", "..", "...", ". ", ".\t.", "From me", "QUIT", "* BYE", ")"] {
            bytes.extend_from_slice(line.as_bytes());
            bytes.extend_from_slice(b"\r\n");
        }
        for length in 0..=LONGEST_LINE {
            // Every seventh line starts with a dot.
            let text = if length % 7 == 1 { &b"."[..] } else { b"" };
            bytes.extend_from_slice(text);
            bytes.extend(permitted_bytes(length).take(length - text.len()));
            bytes.extend_from_slice(b"\r\n");
        }
        Self { id: id.to_owned(), bytes }
    }

    /// A message of a few lines in US-ASCII, for servers that do not support 8BITMIME.
    #[must_use]
    pub fn short(id: &str, user: &str) -> Self {
        Self { id: id.to_owned(), bytes: Self::begin(id, user, "7bit") }
    }

    /// The header, and a line.
    fn begin(id: &str, user: &str, encoding: &str) -> Vec<u8> {
        format!(
            "{FIRST_HEADER}: {id}\r\n\
             From: <sender@client.example.test>\r\n\
             To: <{user}@{DOMAIN}>\r\n\
             Subject: {id}\r\n\
             Date: Thu, 01 Jan 2026 00:00:00 +0000\r\n\
             Message-ID: <{id}@client.example.test>\r\n\
             MIME-Version: 1.0\r\n\
             Content-Type: text/plain; charset=iso-8859-1\r\n\
             Content-Transfer-Encoding: {encoding}\r\n\
             \r\n\
             {id}\r\n"
        )
        .into_bytes()
    }

    /// Whether a fetched message has this one's id.
    #[must_use]
    pub fn is_in(&self, fetched: &[u8]) -> bool {
        self.own_part(fetched).is_some()
    }

    /// Compares a fetched message with this one, from this message's first header on.
    ///
    /// # Errors
    /// When it is another message, or differs; the error has the position of the first difference,
    /// from that header on.
    pub fn ensure_unchanged(&self, fetched: &[u8]) -> anyhow::Result<()> {
        let own = self.own_part(fetched).with_context(|| {
            let start = String::from_utf8_lossy(fetched.get(..fetched.len().min(800)).unwrap_or_default());
            format!("no header {FIRST_HEADER}: {} in a fetched message that begins\n{start}", self.id)
        })?;
        let same = own.iter().zip(&self.bytes).take_while(|(left, right)| left == right).count();
        ensure!(
            own == self.bytes,
            "{} bytes sent, {} fetched, different from byte {same} on:\nsent    {:?}\nfetched {:?}",
            self.bytes.len(),
            own.len(),
            around(&self.bytes, same),
            around(own, same),
        );
        Ok(())
    }

    /// The part that the servers have not added.
    fn own_part<'a>(&self, fetched: &'a [u8]) -> Option<&'a [u8]> {
        let header = format!("{FIRST_HEADER}: {}\r\n", self.id);
        let start = fetched.windows(header.len()).position(|window| window == header.as_bytes())?;
        // Only whole lines precede it.
        if start == 0 || fetched.get(..start)?.ends_with(b"\r\n") { fetched.get(start..) } else { None }
    }
}

/// All bytes except NUL, CR and LF, repeated, starting elsewhere for every line.
fn permitted_bytes(start: usize) -> impl Iterator<Item = u8> {
    (1..=u8::MAX).filter(|byte| !matches!(byte, b'\r' | b'\n')).cycle().skip(start * 31 % 253)
}

fn around(bytes: &[u8], at: usize) -> String {
    let part = bytes.get(at.saturating_sub(20)..bytes.len().min(at + 20)).unwrap_or_default();
    part.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_large_and_within_the_limits_of_smtp() {
        let message = Message::new("unit", "user");
        assert!(message.bytes.len() > 400_000);
        let mut lengths = [false; LONGEST_LINE + 1];
        for line in message.bytes.split_inclusive(|byte| *byte == b'\n') {
            let line = line.strip_suffix(b"\r\n").expect("every line ends in CRLF");
            assert!(!line.contains(&b'\r') && !line.contains(&0));
            lengths[line.len()] = true;
        }
        assert_eq!(lengths.iter().position(|present| !present), None);
    }

    #[test]
    fn only_what_servers_add_on_top_is_forgiven() {
        let message = Message::new("unit", "user");
        let received = [b"Received: from somewhere\r\n", &message.bytes[..]].concat();
        message.ensure_unchanged(&received).unwrap();
        for (name, fetched) in [
            ("a byte more", [&received[..], b"\n"].concat()),
            ("a byte less", received[..received.len() - 1].to_vec()),
            ("another message", Message::new("other", "user").bytes),
            ("in the middle of a line", [b"x", &message.bytes[..]].concat()),
        ] {
            assert!(message.ensure_unchanged(&fetched).is_err(), "{name}");
        }
        let mut flipped = received.clone();
        flipped[300_000] ^= 1;
        let error = message.ensure_unchanged(&flipped).unwrap_err().to_string();
        assert!(error.contains(&format!("from byte {} on", 300_000 - 26)), "{error}");
    }
}
