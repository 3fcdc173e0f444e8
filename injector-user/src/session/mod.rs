//! The life of one connection, from its accept to its line in the access log. Start here:
//!
//! ```text
//! listener:  accept → admit ──┐        or reject (limit, drain, shutdown)
//!                             ▼
//! session:   establish:  connect a backend → read the preamble → send the header
//!                             │                         (if the client speaks first)
//!                             ▼
//!            forward:    Duplex = two HalfDuplex: relayed ⇄ spliced, half-closed
//!                             │
//!                             ▼
//!            close:      FIN or RST on both sides, counters, access log
//! ```
//!
//! `serve` is the way through; the functions below it stand in this order. From the header on,
//! `duplex` forwards both directions. Each direction is a `half_duplex`, which carries out the
//! decisions of `direction` (what to do next, when to send the FIN), `enrolment` (when to move to the
//! kernel) and `backlog` (when to pause). Engines differ only in how bytes move ([`crate::engine`]).

mod backlog;
mod backoff;
mod context;
mod dialogue;
mod direction;
mod duplex;
mod enrolment;
mod fin_wait;
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
use self::{
    duplex::Duplex,
    registry::{Registration, SessionHandle},
};
use crate::{
    backend::{self, BackendConnection, Unreachable},
    config::{HeaderMethod, UNIQUE_ID_LEN},
    engine::{Engine, SentHeader, relay::Relay},
    header::EncodedHeader,
    net::socket::Endpoint,
    protocol::{FirstSpeaker, Protocol, Rejection},
    telemetry::{
        log::target,
        outcome::{AccessLogEntry, Bytes, CloseReason},
    },
};

/// Serves an admitted connection to its end and logs it. Holds `permits` until then.
///
/// A connection is forwarded for most of its life, so its task has room for that alone. The state
/// of the other phases is on the heap while they last: it would be most of the memory of an idle
/// connection.
pub fn serve(
    context: Arc<Context>,
    client: Socket,
    peer: SocketAddr,
    permits: impl Send,
) -> impl Future<Output = ()> + Send {
    let establish = Box::pin(establish(context, client, peer));
    async move {
        if let Some(mut established) = establish.await {
            let (reason, error) = established.duplex.run().await;
            Box::pin(close(established, reason, error)).await;
        }
        drop(permits);
    }
}

/// A connection whose backend is connected and has been sent the header.
struct Established {
    info: ConnectionInfo,
    duplex: Duplex,
}

/// The facts about a connection, for its line in the access log.
struct ConnectionInfo {
    registration: Registration,
    /// The connection's unique id in the header, if the receiver is configured for it.
    unique_id: Option<Box<[u8; UNIQUE_ID_LEN]>>,
    /// Counts as a session of the backend while it is held.
    backend: Option<backend::SessionGuard>,
}

/// Connects a backend and sends the header. `None` if the connection has ended and was logged.
async fn establish(context: Arc<Context>, client: Socket, peer: SocketAddr) -> Option<Box<Established>> {
    let log_early_close = |error: io::Error| {
        tracing::debug!(
            target: target::SESSION,
            listener = &*context.listener,
            %error,
            "client closed before the session started"
        );
    };
    let client = Endpoint::accepted(client).map_err(log_early_close).ok()?;
    let local = client.local().map_err(log_early_close).ok()?;
    let unique_id = context.receiver.unique_id.then(|| Box::new(unique_id(context.run_id, client.cookie())));
    let registration = context.sessions.register(&context.listener, context.engine.name(), peer, local);
    let mut info = ConnectionInfo { registration, unique_id, backend: None };
    match connect_and_send_header(&context, client, &mut info).await {
        Ok(duplex) => Some(Box::new(Established { info, duplex })),
        Err((reason, error)) => {
            info.log_close(&context, reason, (Bytes::default(), Bytes::default()), error);
            None
        }
    }
}

