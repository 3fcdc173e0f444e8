//! Sends the header ahead of the first bytes that the backend reads, with the program `inject`.

use std::io;

use aya::maps::MapError;
use injector_common::splice::Header;
use thiserror::Error;

use super::Splice;
use crate::{net::socket::Endpoint, os::sockopt};

/// The byte that is sent when there is no payload; the program replaces it by the header.
const DOORBELL: &[u8] = &[0];

/// Why `inject` did not send a header.
#[derive(Debug, Error)]
pub enum InjectError {
    /// Nothing was sent and the program did not run: user space may still send the header.
    #[error("the socket could not be added to the map for its header: {0}")]
    Refused(#[source] MapError),
    /// The program dropped the message, or the send failed. The connection is lost; the backend has
    /// read nothing.
    #[error("sending the header failed: {0}")]
    Dropped(#[source] io::Error),
    /// The kernel took the message but the program did not mark the header as sent: what the
    /// backend reads is not known.
    #[error("the BPF program did not confirm the header")]
    Unconfirmed,
}

impl Splice {
    /// Sends `header` and behind it as much of `payload` (which may be empty) as fits, on a socket
    /// that has sent nothing yet. Returns how many bytes of `payload` were sent.
    ///
    /// # Errors
    /// [`InjectError`]. After any but `Refused` the connection must be reset.
    pub fn inject(&self, backend: &Endpoint, header: &[u8], payload: &[u8]) -> Result<usize, InjectError> {
        let header_only = payload.is_empty();
        let header = Header::armed(header, header_only).ok_or_else(|| {
            InjectError::Dropped(io::Error::new(io::ErrorKind::InvalidInput, "impossible header length"))
        })?;
        self.maps.store_header(backend, &header).map_err(InjectError::Refused)?;
        self.maps.watch_first_message(backend.cookie(), backend).map_err(InjectError::Refused)?;
        let sent = self.send_through(backend, header.len.into(), payload);
        // The program runs on a socket until it has left all maps, so remove it before it is
        // spliced.
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
        // The program splits the message into pieces, which the kernel would send one by one
        // (tcp_bpf_push, net/ipv4/tcp_bpf.c). MSG_MORE holds back less than a segment until the
        // header is confirmed.
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

    /// Whether the header was sent ahead of the payload, which make `expected` bytes together. Only
    /// the header can make the send queue longer than what was written. If the peer has
    /// acknowledged a part already, the program's own mark decides, which is more expensive to
    /// read.
    fn header_confirmed(&self, backend: &Endpoint, expected: u64) -> bool {
        sockopt::unacknowledged(backend).is_ok_and(|queued| queued == expected)
            || self.maps.header(backend).is_ok_and(|header| header.state == Header::SENT)
    }
}
