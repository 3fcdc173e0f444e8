//! What the inline engine's programs and the daemon agree on, and every decision about a segment, as pure functions.
//!
//! The client talks TCP to the backend; the header is put into the stream on the way. `first` is the sequence number of the
//! client's first byte. Towards the backend the header takes the place from `first` on, so everything that the client sends
//! is later by the header's length, and everything that the backend acknowledges is earlier by as much. All arithmetic is
//! modulo 2^32 (RFC 9293, section 3.4).
//!
//! Addresses are 16 bytes, IPv4 as `::ffff:a.b.c.d`; ports and numbers are in the host's byte order; `zeroed` values are
//! valid everywhere.

mod address;
mod counter;
mod decide;
mod entry;
mod event;
mod flow;
mod listener;
mod next_hop;
mod options;
mod segment;
mod sequence;
mod syn;
mod template;
#[cfg(test)]
mod tests;
mod usage;

pub use self::{
    address::{Address, HeaderAddresses, Key, Tuple},
    counter::Counter,
    decide::{
        ClientOwner, OnSyn, OnSynAck, ToBackend, ToClient, acknowledges, client_owner, on_syn, on_syn_ack,
        to_backend, to_client,
    },
    entry::{Entry, Phase, Pressure, Sweep, sweep},
    event::Event,
    flow::{Direction, DirectionStats, Flag, Flow},
    listener::{
        Backend, BackendTable, Listener, MAX_BACKENDS, PortRange, Timeouts, mix, port_hash, port_probe,
    },
    next_hop::NextHop,
    options::OptionRewriter,
    segment::{ACK, FIN, PSH, RST, SYN, Segment, URG, payload_len},
    sequence::SeqState,
    syn::Syn,
    template::Template,
    usage::{Settings, Usage},
};
use crate::proxy;

/// Bytes that a header can have: what every receiver takes, and small enough for any packet.
pub const HEADER_CAPACITY: usize = 232;

/// The smallest MTU of an IPv6 link (RFC 8200, section 5). IPv4 allows less, but such links are rare. A
/// packet that is lengthened on its way may become this long.
pub const IPV6_MIN_MTU: usize = 1280;

const _: () = assert!(HEADER_CAPACITY <= proxy::MAX_LEN && HEADER_CAPACITY.is_multiple_of(4));
