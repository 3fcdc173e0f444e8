//! The relay engine: forwards in user space, for machines without BPF and for connections that the
//! kernel engines refuse.

use std::{
    io::{self, IoSlice},
    sync::Arc,
};

use socket2::Socket;

use crate::{
    engine::{Engine, EnrolmentRefusal, SentHeader, SplicedDirection},
    net::{socket::Endpoint, syn::SynObserver},
};

/// The engine without BPF.
#[derive(Debug)]
pub struct Relay;

impl Engine for Relay {
    fn name(&self) -> &'static str {
        "relay"
    }

    fn inject(&self, backend: &Endpoint, header: &[u8], payload: &[u8]) -> io::Result<SentHeader> {
        let payload = inject(backend, header, payload)?;
        Ok(SentHeader { payload, fallback_reason: None })
    }

    fn observe_syn(&self, _: &Arc<Socket>) -> Option<Box<dyn SynObserver>> {
        None
    }

    fn enrol(
        &self,
        _: &Endpoint,
        _: &Endpoint,
        _: u64,
    ) -> Option<Result<Box<dyn SplicedDirection>, EnrolmentRefusal>> {
        None
    }
}

/// Sends `header` and behind it as much of `payload` as fits, on a socket that has sent nothing
/// yet. It is one call, because receivers reject a header in two segments. Returns how many bytes
/// of `payload` were sent.
///
/// # Errors
/// As sendmsg(2). `WriteZero` when only a part of the header was sent; the connection must be reset
/// then.
pub fn inject(backend: &Endpoint, header: &[u8], payload: &[u8]) -> io::Result<usize> {
    let sent = backend.try_write_all(&[IoSlice::new(header), IoSlice::new(payload)])?;
    sent.checked_sub(header.len()).ok_or_else(|| io::ErrorKind::WriteZero.into())
}
