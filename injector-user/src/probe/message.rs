//! The probe's message: made from random bytes, found among others by its header, compared with
//! what comes back.

use std::{
    net::{IpAddr, Ipv6Addr},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rand::{Rng as _, RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// The header by which the probe finds its messages.
pub(super) const TAG_HEADER: &str = "X-Injector-Probe";

/// Longest line of the body without its CRLF: shorter than any server or filter wraps.
const LINE: usize = 76;

/// Which probe sent a message, when, and which message it is: the value of [`TAG_HEADER`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tag {
    /// The probe's name.
    pub(super) probe: String,
    /// When its run began, in seconds since 1970.
    pub(super) began: u64,
    /// Unique.
    pub(super) id: String,
}

impl Tag {
    pub(super) fn new(probe: &str, began: SystemTime, seed: &[u8; 32]) -> Self {
        let began = began.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut random = ChaCha8Rng::from_seed(*seed);
        Self {
            probe: probe.to_owned(),
            began,
            id: format!("{:016x}{:016x}", random.next_u64(), random.next_u64()),
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let (probe, began, id) = (words.next()?, words.next()?.parse().ok()?, words.next()?);
        Some(Self { probe: probe.to_owned(), began, id: id.to_owned() })
    }

    pub(super) fn value(&self) -> String {
        format!("{} {} {}", self.probe, self.began, self.id)
    }

    /// Whether `other` was left by an earlier run of the same probe that has ended by now: it began
    /// more than `limit` before this one.
    pub(super) fn is_leftover(&self, other: &Self, limit: Duration) -> bool {
        other.probe == self.probe && other.began.saturating_add(limit.as_secs()) < self.began
    }
}

/// A message of the probe's.
#[derive(Clone, Debug)]
pub(super) struct Message {
    headers: Vec<String>,
    body: Vec<u8>,
}

impl Message {
    /// A message whose body has `size` bytes or a few more: lines of random printable characters.
    /// Some begin with a dot, which SMTP escapes (RFC 5321, section 4.5.2).
    pub(super) fn new(tag: &Tag, from: &str, to: &str, at: SystemTime, size: usize, seed: &[u8; 32]) -> Self {
        let domain = from.rsplit_once('@').map_or("localhost", |(_, domain)| domain);
        // RFC 5322 requires a number for the zone, where HTTP's dates have a name; the rest is the
        // same.
        let date = httpdate::fmt_http_date(at).replace("GMT", "+0000");
        let headers = vec![
            format!("{TAG_HEADER}: {}", tag.value()),
            format!("From: <{from}>"),
            format!("To: <{to}>"),
            format!("Subject: injector probe {}", tag.probe),
            format!("Date: {date}"),
            format!("Message-ID: <{}@{domain}>", tag.id),
            // Suppresses automatic replies (RFC 3834).
            "Auto-Submitted: auto-generated".to_owned(),
            "MIME-Version: 1.0".to_owned(),
            "Content-Type: text/plain; charset=us-ascii".to_owned(),
            "Content-Transfer-Encoding: 7bit".to_owned(),
        ];
        Self { headers, body: body(size, seed) }
    }

    /// The message for SMTP: without the last CRLF, which belongs to the final dot.
    pub(super) fn for_smtp(&self) -> Vec<u8> {
        let mut bytes = self.headers.join("\r\n").into_bytes();
        bytes.extend_from_slice(b"\r\n\r\n");
        bytes.extend_from_slice(self.body.strip_suffix(b"\r\n").unwrap_or(&self.body));
        bytes
    }

    /// Compares the fetched message with this one: the body byte for byte, and the headers that
    /// were sent. Servers and filters may add their own headers.
    ///
    /// # Errors
    /// With the first thing that differs.
    pub(super) fn compare(&self, fetched: &[u8]) -> Result<(), String> {
        let (headers, body) =
            split(fetched).ok_or("the fetched message has no blank line after its headers")?;
        let present = unfold(headers);
        for sent in &self.headers {
            if !present.iter().any(|header| header == sent) {
                return Err(format!("the fetched message lacks the header {sent:?}"));
            }
        }
        if body == self.body {
            return Ok(());
        }
        let same = body.iter().zip(&self.body).take_while(|(left, right)| left == right).count();
        Err(format!(
            "the body differs from byte {same} on: {} bytes sent, {} fetched; sent {:?}, fetched {:?}",
            self.body.len(),
            body.len(),
            excerpt(&self.body, same),
            excerpt(body, same),
        ))
    }
}

/// The client's addresses in the oldest Received line, the lowest: those in brackets before `by`.
pub(super) fn received_from(fetched: &[u8]) -> Option<Vec<IpAddr>> {
    let headers = unfold(split(fetched)?.0);
    let oldest = headers.iter().rfind(|header| header.to_ascii_lowercase().starts_with("received:"))?;
    let from = oldest.split(" by ").next().unwrap_or_default();
    let bracketed = from.split('[').skip(1).filter_map(|rest| rest.split_once(']').map(|(inside, _)| inside));
    Some(bracketed.filter_map(address).collect())
}

/// An address literal (RFC 5321, section 4.1.3).
fn address(text: &str) -> Option<IpAddr> {
    match text.get(..5) {
        Some(tag) if tag.eq_ignore_ascii_case("IPv6:") => {
            text.get(5..)?.parse::<Ipv6Addr>().ok().map(IpAddr::V6)
        }
        _ => text.parse().ok(),
    }
    .map(|address| address.to_canonical())
}

fn body(size: usize, seed: &[u8; 32]) -> Vec<u8> {
    let mut random = ChaCha8Rng::from_seed(*seed);
    let mut body = Vec::with_capacity(size + LINE + 2);
    while body.len() < size {
        let length = random.random_range(0..=LINE);
        let dotted = random.random_range(0..8) == 0;
        for at in 0..length {
            // From ! to ~: some software strips blanks at the end of a line.
            body.push(if at == 0 && dotted { b'.' } else { random.random_range(b'!'..=b'~') });
        }
        body.extend_from_slice(b"\r\n");
    }
    body
}

/// Headers and body.
fn split(message: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = message.windows(4).position(|window| window == b"\r\n\r\n")?;
    Some((message.get(..end)?, message.get(end + 4..)?))
}

/// One string per header, with continuation lines joined by a blank.
fn unfold(headers: &[u8]) -> Vec<String> {
    let mut unfolded: Vec<String> = Vec::new();
    for line in String::from_utf8_lossy(headers).split("\r\n") {
        match unfolded.last_mut() {
            Some(header) if line.starts_with([' ', '\t']) => {
                header.push(' ');
                header.push_str(line.trim_start());
            }
            _ => unfolded.push(line.to_owned()),
        }
    }
    unfolded
}

fn excerpt(bytes: &[u8], at: usize) -> String {
    let part = bytes.get(at.saturating_sub(12)..bytes.len().min(at + 12)).unwrap_or_default();
    part.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Duration = Duration::from_secs(1_800_000_000);

    fn message(seed: u8) -> Message {
        let at = UNIX_EPOCH + AT;
        Message::new(&Tag::new("mail", at, &[seed; 32]), "a@b.test", "c@d.test", at, 5000, &[seed; 32])
    }

    /// The message as a server stores it: with its own headers above and below, one of them folded.
    fn stored(message: &Message) -> Vec<u8> {
        let sent = message.for_smtp();
        let (headers, body) = split(&sent).unwrap();
        let received = "Received: from mail.test by mail.test with LMTP id 1; now\r\n\
                        Received: from probe.test (unknown [198.51.100.7])\r\n\
                        \tby mail.test (Postfix) with ESMTP id [192.0.2.1]\r\n";
        [received.as_bytes(), headers, b"\r\nX-Spam: no\r\n\r\n", body, b"\r\n"].concat()
    }

    #[test]
    fn headers_that_servers_add_are_the_only_allowed_difference() {
        let message = message(1);
        let stored = stored(&message);
        message.compare(&stored).unwrap();
        let mut flipped = stored.clone();
        let last = flipped.len() - 40;
        flipped[last] ^= 1;
        for (name, other) in [
            ("a byte changed", flipped),
            ("a byte more", [&stored[..], b"\n"].concat()),
            ("a byte less", stored[..stored.len() - 1].to_vec()),
            ("another message", self::stored(&self::message(2))),
            ("no body", b"Subject: x\r\n".to_vec()),
        ] {
            assert!(message.compare(&other).is_err(), "{name}");
        }
    }

    #[test]
    fn a_body_has_all_kinds_of_lines_and_depends_on_the_seed() {
        let body = body(20_000, &[7; 32]);
        assert!((20_000..20_000 + LINE + 2).contains(&body.len()));
        let lines: Vec<_> = body.split(|byte| *byte == b'\n').collect();
        assert!(lines.iter().any(|line| line.starts_with(b".")) && lines.iter().any(|line| *line == b"\r"));
        assert!(lines.iter().all(|line| line.len() <= LINE + 1));
        assert_ne!(body, super::body(20_000, &[8; 32]));
    }

    #[test]
    fn the_date_has_the_format_of_rfc_5322() {
        let message = message(1);
        assert!(message.headers.contains(&"Date: Fri, 15 Jan 2027 08:00:00 +0000".to_owned()), "{message:?}");
    }

    #[test]
    fn tags_parse_and_only_older_ones_of_the_same_probe_are_leftovers() {
        let tag = Tag::new("mail", UNIX_EPOCH + AT, &[1; 32]);
        assert_eq!(Tag::parse(&format!(" {}\r\n", tag.value())), Some(tag.clone()));
        assert_eq!(Tag::parse("mail yesterday abc"), None);
        let limit = Duration::from_secs(60);
        let left = |probe: &str, seconds: u64| Tag {
            probe: probe.into(),
            began: AT.as_secs() - seconds,
            id: "1".into(),
        };
        assert!(tag.is_leftover(&left("mail", 61), limit));
        assert!(!tag.is_leftover(&left("mail", 60), limit), "may still be at work");
        assert!(!tag.is_leftover(&left("other", 600), limit));
    }

    #[test]
    fn the_client_is_parsed_from_the_oldest_received_line() {
        assert_eq!(received_from(&stored(&message(1))).unwrap(), ["198.51.100.7".parse::<IpAddr>().unwrap()]);
        for (line, address) in [
            ("Received: from [192.0.2.9] (helo=x) by y", "192.0.2.9"),
            ("received: from x (unknown [IPv6:2001:db8::7]) by y", "2001:db8::7"),
            ("Received: from x ([::ffff:192.0.2.9]) by y", "192.0.2.9"),
        ] {
            let text = format!("{line}\r\n\r\n");
            assert_eq!(
                received_from(text.as_bytes()).unwrap(),
                [address.parse::<IpAddr>().unwrap()],
                "{line}"
            );
        }
        assert_eq!(received_from(b"Received: by y\r\n\r\n"), Some(vec![]));
        assert_eq!(received_from(b"Subject: x\r\n\r\n"), None);
    }
}
