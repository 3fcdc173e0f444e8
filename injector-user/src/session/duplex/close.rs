//! Closes both sockets of a connection.

use std::{io, time::Duration};

use super::Duplex;
use crate::{
    net::socket::Endpoint,
    protocol::Rejection,
    telemetry::outcome::{Bytes, CloseReason},
};

/// How long a peer may take to acknowledge the last bytes that it was sent. Then a reset informs it
/// that its own last bytes were not delivered.
const LINGER_TIMEOUT: Duration = Duration::from_secs(30);

/// How a connection was closed.
#[derive(Debug)]
pub(in crate::session) struct CloseOutcome {
    pub(in crate::session) reason: CloseReason,
    pub(in crate::session) error: Option<io::Error>,
    pub(in crate::session) to_backend: Bytes,
    pub(in crate::session) to_client: Bytes,
    /// The client's socket, still open if the client can be rejected in its own protocol.
    pub(in crate::session) client: Option<(Endpoint, Rejection)>,
}

impl Duplex {
    /// Closes both sockets.
    pub(in crate::session) async fn close(
        mut self,
        reason: CloseReason,
        error: Option<io::Error>,
    ) -> CloseOutcome {
        self.update_counters();
        let (to_backend, to_client) = self.counted;
        let (client_truncated, backend_truncated) =
            (self.to_backend.is_truncated(), self.to_client.is_truncated());
        let left_unspoken = self.left_unspoken();
        let rejection = self.rejection(reason);
        let Self { client, backend, to_backend: up, to_client: down, .. } = self;
        // The directions must leave the kernel's maps before their sockets close.
        drop((up, down));
        if let Some(why) = rejection {
            backend.reset();
            let client = Some((client, why));
            return CloseOutcome { reason, error, to_backend, to_client, client };
        }
        match reason {
            // The client has every byte and the FIN: its socket closes without a reset. The backend
            // must not take a FIN for the end of what the client would have sent.
            CloseReason::ClientFin => backend.reset(),
            CloseReason::ClientClosed if left_unspoken => backend.reset(),
            // A peer whose last bytes were not delivered gets a reset, after the last bytes that it
            // was sent.
            _ if reason.clean() => {
                for (endpoint, truncated) in [(client, client_truncated), (backend, backend_truncated)] {
                    if truncated {
                        endpoint.wait_acked(LINGER_TIMEOUT).await;
                        endpoint.reset();
                    }
                }
            }
            // After a loss, or a possible one, neither side may take what it received for complete.
            // But each gets what there was: the last bytes may still be held back for the FIN.
            _ => {
                backend.push_and_reset();
                client.push_and_reset();
            }
        }
        CloseOutcome { reason, error, to_backend, to_client, client: None }
    }

    /// The message that the client gets before its connection is closed, where one may follow what
    /// it has got: in clear text, after a complete reply. `None`: no message.
    fn rejection(&self, reason: CloseReason) -> Option<Rejection> {
        let why = match reason {
            CloseReason::NoBanner => return Some(Rejection::BackendUnavailable),
            CloseReason::HeaderMisread => Rejection::BackendUnavailable,
            CloseReason::Aborted => Rejection::Stopping,
            CloseReason::EndedByOperator => Rejection::EndedByOperator,
            _ => return None,
        };
        (self.to_backend.is_text() && self.to_client.may_be_followed()).then_some(why)
    }

    /// Whether the backend has sent something that is not an answer to the header.
    pub(in crate::session) fn was_greeted(&self) -> bool {
        !self.to_client.has_read_nothing()
    }
}
