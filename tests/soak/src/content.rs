//! The content of streams, and checking a stream as it arrives: every byte has exactly one
//! position.

use super::plan::{MAX_STREAM, Plan, STARTS, Side};

/// Bytes by which a position in the content is found again; random bytes match elsewhere once in
/// 2^100 runs.
const NEEDLE: usize = 16;

/// How many jumps are recorded before the rest counts as foreign.
const MAX_JUMPS: usize = 16;

/// Random bytes, longer than any stream: no stream repeats itself, and two streams start at
/// different positions.
#[derive(Debug)]
pub(crate) struct Content(Vec<u8>);

impl Content {
    pub(crate) fn new(seed: u64) -> Self {
        Self::of_length(seed, usize::try_from(MAX_STREAM + STARTS).unwrap_or(usize::MAX))
    }

    fn of_length(seed: u64, length: usize) -> Self {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        Self(bytes)
    }
}

/// One stream, byte for byte.
#[derive(Clone, Debug)]
pub(crate) struct StreamContent<'a> {
    prefix: Vec<u8>,
    content: &'a [u8],
}

impl<'a> StreamContent<'a> {
    /// What a side sends, according to the plan.
    pub(crate) fn new(plan: &Plan, side: Side, content: &'a Content) -> Self {
        let stream = plan.sent_by(side);
        let len = usize::try_from(stream.len).unwrap_or(usize::MAX);
        let start = usize::try_from(stream.start).unwrap_or(usize::MAX);
        let mut prefix = plan.prefix(side).into_bytes();
        prefix.truncate(len);
        let rest = len - prefix.len();
        let content = content.0.get(start..).and_then(|content| content.get(..rest));
        Self { prefix, content: content.unwrap_or_default() }
    }

    /// At most `most` bytes from `at` on, in one slice; empty at the end.
    pub(crate) fn piece(&self, at: u64, most: u64) -> &[u8] {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let part = match at.checked_sub(self.prefix.len()) {
            None => self.prefix.get(at..),
            Some(at) => self.content.get(at..),
        };
        let part = part.unwrap_or_default();
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        part.get(..most.min(part.len())).unwrap_or_default()
    }

    /// The position of these bytes in the stream.
    fn find(&self, needle: &[u8]) -> Option<u64> {
        let behind = self.content.get(..NEEDLE.min(self.content.len())).unwrap_or_default();
        let beginning = [&self.prefix, behind].concat();
        if let Some(at) = beginning.windows(needle.len()).position(|window| window == needle) {
            return Some(at as u64);
        }
        let at = self.content.windows(needle.len()).position(|window| window == needle)?;
        Some((self.prefix.len() + at) as u64)
    }
}

/// A position at which the stream continued at another position of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Jump {
    /// The expected position.
    pub(crate) from: u64,
    /// The actual position.
    pub(crate) to: u64,
}

/// The errors of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct StreamErrors {
    pub(crate) jumps: Vec<Jump>,
    /// Received bytes before the first that does not belong to the stream at all.
    pub(crate) foreign: Option<u64>,
}

/// Checks a stream as it arrives.
#[derive(Debug)]
pub(crate) struct StreamChecker<'a> {
    stream: &'a StreamContent<'a>,
    /// The position in the stream.
    at: u64,
    pub(crate) received: u64,
    pub(crate) errors: StreamErrors,
    pub(crate) hash: blake3::Hasher,
    first: Vec<u8>,
}

impl<'a> StreamChecker<'a> {
    pub(crate) fn new(stream: &'a StreamContent<'a>) -> Self {
        let (errors, hash) = (StreamErrors::default(), blake3::Hasher::new());
        Self { stream, at: 0, received: 0, errors, hash, first: Vec::new() }
    }

    /// Checks received bytes.
    pub(crate) fn feed(&mut self, mut arrived: &[u8]) {
        self.hash.update(arrived);
        let missing = 4_usize.saturating_sub(self.first.len()).min(arrived.len());
        self.first.extend_from_slice(arrived.get(..missing).unwrap_or_default());
        while !arrived.is_empty() {
            if self.errors.foreign.is_some() {
                self.received += arrived.len() as u64;
                return;
            }
            let expected = self.stream.piece(self.at, arrived.len() as u64);
            let (now, rest) = arrived.split_at(expected.len());
            let same = if now == expected { now.len() } else { common(now, expected) };
            self.at += same as u64;
            self.received += same as u64;
            if same == now.len() && same > 0 {
                arrived = rest;
            } else {
                arrived = arrived.get(same..).unwrap_or_default();
                self.jump(arrived);
            }
        }
    }

