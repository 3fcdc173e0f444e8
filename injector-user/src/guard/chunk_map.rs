//! A sorted map whose entries lie side by side in chunks.
//!
//! A million entries take what they take themselves and little more: a `BTreeMap` that is filled in
//! order, as from a list, has nodes that are half empty. No insertion takes long: it moves the entries
//! of one chunk. A hash table of a million entries stops for tens of milliseconds when it grows.

/// The most entries of a chunk, for which it always has room.
const CHUNK: usize = 512;

/// A sorted map.
#[derive(Clone, Debug)]
pub(super) struct ChunkMap<K, V> {
    /// In order. None is empty.
    chunks: Vec<Chunk<K, V>>,
}

#[derive(Clone, Debug)]
struct Chunk<K, V> {
    /// No entry has a lower key, and those of the chunk before have. It is here so that a search need not
    /// look into each chunk that it compares with.
    from: K,
    entries: Vec<(K, V)>,
}

impl<K, V> Default for ChunkMap<K, V> {
    fn default() -> Self {
        Self { chunks: Vec::new() }
    }
}

impl<K: Copy + Ord, V> ChunkMap<K, V> {
    pub(super) const fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    pub(super) fn get(&self, key: &K) -> Option<&V> {
        let chunk = self.chunks.get(self.chunk_of(key))?;
        let at = chunk.find(key).ok()?;
        chunk.entries.get(at).map(|(_, value)| value)
    }

    /// Returns the value that was there.
    pub(super) fn insert(&mut self, key: K, value: V) -> Option<V> {
        let number = self.chunk_of(&key);
        let Some(chunk) = self.chunks.get_mut(number) else {
            self.chunks.push(Chunk::new(key, [(key, value)]));
            return None;
        };
        match chunk.find(&key) {
            Ok(at) => return chunk.entries.get_mut(at).map(|(_, there)| std::mem::replace(there, value)),
            Err(at) if chunk.entries.len() < CHUNK => {
                chunk.from = chunk.from.min(key);
                chunk.entries.insert(at, (key, value));
            }
            // Entries that come in order leave full chunks behind.
            Err(CHUNK..) => self.chunks.insert(number + 1, Chunk::new(key, [(key, value)])),
            Err(_) => {
                let right = chunk.split();
                self.chunks.insert(number + 1, right);
                return self.insert(key, value);
            }
        }
        None
    }

    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        let number = self.chunk_of(key);
        let chunk = self.chunks.get_mut(number)?;
        let at = chunk.find(key).ok()?;
        let (_, value) = chunk.entries.remove(at);
        if chunk.entries.is_empty() {
            self.chunks.remove(number);
        } else {
            self.join_with_next(number);
            self.join_with_next(number.saturating_sub(1));
        }
        Some(value)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &(K, V)> {
        self.chunks.iter().flat_map(|chunk| &chunk.entries)
    }

    /// The entries with this key or a later one.
    pub(super) fn from(&self, key: K) -> impl Iterator<Item = &(K, V)> {
        let number = self.chunk_of(&key);
        let (first, others) = self.chunks.get(number..).and_then(<[_]>::split_first).unzip();
        let first = first.map_or(&[][..], |chunk| chunk.entries.as_slice());
        let after = first.get(first.partition_point(|(other, _)| *other < key)..).unwrap_or_default();
        after.iter().chain(others.into_iter().flatten().flat_map(|chunk| &chunk.entries))
    }

    /// The last entry with such a key. All keys before one of them are such keys, too.
    pub(super) fn last_where(&self, is_such: impl Fn(&K) -> bool) -> Option<&(K, V)> {
        let chunks = self.chunks.get(..self.chunks.partition_point(|chunk| is_such(&chunk.from)))?;
        let (last, before) = chunks.split_last()?;
        match last.entries.partition_point(|(key, _)| is_such(key)) {
            // Its first entry was removed.
            0 => before.last()?.entries.last(),
            count => last.entries.get(count - 1),
        }
    }

    /// The chunk that has this key, or would get it.
    fn chunk_of(&self, key: &K) -> usize {
        self.chunks.partition_point(|chunk| chunk.from <= *key).saturating_sub(1)
    }

