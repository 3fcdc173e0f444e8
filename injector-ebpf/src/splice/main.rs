//! The splice engine: `inject` puts the PROXY header in front of the first payload, `verdict` carries the rest, and `anchor`
//! tells it where a stream begins.
#![no_std]
#![no_main]

#[path = "../object.rs"]
mod object;

mod inject;
mod maps;
mod peer_isn;
mod verdict;
