//! The life of one connection, from its accept to the line in the log:
//!
//! ```text
//! accepted → admitted → connecting → injecting → relaying ⇄ spliced → half-closed → closed
//! ```
//!
//! Accepting and admission are in [`crate::listener`]; what follows is here, in the order in which it happens. From the
//! header on, `pump` carries both directions, each a `lane` that decides by `direction`. The engines differ only
//! in how bytes move ([`crate::engine`]).

mod backlog;
mod backoff;
mod context;
mod direction;
mod duplex;
mod enrolment;
mod half_duplex;
#[cfg(test)]
mod model;
mod pending_write;
pub mod registry;
mod step;
mod timer;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Buf as _, BytesMut};
use injector_common::proxy::{Forgery, forgery};
use socket2::Socket;
use tokio::time::{Instant, timeout};

pub use self::context::Context;
use self::{duplex::Duplex, registry::Registration};
use crate::{
    backend::{self, Reached, Unreachable},
    config::{HeaderBy, UNIQUE_ID_LEN},
    engine::{Engine, SentHeader, relay::Relay},
    header::Rendered,
    net::socket::Endpoint,
    protocol::{Protocol, Refusal, Speaker},
    telemetry::{
        log::target,
        outcome::{AccessLogEntry, Bytes, CloseReason},
    },
};

/// Serves an admitted connection to its end, and reports it; `admitted` is held until then.
///
/// Most of its time a connection is carried, so that is all its task has room for. What the beginning and the end need besides
/// is on the heap for as long as they last; it would be most of the memory of an idle connection.
pub fn serve(
    context: Arc<Context>,
    client: Socket,
    peer: SocketAddr,
    admitted: impl Send,
) -> impl Future<Output = ()> + Send {
    let begin = Box::pin(begin(context, client, peer));
    async move {
        if let Some(mut begun) = begin.await {
            // relaying ⇄ spliced, half-closed
            let (reason, error) = begun.duplex.run().await;
            Box::pin(finish(begun, reason, error)).await;
        }
        drop(admitted);
    }
}

/// A connection that has reached its backend and sent it the header.
struct Begun {
    known: Known,
    duplex: Duplex,
}

/// What is known of a connection.
struct Known {
    entry: Registration,
    /// What the header calls it, where the receiver wants that.
    id: Option<Box<[u8; UNIQUE_ID_LEN]>>,
    /// Once a backend was reached.
    backend: Option<backend::Session>,
}

/// Up to the header; `None` if it has come to its end, and was reported.
async fn begin(context: Arc<Context>, client: Socket, peer: SocketAddr) -> Option<Box<Begun>> {
    let gone = |error: io::Error| tracing::debug!(target: target::SESSION, listener = &*context.listener, %error, "client closed before the session started");
    let client = Endpoint::accepted(client).map_err(gone).ok()?;
    let local = client.local().map_err(gone).ok()?;
    let id = context.receiver.unique_id.then(|| Box::new(unique_id(context.run_id, client.cookie())));
    let entry = context.sessions.register(&context.listener, context.engine.name(), peer, local);
    let mut known = Known { entry, id, backend: None };
    match reach(&context, client, &mut known).await {
        Ok(duplex) => Some(Box::new(Begun { known, duplex })),
        Err((reason, error)) => {
            known.report(&context, reason, (Bytes::default(), Bytes::default()), error);
            None
        }
    }
}

async fn reach(
    context: &Arc<Context>,
    client: Endpoint,
    known: &mut Known,
) -> Result<Duplex, (CloseReason, Option<String>)> {
    // connecting
    let observe = |socket: &Arc<Socket>| context.engine.observe_syn(socket);
    let connecting = context.backends.connect(context.timeouts.connect, &observe);
    let connected = tokio::select! {
        connected = connecting => connected,
        _ = client.closed() => return Err((CloseReason::ClientReset, None)),
        () = context.abort.cancelled() => {
            refuse(client, context.protocol, Refusal::Stopping).await;
            return Err((CloseReason::Aborted, None));
        }
    };
    let Reached { endpoint: backend, address, session } = match connected {
        Ok(reached) => reached,
        Err(error) => {
            refuse(client, context.protocol, Refusal::BackendUnavailable).await;
            return Err((unreachable(&error), Some(error.to_string())));
        }
    };
    known.entry.set_backend(address);
    known.backend = Some(session);

    // injecting
    let first = match first_payload(context, &client, &backend).await {
        Ok(first) => first,
        Err((reason, error)) => {
            if reason != CloseReason::ClientClosed {
                client.reset();
                backend.reset();
            }
            return Err((reason, error.map(|error| error.to_string())));
        }
    };
    let injected = match inject(context, known, &backend, &first) {
        Ok(injected) => injected,
        Err(error) => {
            context.metrics.header_failed();
            backend.reset();
            client.reset();
            return Err((CloseReason::HeaderFailed, Some(error.to_string())));
        }
    };
    context.metrics.header_sent();
    if let Some(reason) = injected.fallback_reason {
        context.metrics.enrolment_failed(reason);
    }
    let read = first.payload.len() as u64;
    let mut held = first.payload;
    held.advance(injected.payload);
    Ok(Duplex::new(
        Arc::clone(context),
        known.entry.handle(),
        client,
        backend,
        read,
        held,
        first.awaiting_check,
    ))
}

