//! Where a backend's stream begins: the program `anchor` on its socket while that connects.

use std::{io, os::fd::AsFd as _, sync::Arc};

use socket2::Socket;

use super::Splice;
use crate::{engine, sys};

/// The program on a socket; dropping it takes it off.
#[derive(Debug)]
pub(crate) struct Anchor {
    splice: Arc<Splice>,
    socket: Arc<Socket>,
    cookie: u64,
}

impl Anchor {
    /// Puts the program on `socket`, which has not begun to connect.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub(crate) fn new(splice: &Arc<Splice>, socket: &Arc<Socket>) -> io::Result<Self> {
        let cookie = socket.cookie()?;
        sys::attach_filter(socket, splice.anchor.as_fd())?;
        Ok(Self { splice: Arc::clone(splice), socket: Arc::clone(socket), cookie })
    }
}

impl engine::Anchor for Anchor {
    fn sequence(&self) -> Option<u32> {
        self.splice.maps.anchor(self.cookie)
    }
}

impl Drop for Anchor {
    fn drop(&mut self) {
        // `SO_DETACH_FILTER` detaches BPF programs too. It does not fail on an open socket.
        let _ = self.socket.detach_filter();
    }
}