async fn connect_and_send_header(
    context: &Arc<Context>,
    client: Endpoint,
    info: &mut ConnectionInfo,
) -> Result<Duplex, (CloseReason, Option<String>)> {
    // Connect a backend.
    let session_handle = info.registration.handle();
    let observe = |socket: &Arc<Socket>| context.engine.observe_syn(socket);
    let peer = info.registration.client().ip();
    let connecting = context.backends.connect(peer, context.timeouts.connect, &observe);
    let connected = tokio::select! {
        connected = connecting => connected,
        _ = client.closed() => return Err((CloseReason::ClientReset, None)),
        () = context.abort.cancelled() => {
            reject(client, context.protocol, Rejection::Stopping).await;
            return Err((CloseReason::Aborted, None));
        }
        () = session_handle.ended() => {
            reject(client, context.protocol, Rejection::EndedByOperator).await;
            return Err((CloseReason::EndedByOperator, None));
        }
    };
    let BackendConnection { endpoint: backend, address, session } = match connected {
        Ok(reached) => reached,
        Err(error) => {
            let why = match error {
                Unreachable::Full(_) => Rejection::TooManyConnections,
                _ => Rejection::BackendUnavailable,
            };
            reject(client, context.protocol, why).await;
            return Err((connect_failure(&error), Some(error.to_string())));
        }
    };
    info.registration.set_backend(address);
    info.backend = Some(session);

    // Send the header, with the client's first bytes where the client speaks first.
    let preamble = match read_preamble(context, &session_handle, &client, &backend).await {
        Ok(preamble) => preamble,
        Err((reason, error)) => {
            if reason != CloseReason::ClientClosed {
                client.reset();
                backend.reset();
            }
            return Err((reason, error.map(|error| error.to_string())));
        }
    };
    let sent = match send_header(context, info, &backend, &preamble) {
        Ok(sent) => sent,
        Err(error) => {
            context.metrics.header_failed();
            backend.reset();
            client.reset();
            return Err((CloseReason::HeaderFailed, Some(error.to_string())));
        }
    };
    context.metrics.header_sent();
    if let Some(reason) = sent.fallback_reason {
        context.metrics.enrolment_failed(reason);
    }
    let read = preamble.payload.len() as u64;
    let mut pending = preamble.payload;
    pending.advance(sent.payload);
    Ok(Duplex::new(
        Arc::clone(context),
        session_handle,
        client,
        backend,
        read,
        pending,
        preamble.awaiting_check,
    ))
}

/// Closes both sockets and logs the connection.
async fn close(established: Box<Established>, reason: CloseReason, error: Option<io::Error>) {
    let Established { info, duplex } = *established;
    let context = duplex.context();
    if let Some(address) = info.registration.backend() {
        match (reason, &error) {
            (CloseReason::HeaderMisread, Some(error)) => {
                context.backends.note_misread(address, &error.to_string());
            }
            _ if duplex.was_greeted() => context.backends.note_greeted(address),
            _ => {}
        }
    }
    let outcome = duplex.close(reason, error).await;
    if let Some((client, why)) = outcome.client {
        reject(client, context.protocol, why).await;
    }
    let reason = outcome.reason.refine(outcome.error.as_ref());
    let error = outcome.error.map(|error| error.to_string());
    info.log_close(&context, reason, (outcome.to_backend, outcome.to_client), error);
}

impl ConnectionInfo {
    fn log_close(
        self,
        context: &Context,
        reason: CloseReason,
        (to_backend, to_client): (Bytes, Bytes),
        error: Option<String>,
    ) {
        let entry = AccessLogEntry {
            client: self.registration.client(),
            local: self.registration.local(),
            listener: Arc::clone(&context.listener),
            backend: self.registration.backend(),
            engine: context.engine.name(),
            to_backend,
            to_client,
            duration: self.registration.age(),
            unique_id: self.unique_id.map(|id| String::from_utf8_lossy(&*id).into_owned()),
            reason,
            error,
        };
        context.metrics.closed(entry.reason);
        entry.log();
    }
}

/// What the client sent before the header.
#[derive(Debug, Default)]
struct ClientPreamble {
    payload: BytesMut,
    /// Whether the bytes may still turn out to be a forged PROXY header.
    awaiting_check: bool,
}