/// closed
async fn finish(begun: Box<Begun>, reason: CloseReason, error: Option<io::Error>) {
    let Begun { known, duplex } = *begun;
    let context = duplex.context();
    let outcome = duplex.finish(reason, error).await;
    if let Some(client) = outcome.client {
        refuse(client, context.protocol, Refusal::BackendUnavailable).await;
    }
    let reason = outcome.reason.refine(outcome.error.as_ref());
    let error = outcome.error.map(|error| error.to_string());
    known.report(&context, reason, (outcome.to_backend, outcome.to_client), error);
}

impl Known {
    fn report(
        self,
        context: &Context,
        reason: CloseReason,
        (to_backend, to_client): (Bytes, Bytes),
        error: Option<String>,
    ) {
        let report = AccessLogEntry {
            client: self.entry.client(),
            local: self.entry.local(),
            listener: Arc::clone(&context.listener),
            backend: self.entry.backend(),
            engine: context.engine.name(),
            to_backend,
            to_client,
            duration: self.entry.age(),
            unique_id: self.id.map(|id| String::from_utf8_lossy(&*id).into_owned()),
            reason,
            error,
        };
        context.metrics.closed(report.reason);
        report.log();
    }
}

/// What the client said before the header went out.
#[derive(Debug, Default)]
struct First {
    payload: BytesMut,
    /// Not yet known whether it forges a header.
    awaiting_check: bool,
}

/// Where the client speaks first, waits for its first bytes, so that header and payload leave together. A client that
/// says nothing in time gets a header alone.
async fn first_payload(
    context: &Context,
    client: &Endpoint,
    backend: &Endpoint,
) -> Result<First, (CloseReason, Option<io::Error>)> {
    let mut first = First { payload: BytesMut::new(), awaiting_check: true };
    if context.protocol.speaks_first() == Speaker::Server || context.timeouts.header_wait.is_zero() {
        return Ok(first);
    }
    let deadline = Instant::now() + context.timeouts.header_wait;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let payload = &mut first.payload;
        let read = tokio::select! {
            read = timeout(left, client.read(|bytes| { payload.extend_from_slice(bytes); bytes.len() })) => read,
            error = backend.closed() => return Err((CloseReason::NoBanner, error)),
            () = context.abort.cancelled() => return Err((CloseReason::Aborted, None)),
        };
        match read {
            Err(_elapsed) => return Ok(first),
            // Without a byte there is nothing to tell the backend, not even who it was.
            Ok(Ok(0)) if first.payload.is_empty() => return Err((CloseReason::ClientClosed, None)),
            // The FIN stays visible: the pump reads it again.
            Ok(Ok(0)) => return Ok(first),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err((CloseReason::ClientReset, Some(error))),
        }
        match forgery(&first.payload) {
            Forgery::Yes => return Err((CloseReason::Forged, None)),
            Forgery::Undecided => {}
            Forgery::No => {
                first.awaiting_check = false;
                return Ok(first);
            }
        }
    }
}

/// Renders the header and has the engine send it, with what the client has said where that may be passed on.
fn inject(context: &Context, known: &Known, backend: &Endpoint, first: &First) -> io::Result<SentHeader> {
    let id = known.id.as_deref().copied().unwrap_or_default();
    let header = Rendered::new(&context.receiver, known.entry.client(), known.entry.local(), &id)
        .map_err(io::Error::other)?;
    let payload = if first.awaiting_check { &[] } else { &first.payload[..] };
    let engine: &dyn Engine = match context.header {
        HeaderBy::Program => &*context.engine,
        HeaderBy::Send => &Relay,
    };
    engine.inject(backend, header.as_bytes(), payload)
}

/// 32 hexadecimal digits: the run, and the client's socket within it.
fn unique_id(run: u64, cookie: u64) -> [u8; UNIQUE_ID_LEN] {
    let digit = |shift: u32| {
        let (word, shift) = if shift < 16 { (run, shift) } else { (cookie, shift - 16) };
        char::from_digit((word >> (60 - 4 * shift) & 0xF) as u32, 16).map_or(b'0', |digit| digit as u8)
    };
    let mut id = [0; UNIQUE_ID_LEN];
    for (at, byte) in (0..).zip(&mut id) {
        *byte = digit(at);
    }
    id
}

/// Turns a client away: in its protocol's own words where the server speaks first in clear text, else by a reset.
pub async fn refuse(client: Endpoint, protocol: Protocol, why: Refusal) {
    /// Long enough for a client far away to take the line and close.
    const PATIENCE: Duration = Duration::from_secs(2);

    let Some(line) = protocol.refusal(why) else { return client.reset() };
    if client.try_write(line).is_err() || client.finish().is_err() {
        return client.reset();
    }
    // Closing with unread bytes would send a reset, which can overtake the line.
    let drained = async { while client.read(<[u8]>::len).await.is_ok_and(|count| count > 0) {} };
    let _ = timeout(PATIENCE, drained).await;
}

fn unreachable(error: &Unreachable) -> CloseReason {
    match error {
        Unreachable::Unresolved => CloseReason::BackendUnresolved,
        Unreachable::Refused { .. } => CloseReason::BackendRefused,
        Unreachable::Timeout { .. } => CloseReason::ConnectTimeout,
        // No descriptor for the socket to it: the backend is not to blame.
        Unreachable::Other { error, .. }
            if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) =>
        {
            CloseReason::Internal
        }
        Unreachable::Other { .. } | Unreachable::AllDisabled => CloseReason::BackendUnreachable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unique_id_is_the_run_and_the_socket_in_hexadecimal() {
        let id = unique_id(0x0123_4567_89ab_cdef, 0xfeed);
        assert_eq!(std::str::from_utf8(&id).unwrap(), "0123456789abcdef000000000000feed");
    }
}
