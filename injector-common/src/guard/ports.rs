//! A set of ports, which is asked about every packet.

/// How many words of 64 bits a set has (map `GUARDED_PORTS`).
pub const PORT_WORDS: usize = 1 << 10;

/// Where a set has a port: the index of a word, and its bit in the word.
#[must_use]
#[inline(always)]
pub const fn port_bit(port: u16) -> (u32, u64) {
    ((port >> 6) as u32, 1 << (port & 63))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_port_has_a_bit_of_its_own() {
        let mut words = [0_u64; PORT_WORDS];
        for (word, bit) in (0..=u16::MAX).map(port_bit) {
            let word = &mut words[word as usize];
            assert_eq!((bit.count_ones(), *word & bit), (1, 0));
            *word |= bit;
        }
        assert!(words.iter().all(|word| *word == u64::MAX));
    }
}
