//! Records a backend's initial sequence number: the program `peer_isn` on a connecting socket.

use std::{io, os::fd::AsFd as _, sync::Arc};

use socket2::Socket;

use super::Splice;
use crate::{net::syn::SynObserver, os::sockopt};

/// The program on a socket. Dropping it detaches the program.
#[derive(Debug)]
pub(crate) struct PeerIsnFilter {
    splice: Arc<Splice>,
    socket: Arc<Socket>,
    cookie: u64,
}

impl PeerIsnFilter {
    /// Attaches the program to `socket`, which has not begun to connect.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub(crate) fn new(splice: &Arc<Splice>, socket: &Arc<Socket>) -> io::Result<Self> {
        let cookie = socket.cookie()?;
        sockopt::attach_filter(socket, splice.peer_isn.as_fd())?;
        Ok(Self { splice: Arc::clone(splice), socket: Arc::clone(socket), cookie })
    }
}

impl SynObserver for PeerIsnFilter {
    fn peer_isn(&self) -> Option<u32> {
        self.splice.maps.peer_isn(self.cookie)
    }
}

impl Drop for PeerIsnFilter {
    fn drop(&mut self) {
        // `SO_DETACH_FILTER` detaches BPF programs too. It does not fail on an open socket.
        let _ = self.socket.detach_filter();
    }
}
