//! Recognises the reply of a mail server in what it sends. Pure: no I/O.

/// The longest reply that is read. No server sends as much (RFC 5321, section 4.5.3.1.5: 512 bytes
/// a line).
pub(super) const MAX_REPLY: usize = 16 * 1024;

/// How much of an unexpected line is shown.
const SHOWN: usize = 80;

/// Prefixes of the lines of one reply.
#[derive(Debug)]
pub(super) struct Lines {
    /// Of the last line.
    pub(super) last: &'static [&'static str],
    /// Of the lines that may precede it.
    pub(super) before: &'static [&'static str],
}

impl Lines {
    /// Whether this is the last line of the reply.
    fn ends_with(&self, line: &[u8]) -> Result<bool, ReplyError> {
        let begins = |prefixes: &[&str]| prefixes.iter().any(|prefix| line.starts_with(prefix.as_bytes()));
        if begins(self.last) {
            return Ok(true);
        }
        if begins(self.before) {
            return Ok(false);
        }
        let text = String::from_utf8_lossy(line);
        Err(ReplyError::Unexpected(text.trim_end().chars().take(SHOWN).collect()))
    }
}

/// Why a reply is not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ReplyError {
    /// A line is not of the reply: its beginning.
    Unexpected(String),
    /// The reply does not end within [`MAX_REPLY`].
    TooLong,
}

/// A reply that is being read.
#[derive(Debug)]
pub(super) struct Reply {
    expected: &'static Lines,
    /// The line that has no end yet.
    line: Vec<u8>,
    /// Bytes so far, at most [`MAX_REPLY`].
    read: usize,
}

impl Reply {
    pub(super) fn new(expected: &'static Lines) -> Self {
        Self { expected, line: Vec::new(), read: 0 }
    }

    /// Takes the next bytes. Returns how many of them belong to the reply if it ends here, or `None`
    /// if more must follow. The result does not depend on how the bytes are divided.
    ///
    /// # Errors
    /// [`ReplyError`], with the first line that does not match.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<Option<usize>, ReplyError> {
        let allowed = bytes.get(..MAX_REPLY - self.read).unwrap_or(bytes);
        let mut used = 0;
        for part in allowed.split_inclusive(|byte| *byte == b'\n') {
            used += part.len();
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                if self.expected.ends_with(&line)? {
                    return Ok(Some(used));
                }
            }
        }
        self.read += used;
        if self.read == MAX_REPLY { Err(ReplyError::TooLong) } else { Ok(None) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GREETING: Lines = Lines { last: &["220 "], before: &["220-"] };

    /// What a reader of these chunks finds: the length of the reply or the error; `None` if the
    /// reply has no end.
    fn read<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Option<Result<usize, ReplyError>> {
        let (mut reply, mut before) = (Reply::new(&GREETING), 0);
        for chunk in chunks {
            match reply.push(chunk) {
                Ok(None) => before += chunk.len(),
                Ok(Some(used)) => return Some(Ok(before + used)),
                Err(error) => return Some(Err(error)),
            }
            assert!(before < MAX_REPLY && reply.line.len() < MAX_REPLY);
        }
        None
    }

    /// The same by the definition, without chunks.
    fn expected(bytes: &[u8]) -> Option<Result<usize, ReplyError>> {
        let limited = &bytes[..bytes.len().min(MAX_REPLY)];
        let mut end = 0;
        for line in limited.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n")) {
            end += line.len();
            if line.starts_with(b"220 ") {
                return Some(Ok(end));
            }
            if !line.starts_with(b"220-") {
                let text = String::from_utf8_lossy(line);
                return Some(Err(ReplyError::Unexpected(text.trim_end().chars().take(SHOWN).collect())));
            }
        }
        (limited.len() == MAX_REPLY).then_some(Err(ReplyError::TooLong))
    }

    /// A line of a server: mostly of the greeting, of any length.
    fn line() -> impl Strategy<Value = Vec<u8>> {
        let prefix = prop_oneof![8 => Just("220-"), 2 => Just("220 "), 1 => Just("554 "), 1 => Just("")];
        let len = prop_oneof![8 => 0..600_usize, 1 => 8000..9000_usize, 1 => MAX_REPLY - 8..MAX_REPLY + 8];
        (prefix, len, any::<u8>()).prop_map(|(prefix, len, byte)| {
            let byte = if byte == b'\n' { b'x' } else { byte };
            [prefix.as_bytes(), &vec![byte; len], b"\r\n"].concat()
        })
    }

    proptest! {
        #[test]
        fn the_result_does_not_depend_on_the_chunks(
            lines in prop::collection::vec(line(), 0..8),
            without_end in 0..3_usize,
            sizes in prop::collection::vec(prop_oneof![3 => 1..9_usize, 2 => 500..2000_usize, 1 => 8192..8193_usize], 1..40),
        ) {
            let mut bytes = lines.concat();
            bytes.truncate(bytes.len().saturating_sub(without_end));
            let mut rest = bytes.as_slice();
            let mut chunks = Vec::new();
            for size in sizes.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (chunk, after) = rest.split_at((*size).min(rest.len()));
                chunks.push(chunk);
                rest = after;
            }
            prop_assert_eq!(read(chunks), expected(&bytes));
            prop_assert_eq!(read([bytes.as_slice()].into_iter().filter(|all| !all.is_empty())), expected(&bytes));
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..64), 0..16)) {
            let all = chunks.concat();
            prop_assert_eq!(read(chunks.iter().map(Vec::as_slice)), expected(&all));
        }
    }

    #[test]
    fn bytes_behind_the_reply_are_left() {
        assert_eq!(read([&b"220-a\r\n220 b\r\n221 c\r\n"[..]]), Some(Ok(14)));
        assert_eq!(read([&b"220"[..], b" b\r", b"\n250"]), Some(Ok(7)));
    }
}
