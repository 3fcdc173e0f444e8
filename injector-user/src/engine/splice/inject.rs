//! Putting the header in front of the first bytes that the backend reads, by the program `inject`.

use std::io;

use aya::maps::MapError;
use injector_common::splice::Header;
use thiserror::Error;

use super::Splice;
use crate::{net::socket::Endpoint, os::sockopt};

/// The byte that carries a header alone; the program takes it out again.
const DOORBELL: &[u8] = &[0];

/// Why `inject` did not place a header.
#[derive(Debug, Error)]
pub enum InjectError {
    /// Nothing was sent and the program was not involved: the header may still go another way.
    #[error("the socket could not be added to the map for its header: {0}")]
    Refused(#[source] MapError),
    /// The program dropped the message, or the send failed. The connection is lost; the backend has read nothing.
    #[error("sending the header failed: {0}")]
    Dropped(#[source] io::Error),
    /// The kernel took the message but the program did not mark the header as sent: what the backend reads is not
    /// known.
    #[error("the BPF program did not confirm the header")]
    Unconfirmed,
}

impl Splice {
    /// Sends `header` and behind it what fits of `payload`, which may be empty, on a socket that has sent nothing
    /// yet. Returns how many bytes of `payload` went along.
    ///
    /// # Errors
    /// [`InjectError`]. All but `Refused` mean that the connection must be reset.
    pub fn inject(&self, backend: &Endpoint, header: &[u8], payload: &[u8]) -> Result<usize, InjectError> {
        let header_only = payload.is_empty();
        let header = Header::armed(header, header_only).ok_or_else(|| {
            InjectError::Dropped(io::Error::new(io::ErrorKind::InvalidInput, "impossible header length"))
        })?;
        self.maps.store_header(backend, &header).map_err(InjectError::Refused)?;
        self.maps.watch_first_message(backend.cookie(), backend).map_err(InjectError::Refused)?;
        let sent = self.send_through(backend, header.len.into(), payload);
        // The program stays on a socket until it has left all maps: out, before it is spliced.
        let left = self.maps.unwatch_first_message(backend.cookie());
        let sent = sent?;
        left.map_err(|_| InjectError::Unconfirmed)?;
        Ok(sent)
    }

    fn send_through(
        &self,
        backend: &Endpoint,
        header_len: u64,
        payload: &[u8],
    ) -> Result<usize, InjectError> {
        let header_only = payload.is_empty();
        // The program makes pieces of a message, which the kernel would send one by one (tcp_bpf_push, net/ipv4/tcp_bpf.c). And
        // what is less than a segment does not leave before it is known to begin with the header.
        let message = if header_only { DOORBELL } else { payload };
        let sent = backend.try_write_more(message).map_err(InjectError::Dropped)?;
        if sent == 0 {
            return Err(InjectError::Dropped(io::ErrorKind::WouldBlock.into()));
        }
        let sent = if header_only { 0 } else { sent };
        if !self.header_confirmed(backend, header_len + sent as u64) {
            return Err(InjectError::Unconfirmed);
        }
        backend.push().map_err(InjectError::Dropped)?;
        Ok(sent)
    }

    /// Whether the header is in front of what was sent, both together so many bytes. Nothing else makes the queue longer than
    /// what was written. Where some of it has left and is acknowledged, the program's own mark tells, which is dearer to read.
    fn header_confirmed(&self, backend: &Endpoint, expected: u64) -> bool {
        sockopt::unacknowledged(backend).is_ok_and(|queued| queued == expected)
            || self.maps.header(backend).is_ok_and(|header| header.state == Header::SENT)
    }
}
