//! The route through the edge, without a proxy: the cost of the namespaces and the load generator
//! alone.

use injector_load::service::PortKind;

use super::{Address, DIRECT, RunningSystem, System};

struct NoProcess;

impl RunningSystem for NoProcess {}

pub(super) fn system() -> System {
    System {
        name: DIRECT.to_owned(),
        about: "the edge only forwards between the networks".to_owned(),
        port_kind: PortKind::Bare,
        config: String::new(),
        baseline: None,
        bans_attacker_at: None,
        address: Address::Mail,
        start: Box::new(|_| Ok(Box::new(NoProcess))),
    }
}
