//! The fuzz target without its fuzzer: the seeds, and a fixed series of mutations of them.

use std::{fs, path::Path};

use proptest::prelude::Rng as _;
use proptest::test_runner::{RngAlgorithm, TestRng};

use crate::invariants::check;

/// Mutations of each seed; Miri interprets each instruction, so it gets few.
const MUTATIONS: usize = if cfg!(miri) { 4 } else { 20_000 };

fn seeds() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/parse");
    let mut paths: Vec<_> = folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| fs::read(path).unwrap()).collect()
}

#[test]
fn the_invariants_hold_for_every_seed() {
    for seed in seeds() {
        check(&seed);
    }
}

#[test]
fn the_invariants_hold_for_mutated_seeds() {
    // The same inputs in every run.
    let mut random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut below = |limit: usize| usize::try_from(random.next_u32()).unwrap() % limit;
    let seeds = seeds();
    for seed in &seeds {
        for _ in 0..MUTATIONS {
            let mut input = seed.clone();
            for _ in 0..=below(4) {
                let at = below(input.len());
                match below(4) {
                    0 => input[at] ^= 1 << below(8),
                    1 => input[at] = u8::try_from(below(256)).unwrap(),
                    2 => input.truncate(at + 1),
                    _ => {
                        let other = &seeds[below(seeds.len())];
                        input.truncate(at + 1);
                        input.extend_from_slice(&other[below(other.len())..]);
                    }
                }
            }
            check(&input);
        }
    }
}
