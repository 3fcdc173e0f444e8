//! What the splice engine's programs and the daemon share: map values and counters.
//!
//! `docs/architecture.md` lists the maps. Values are in the host's byte order and have C's layout. A
//! zeroed value is valid.

mod backlog_event;
mod counter;
mod flow;
mod header;
mod peer_isn;

pub use self::{
    backlog_event::{BacklogEvent, FIRST_NOTIFY, next_notify},
    counter::Counter,
    flow::{Credit, Flow, Verdict, repeated},
    header::{HEADER_CAPACITY, Header},
    peer_isn::PeerIsn,
};
