//! A listener as the inline engine serves it.

use std::{net::IpAddr, sync::Arc};

use crate::{backend::Backends, config::Listener, kubernetes::Followed};

/// A listener of the inline engine, and which of its backends get new connections.
#[derive(Clone, Debug)]
pub struct ServedListener {
    /// As configured.
    pub listener: Listener,
    /// Its virtual addresses.
    pub virtual_addresses: Followed<IpAddr>,
    /// Its backends.
    pub backends: Arc<Backends>,
    /// New connections are not forwarded.
    pub draining: bool,
}
