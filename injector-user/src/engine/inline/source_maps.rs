//! What the program and the daemon count of each source. The kernel half is
//! `injector-ebpf/src/inline/source.rs`.

use std::sync::Mutex;

use aya::{
    Ebpf,
    maps::{HashMap, MapData},
};
use injector_common::guard::{CountWord, Rate, SourceCounts, SourceKey};

use crate::{
    config::Network,
    engine::bpf::{LoadError, lock, take_map as take},
};

/// The maps of sources.
pub(super) struct SourceMaps {
    counts: HashMap<MapData, SourceKey, u64>,
    rates: HashMap<MapData, SourceKey, Rate>,
    sessions: Mutex<HashMap<MapData, SourceKey, u32>>,
}

impl SourceMaps {
    pub(super) fn take(programs: &mut Ebpf) -> Result<Self, LoadError> {
        Ok(Self {
            counts: take(programs, "SOURCE_COUNTS")?,
            rates: take(programs, "SOURCE_RATES")?,
            sessions: Mutex::new(take::<HashMap<_, _, _>>(programs, "SOURCE_SESSIONS")?),
        })
    }

    /// The connections of a source, and how much of its rate they have used. `listener`: its place, or
    /// that of all.
    pub(super) fn read(&self, source: Network, listener: u32) -> (SourceCounts, Rate) {
        let key = key(source, listener);
        let word = CountWord(self.counts.get(&key, 0).unwrap_or_default());
        (word.counts(0), self.rates.get(&key, 0).unwrap_or_default())
    }

    /// Writes how many sessions a source has, for each of these places. A map that is full leaves the
    /// program without the number: then inline may open more connections of this source.
    pub(super) fn set_sessions<I: IntoIterator<Item = u32>>(
        &self,
        source: Network,
        sessions: u32,
        places: impl FnOnce() -> I,
    ) {
        let mut map = lock(&self.sessions);
        for listener in places() {
            let key = key(source, listener);
            let written = if sessions == 0 { map.remove(&key) } else { map.insert(key, sessions, 0) };
            drop(written);
        }
    }

    /// Removes the sessions of an earlier daemon.
    pub(super) fn clear_sessions(&self) {
        remove(&mut lock(&self.sessions), |_| true);
    }

    /// Gives the places that a listener has got what the place `from` has, has `switch` make them its
    /// own, and empties those that it had.
    pub(super) fn move_sessions(
        &self,
        from: Option<u32>,
        joined: &[u32],
        left: &[u32],
        switch: impl FnOnce(),
    ) {
        let mut map = lock(&self.sessions);
        let all: Vec<(SourceKey, u32)> = map.iter().filter_map(Result::ok).collect();
        for (key, sessions) in all.into_iter().filter(|(key, _)| Some(key.listener) == from) {
            for listener in joined {
                drop(map.insert(SourceKey { listener: *listener, ..key }, sessions, 0));
            }
        }
        switch();
        remove(&mut map, |key| left.contains(&key.listener));
    }
}

fn remove(map: &mut HashMap<MapData, SourceKey, u32>, which: impl Fn(&SourceKey) -> bool) {
    let keys: Vec<_> = map.keys().filter_map(Result::ok).filter(which).collect();
    for key in keys {
        drop(map.remove(&key));
    }
}

fn key(source: Network, listener: u32) -> SourceKey {
    let octets = match source.address() {
        std::net::IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        std::net::IpAddr::V6(ip) => ip.octets(),
    };
    let (words, _) = octets.as_chunks::<4>();
    let mut ip = [0; 4];
    for (to, word) in ip.iter_mut().zip(words) {
        *to = u32::from_ne_bytes(*word);
    }
    SourceKey { ip, listener }
}

#[cfg(test)]
mod tests {
    use injector_common::guard::mask;

    use super::*;

    #[test]
    fn keys_are_those_of_the_program() {
        let of = |network: &str| key(network.parse().unwrap(), 3);
        // As `source::key` in the program makes it of a packet's words.
        let ipv4 = [0, 0, 0xFFFF_u32.to_be(), u32::from_ne_bytes([192, 0, 2, 7])];
        assert_eq!(of("192.0.2.7/32"), SourceKey { ip: mask(ipv4, 128), listener: 3 });
        assert_eq!(of("192.0.2.0/24"), SourceKey { ip: mask(ipv4, 96 + 24), listener: 3 });
        let ipv6 = [0x2001_0db8_u32.to_be(), 1_u32.to_be(), 2_u32.to_be(), 3_u32.to_be()];
        assert_eq!(of("2001:db8:0:1::/64"), SourceKey { ip: mask(ipv6, 64), listener: 3 });
    }
}
