//! The relay engine: everything in user space, for machines where BPF is not to be had, and for what the kernel
//! engines refuse.

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

/// Sends `header` and behind it what fits of `payload` by one call, on a socket that has sent nothing yet: receivers
/// refuse a header in two segments. Returns how many bytes of `payload` went along.
///
/// # Errors
/// As sendmsg(2); `WriteZero` when the header did not go out whole, after which the connection must be reset.
pub fn inject(backend: &Endpoint, header: &[u8], payload: &[u8]) -> io::Result<usize> {
    let sent = backend.try_write_all(&[IoSlice::new(header), IoSlice::new(payload)])?;
    sent.checked_sub(header.len()).ok_or_else(|| io::ErrorKind::WriteZero.into())
}
