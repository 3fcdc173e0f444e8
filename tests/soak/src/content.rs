//! What streams are made of, and following one as it arrives: every byte has one right place.

use super::plan::{LARGEST, Plan, STARTS, Side};

/// Bytes by which a place in the content is found again; at random they agree somewhere once in 2^100 runs.
const NEEDLE: usize = 16;

/// How many leaps are noted before the rest counts as foreign.
const MOST_LEAPS: usize = 16;

/// Random bytes, longer than any stream: no stream repeats itself, and two begin at different places.
#[derive(Debug)]
pub(crate) struct Content(Vec<u8>);

impl Content {
    pub(crate) fn new(seed: u64) -> Self {
        Self::of_length(seed, usize::try_from(LARGEST + STARTS).unwrap_or(usize::MAX))
    }

    fn of_length(seed: u64, length: usize) -> Self {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        Self(bytes)
    }
}

/// One stream, byte for byte.
#[derive(Clone, Debug)]
pub(crate) struct Script<'a> {
    words: Vec<u8>,
    content: &'a [u8],
}

impl<'a> Script<'a> {
    /// What a side sends by the plan.
    pub(crate) fn new(plan: &Plan, side: Side, content: &'a Content) -> Self {
        let stream = plan.sent_by(side);
        let len = usize::try_from(stream.len).unwrap_or(usize::MAX);
        let start = usize::try_from(stream.start).unwrap_or(usize::MAX);
        let mut words = plan.words(side).into_bytes();
        words.truncate(len);
        let rest = len - words.len();
        let content = content.0.get(start..).and_then(|content| content.get(..rest));
        Self { words, content: content.unwrap_or_default() }
    }

    /// At most `most` bytes from `at` on, in one piece; empty at the end.
    pub(crate) fn piece(&self, at: u64, most: u64) -> &[u8] {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let part = match at.checked_sub(self.words.len()) {
            None => self.words.get(at..),
            Some(at) => self.content.get(at..),
        };
        let part = part.unwrap_or_default();
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        part.get(..most.min(part.len())).unwrap_or_default()
    }

    /// Where in the stream these bytes are.
    fn find(&self, needle: &[u8]) -> Option<u64> {
        let behind = self.content.get(..NEEDLE.min(self.content.len())).unwrap_or_default();
        let beginning = [&self.words, behind].concat();
        if let Some(at) = beginning.windows(needle.len()).position(|window| window == needle) {
            return Some(at as u64);
        }
        let at = self.content.windows(needle.len()).position(|window| window == needle)?;
        Some((self.words.len() + at) as u64)
    }
}

/// A place where the stream did not go on as it should, but at another place of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leap {
    /// What should have come.
    pub(crate) from: u64,
    /// What came.
    pub(crate) to: u64,
}

/// What is wrong with a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Faults {
    pub(crate) leaps: Vec<Leap>,
    /// From here on, counted as received, it is not the stream at all.
    pub(crate) foreign: Option<u64>,
}

/// Follows a stream as it arrives.
#[derive(Debug)]
pub(crate) struct Follower<'a> {
    script: &'a Script<'a>,
    /// The place in the script.
    at: u64,
    pub(crate) received: u64,
    pub(crate) faults: Faults,
    pub(crate) hash: blake3::Hasher,
    first: Vec<u8>,
}

impl<'a> Follower<'a> {
    pub(crate) fn new(script: &'a Script<'a>) -> Self {
        let (faults, hash) = (Faults::default(), blake3::Hasher::new());
        Self { script, at: 0, received: 0, faults, hash, first: Vec::new() }
    }

