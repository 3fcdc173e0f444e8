//! The splice engine: `inject` puts the PROXY header in front of the first payload, `verdict` forwards
//! the rest, and `peer_isn` records where a backend's stream begins.
#![no_std]
#![no_main]

#[path = "../object.rs"]
mod object;

mod inject;
mod maps;
mod peer_isn;
mod verdict;