/// If the client speaks first, waits for its first bytes, so that header and payload are sent
/// together. If they do not arrive in time, the header is sent alone.
async fn read_preamble(
    context: &Context,
    session: &SessionHandle,
    client: &Endpoint,
    backend: &Endpoint,
) -> Result<ClientPreamble, (CloseReason, Option<io::Error>)> {
    let mut preamble = ClientPreamble { payload: BytesMut::new(), awaiting_check: true };
    if context.protocol.speaks_first() == FirstSpeaker::Server || context.timeouts.header_wait.is_zero() {
        return Ok(preamble);
    }
    let deadline = Instant::now() + context.timeouts.header_wait;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let payload = &mut preamble.payload;
        let read = tokio::select! {
            read = timeout(left, client.read(|bytes| { payload.extend_from_slice(bytes); bytes.len() })) => read,
            error = backend.closed() => return Err((CloseReason::NoBanner, error)),
            () = context.abort.cancelled() => return Err((CloseReason::Aborted, None)),
            () = session.ended() => return Err((CloseReason::EndedByOperator, None)),
        };
        match read {
            Err(_elapsed) => return Ok(preamble),
            // A client that has sent nothing is of no use to the backend: it gets no header either.
            Ok(Ok(0)) if preamble.payload.is_empty() => return Err((CloseReason::ClientClosed, None)),
            // The FIN stays readable: the duplex reads it again.
            Ok(Ok(0)) => return Ok(preamble),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err((CloseReason::ClientReset, Some(error))),
        }
        match forgery(&preamble.payload) {
            Forgery::Yes => return Err((CloseReason::Forged, None)),
            Forgery::Undecided => {}
            Forgery::No => {
                preamble.awaiting_check = false;
                return Ok(preamble);
            }
        }
    }
}

/// Renders the header and makes the engine send it. The client's first bytes go along if their
/// check has passed.
fn send_header(
    context: &Context,
    info: &ConnectionInfo,
    backend: &Endpoint,
    preamble: &ClientPreamble,
) -> io::Result<SentHeader> {
    let id = info.unique_id.as_deref().copied().unwrap_or_default();
    let header =
        EncodedHeader::new(&context.receiver, info.registration.client(), info.registration.local(), &id)
            .map_err(io::Error::other)?;
    let payload = if preamble.awaiting_check { &[] } else { &preamble.payload[..] };
    let engine: &dyn Engine = match context.header {
        HeaderMethod::Program => &*context.engine,
        HeaderMethod::Send => &Relay,
    };
    engine.inject(backend, header.as_bytes(), payload)
}

/// 32 hexadecimal digits: the daemon's run and the cookie of the client's socket.
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

/// Rejects a client: with a line of its protocol where the server speaks first in clear text, else
/// with a reset.
pub async fn reject(client: Endpoint, protocol: Protocol, why: Rejection) {
    /// Enough for a distant client to read the line and close.
    const REJECT_TIMEOUT: Duration = Duration::from_secs(2);

    let Some(line) = protocol.rejection_line(why) else { return client.reset() };
    if client.try_write(line).is_err() || client.finish().is_err() {
        return client.reset();
    }
    // Closing a socket with unread bytes sends a reset, which can overtake the line.
    let drained = async { while client.read(<[u8]>::len).await.is_ok_and(|count| count > 0) {} };
    let _ = timeout(REJECT_TIMEOUT, drained).await;
}

fn connect_failure(error: &Unreachable) -> CloseReason {
    match error {
        Unreachable::Unresolved => CloseReason::BackendUnresolved,
        Unreachable::Refused { .. } => CloseReason::BackendRefused,
        Unreachable::Timeout { .. } => CloseReason::ConnectTimeout,
        Unreachable::NoSourcePorts { .. } => CloseReason::NoSourcePorts,
        Unreachable::Full(_) => CloseReason::BackendFull,
        // No file descriptor was left for the socket: that is not the backend's failure.
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