    /// Makes one chunk of this one and the next if both together are half a chunk at most.
    fn join_with_next(&mut self, number: usize) {
        let fits =
            |both: &[Chunk<K, V>]| both.iter().map(|chunk| chunk.entries.len()).sum::<usize>() <= CHUNK / 2;
        if self.chunks.get(number..number + 2).is_some_and(fits) {
            let mut next = self.chunks.remove(number + 1);
            if let Some(chunk) = self.chunks.get_mut(number) {
                chunk.entries.append(&mut next.entries);
            }
        }
    }
}

impl<K: Copy + Ord, V> Chunk<K, V> {
    fn new(from: K, entries: impl IntoIterator<Item = (K, V)>) -> Self {
        let mut room = Vec::with_capacity(CHUNK);
        room.extend(entries);
        Self { from, entries: room }
    }

    fn find(&self, key: &K) -> Result<usize, usize> {
        self.entries.binary_search_by_key(key, |(key, _)| *key)
    }

    /// Leaves the first half here.
    fn split(&mut self) -> Self {
        let middle = self.entries.get(CHUNK / 2).map_or(self.from, |(key, _)| *key);
        Self::new(middle, self.entries.drain(CHUNK / 2..))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn capacity(map: &ChunkMap<usize, usize>) -> usize {
        map.chunks.iter().map(|chunk| chunk.entries.capacity()).sum()
    }

    #[test]
    fn entries_in_order_fill_their_chunks() {
        let mut map = ChunkMap::default();
        for number in 0..100 * CHUNK {
            assert_eq!(map.insert(number, number), None);
        }
        assert_eq!(capacity(&map), 100 * CHUNK);
    }

    #[test]
    fn what_is_removed_leaves_no_room_behind() {
        let mut map = ChunkMap::default();
        let count = 100 * CHUNK;
        for number in 0..count {
            // In no order.
            map.insert(number.wrapping_mul(0x9E37_79B1) % count, number);
        }
        assert!(capacity(&map) <= 200 * CHUNK, "{}", capacity(&map));
        for number in (0..count).filter(|number| number % 50 != 0) {
            assert_eq!(map.remove(&(number.wrapping_mul(0x9E37_79B1) % count)), Some(number));
        }
        assert_eq!(map.iter().count(), 2 * CHUNK);
        assert!(capacity(&map) <= 9 * CHUNK, "{}", capacity(&map));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u16, u8),
        InsertInOrder(u16, u16),
        Remove(u16),
        RemoveAll(u16, u16),
    }

    fn step() -> impl Strategy<Value = Step> {
        let key = 0..4000_u16;
        prop_oneof![
            4 => (key.clone(), any::<u8>()).prop_map(|(key, value)| Step::Insert(key, value)),
            2 => (key.clone(), 0..1500_u16).prop_map(|(from, count)| Step::InsertInOrder(from, count)),
            4 => key.clone().prop_map(Step::Remove),
            2 => (key, 0..1500_u16).prop_map(|(from, count)| Step::RemoveAll(from, count)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn it_is_a_sorted_map(
            steps in proptest::collection::vec(step(), 1..40),
            keys in proptest::collection::vec(0..6000_u16, 20),
        ) {
            let (mut map, mut oracle) = (ChunkMap::default(), BTreeMap::new());
            for step in steps {
                match step {
                    Step::Insert(key, value) => prop_assert_eq!(map.insert(key, value), oracle.insert(key, value)),
                    Step::InsertInOrder(from, count) => {
                        for key in from..from + count {
                            prop_assert_eq!(map.insert(key, 0), oracle.insert(key, 0));
                        }
                    }
                    Step::Remove(key) => prop_assert_eq!(map.remove(&key), oracle.remove(&key)),
                    Step::RemoveAll(from, count) => {
                        for key in from..from + count {
                            prop_assert_eq!(map.remove(&key), oracle.remove(&key));
                        }
                    }
                }
                prop_assert!(map.iter().map(|(key, value)| (key, value)).eq(&oracle));
                prop_assert!(map.chunks.iter().all(|chunk| (1..=CHUNK).contains(&chunk.entries.len())));
                prop_assert_eq!(map.is_empty(), oracle.is_empty());
                for key in &keys {
                    prop_assert_eq!(map.get(key), oracle.get(key));
                    prop_assert!(map.from(*key).map(|(key, value)| (key, value)).eq(oracle.range(key..)));
                    let last = map.last_where(|other| other <= key).map(|(key, value)| (key, value));
                    prop_assert_eq!(last, oracle.range(..=key).next_back());
                }
            }
        }
    }
}
