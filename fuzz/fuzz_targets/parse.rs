//! The PROXY header parser on any bytes.

#![no_main]

mod invariants;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| invariants::check(input));
