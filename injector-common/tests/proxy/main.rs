//! The PROXY protocol by tables, by properties, and against two independent implementations.

// `cfg(test)` tells clippy that helpers in these modules are tests too.
#[cfg(test)]
mod addresses;
#[cfg(test)]
mod encoding;
#[cfg(test)]
mod forging;
#[cfg(test)]
#[path = "../../../fuzz/fuzz_targets/invariants.rs"]
mod invariants;
#[cfg(test)]
mod oracles;
#[cfg(test)]
mod parsing;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod replay;
#[cfg(test)]
mod samples;
