//! What the splice engine's programs and the daemon agree on: the values in the maps, and the counters.
//!
//! The maps themselves are listed in `docs/architecture.md`. Everything is in the host's byte order and laid out
//! as C would; `zeroed` values are valid everywhere.

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