    /// Whether the daemon responded instead of the backend: RFC 5321's 421.
    pub(crate) fn is_rejection(&self) -> bool {
        self.first == b"421 "
    }

    /// Determines where in the stream these bytes belong.
    fn jump(&mut self, arrived: &[u8]) {
        let needle = arrived.get(..NEEDLE.min(arrived.len())).unwrap_or_default();
        let to = if needle.len() < 4 || self.errors.jumps.len() == MAX_JUMPS {
            None
        } else {
            self.stream.find(needle)
        };
        match to {
            Some(to) => {
                self.errors.jumps.push(Jump { from: self.at, to });
                self.at = to;
            }
            None => self.errors.foreign = Some(self.received),
        }
    }
}

fn common(one: &[u8], other: &[u8]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn followed(stream: &StreamContent<'_>, pieces: &[&[u8]]) -> (u64, StreamErrors) {
        let mut checker = StreamChecker::new(stream);
        pieces.iter().for_each(|piece| checker.feed(piece));
        (checker.received, checker.errors)
    }

    fn stream(content: &Content) -> StreamContent<'_> {
        StreamContent { prefix: b"220 hello\r\n".to_vec(), content: &content.0[100..100_100] }
    }

    fn all(stream: &StreamContent<'_>) -> Vec<u8> {
        [&stream.prefix, stream.content].concat()
    }

    #[test]
    fn a_stream_is_checked_in_any_pieces() {
        let content = Content::of_length(1, 200_000);
        let stream = stream(&content);
        let bytes = all(&stream);
        for size in [1, 7, 11, 4096, 1 << 20] {
            let pieces: Vec<_> = bytes.chunks(size).collect();
            assert_eq!(followed(&stream, &pieces), (100_011, StreamErrors::default()), "{size}");
        }
    }

    #[test]
    fn lost_repeated_and_reordered_bytes_are_jumps() {
        let content = Content::of_length(2, 200_000);
        let stream = stream(&content);
        let bytes = all(&stream);
        type Case<'a> = (&'a [&'a [u8]], &'a [(u64, u64)]);
        let cases: [Case<'_>; 4] = [
            (&[&bytes[..5000], &bytes], &[(5000, 0)]),
            (&[&bytes[..5000], &bytes[6000..]], &[(5000, 6000)]),
            (&[&bytes[..5000], &bytes[4000..]], &[(5000, 4000)]),
            (
                &[&bytes[..5000], &bytes[6000..7000], &bytes[5000..6000], &bytes[7000..]],
                &[(5000, 6000), (7000, 5000), (6000, 7000)],
            ),
        ];
        for (pieces, expected) in cases {
            let (_, errors) = followed(&stream, pieces);
            let jumps: Vec<_> = errors.jumps.iter().map(|jump| (jump.from, jump.to)).collect();
            assert_eq!((&jumps[..], errors.foreign), (expected, None));
        }
    }

    #[test]
    fn bytes_of_another_stream_are_foreign() {
        let content = Content::of_length(3, 200_000);
        let stream = stream(&content);
        let bytes = all(&stream);
        let (received, errors) = followed(&stream, &[&bytes[..5000], &content.0[150_000..150_100], &bytes]);
        assert_eq!(errors, StreamErrors { jumps: vec![], foreign: Some(5000) });
        assert_eq!(received, 5100 + bytes.len() as u64);
    }

    #[test]
    fn bytes_after_the_end_are_errors() {
        let content = Content::of_length(4, 200_000);
        let stream = stream(&content);
        let mut bytes = all(&stream);
        let len = bytes.len() as u64;
        bytes.extend_from_slice(&content.0[100..200]);
        let (_, errors) = followed(&stream, &[&bytes]);
        assert_eq!(errors.jumps.first(), Some(&Jump { from: len, to: 11 }));
        let (_, errors) = followed(&stream, &[&all(&stream), b"x"]);
        assert_eq!(errors.foreign, Some(len));
    }

    #[test]
    fn seeds_make_different_content() {
        assert_eq!(Content::of_length(5, 1000).0, Content::of_length(5, 1000).0);
        assert_ne!(Content::of_length(5, 1000).0, Content::of_length(6, 1000).0);
    }
}
