//! [`Splice`] as an [`Engine`]: maps the calls of a session to the programs and their maps.

use std::{io, sync::Arc};

use aya::maps::MapError;
use injector_common::splice::Flow;
use socket2::Socket;

use super::{
    Splice,
    inject::InjectError,
    peer_isn,
    verdict::{self, map_update_reason},
};
use crate::{
    engine::{
        Backlog, BacklogNotify, Engine, EnrolmentRefusal, ResumeOutcome, SentHeader, SplicedDirection, relay,
    },
    net::{socket::Endpoint, syn::SynObserver},
};

impl Engine for Arc<Splice> {
    fn name(&self) -> &'static str {
        "splice"
    }

    fn inject(&self, backend: &Endpoint, header: &[u8], payload: &[u8]) -> io::Result<SentHeader> {
        match Splice::inject(self, backend, header, payload) {
            Ok(payload) => Ok(SentHeader { payload, fallback_reason: None }),
            // Nothing was sent: user space can still send the header in one piece.
            Err(InjectError::Refused(error)) => {
                let reason = match &error {
                    MapError::SyscallError(error) => map_update_reason(&error.io_error),
                    _ => "other",
                };
                let payload = relay::inject(backend, header, payload)?;
                Ok(SentHeader { payload, fallback_reason: Some(reason) })
            }
            Err(InjectError::Dropped(error)) => Err(error),
            Err(error @ InjectError::Unconfirmed) => Err(io::Error::other(error)),
        }
    }

    fn observe_syn(&self, socket: &Arc<Socket>) -> Option<Box<dyn SynObserver>> {
        // Without the observer the backend's direction stays relayed, and is counted as such.
        peer_isn::PeerIsnFilter::new(self, socket).ok().map(|filter| Box::new(filter) as Box<dyn SynObserver>)
    }

    fn enrol(
        &self,
        source: &Endpoint,
        target: &Endpoint,
        read: u64,
    ) -> Option<Result<Box<dyn SplicedDirection>, EnrolmentRefusal>> {
        Some(match verdict::EnrolledFlow::enrol(self, source, target, read) {
            Ok(spliced) => Ok(Box::new(spliced)),
            Err(error) => Err(refusal(error)),
        })
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn refusal(error: verdict::EnrolError) -> EnrolmentRefusal {
    EnrolmentRefusal { reason: error.reason(), detail: error.to_string() }
}

impl SplicedDirection for verdict::EnrolledFlow {
    fn flow(&self) -> io::Result<Flow> {
        self.flow().map_err(io::Error::other)
    }

    fn backlog_notify(&self) -> &BacklogNotify {
        self.backlog_notify()
    }

    fn backlog(&self, target: &Endpoint) -> io::Result<Backlog> {
        self.backlog(target)
    }

    fn grant(&self, source: &Endpoint, target: &Endpoint, queued: u64) -> io::Result<()> {
        self.grant(source, target, queued)
    }

    fn pause(&self, source: &Endpoint) -> io::Result<()> {
        self.pause(source)
    }

    fn propose_resume(&self, written: u64) -> io::Result<bool> {
        self.propose_resume(written)
    }

    fn cancel_resume(&self, source: &Endpoint, target: &Endpoint) -> io::Result<ResumeOutcome> {
        self.cancel_resume(source, target)
    }

    fn delivered(&self, source: &Endpoint, target: &Endpoint, read: u64) -> io::Result<bool> {
        self.delivered(source, target, read)
    }
}