    /// Takes what has arrived.
    pub(crate) fn take(&mut self, mut arrived: &[u8]) {
        self.hash.update(arrived);
        let missing = 4_usize.saturating_sub(self.first.len()).min(arrived.len());
        self.first.extend_from_slice(arrived.get(..missing).unwrap_or_default());
        while !arrived.is_empty() {
            if self.faults.foreign.is_some() {
                self.received += arrived.len() as u64;
                return;
            }
            let expected = self.script.piece(self.at, arrived.len() as u64);
            let (now, rest) = arrived.split_at(expected.len());
            let same = if now == expected { now.len() } else { common(now, expected) };
            self.at += same as u64;
            self.received += same as u64;
            if same == now.len() && same > 0 {
                arrived = rest;
            } else {
                arrived = arrived.get(same..).unwrap_or_default();
                self.leap(arrived);
            }
        }
    }

    /// Whether the daemon speaks, not the backend: RFC 5321's 421.
    pub(crate) fn is_refusal(&self) -> bool {
        self.first == b"421 "
    }

    /// Finds out where in the stream these bytes belong.
    fn leap(&mut self, arrived: &[u8]) {
        let needle = arrived.get(..NEEDLE.min(arrived.len())).unwrap_or_default();
        let to = if needle.len() < 4 || self.faults.leaps.len() == MOST_LEAPS {
            None
        } else {
            self.script.find(needle)
        };
        match to {
            Some(to) => {
                self.faults.leaps.push(Leap { from: self.at, to });
                self.at = to;
            }
            None => self.faults.foreign = Some(self.received),
        }
    }
}

fn common(one: &[u8], other: &[u8]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn followed(script: &Script<'_>, pieces: &[&[u8]]) -> (u64, Faults) {
        let mut follower = Follower::new(script);
        pieces.iter().for_each(|piece| follower.take(piece));
        (follower.received, follower.faults)
    }

    fn script(content: &Content) -> Script<'_> {
        Script { words: b"220 hello\r\n".to_vec(), content: &content.0[100..100_100] }
    }

    fn all(script: &Script<'_>) -> Vec<u8> {
        [&script.words, script.content].concat()
    }

    #[test]
    fn a_stream_is_followed_in_any_pieces() {
        let content = Content::of_length(1, 200_000);
        let script = script(&content);
        let bytes = all(&script);
        for size in [1, 7, 11, 4096, 1 << 20] {
            let pieces: Vec<_> = bytes.chunks(size).collect();
            assert_eq!(followed(&script, &pieces), (100_011, Faults::default()), "{size}");
        }
    }

    #[test]
    fn lost_doubled_and_moved_bytes_are_leaps() {
        let content = Content::of_length(2, 200_000);
        let script = script(&content);
        let bytes = all(&script);
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
            let (_, faults) = followed(&script, pieces);
            let leaps: Vec<_> = faults.leaps.iter().map(|leap| (leap.from, leap.to)).collect();
            assert_eq!((&leaps[..], faults.foreign), (expected, None));
        }
    }

    #[test]
    fn bytes_of_another_stream_are_foreign() {
        let content = Content::of_length(3, 200_000);
        let script = script(&content);
        let bytes = all(&script);
        let (received, faults) = followed(&script, &[&bytes[..5000], &content.0[150_000..150_100], &bytes]);
        assert_eq!(faults, Faults { leaps: vec![], foreign: Some(5000) });
        assert_eq!(received, 5100 + bytes.len() as u64);
    }

    #[test]
    fn bytes_behind_the_end_are_faults() {
        let content = Content::of_length(4, 200_000);
        let script = script(&content);
        let mut bytes = all(&script);
        let len = bytes.len() as u64;
        bytes.extend_from_slice(&content.0[100..200]);
        let (_, faults) = followed(&script, &[&bytes]);
        assert_eq!(faults.leaps.first(), Some(&Leap { from: len, to: 11 }));
        let (_, faults) = followed(&script, &[&all(&script), b"x"]);
        assert_eq!(faults.foreign, Some(len));
    }

    #[test]
    fn seeds_make_different_content() {
        assert_eq!(Content::of_length(5, 1000).0, Content::of_length(5, 1000).0);
        assert_ne!(Content::of_length(5, 1000).0, Content::of_length(6, 1000).0);
    }
}
