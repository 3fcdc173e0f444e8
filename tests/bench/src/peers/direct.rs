//! The route through the edge, without anything on it: what the namespaces and the load generator take by themselves.

use injector_load::service::Door;

use super::{Address, DIRECT, Peer, Running};

struct Nothing;

impl Running for Nothing {}

pub(super) fn peer() -> Peer {
    Peer {
        name: DIRECT.to_owned(),
        about: "the edge forwards between the networks, no more".to_owned(),
        door: Door::Bare,
        config: String::new(),
        address: Address::Mail,
        start: Box::new(|_| Ok(Box::new(Nothing))),
    }
}
