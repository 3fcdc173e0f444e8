//! Number of segments per session: acknowledgements that can be piggybacked are not sent
//! separately.

use std::io::Write;
use std::time::Duration;

use anyhow::ensure;
use injector_testbed::sockets::segments_received;

use crate::Run;
use crate::close_semantics::send_with_fin;
use crate::testbed::{Ending, Testbed, accept_with_header, ending, finished};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("segments/client speaks first, backend responds and closes", request_and_response),
    ("segments/client speaks first, but late", late_request),
];

/// A delayed acknowledgement waits for data for 40 ms, that of the SYN for 200 ms: on a busy
/// machine not every session meets that.
const TRIES: usize = 20;

/// Segments received by the client when it has read everything, and by the backend when it has read
/// the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Segments {
    client: u32,
    backend: u32,
}

fn session(testbed: &Testbed, backend: &std::net::TcpListener, pause: Duration) -> anyhow::Result<Segments> {
    let mut client = testbed.client()?;
    std::thread::sleep(pause);
    client.write_all(b"hello")?;
    let (server, _, question) = accept_with_header(backend)?;
    ensure!(question == b"hello", "header and question came apart");
    let of_backend = segments_received(&server)?;
    send_with_fin(&server, b"testbed")?;
    ensure!(ending(&mut client)? == Ending::Fin(b"testbed".to_vec()), "not the answer and a FIN");
    Ok(Segments { client: segments_received(&client)?, backend: of_backend })
}

/// The client receives the SYN-ACK, and in one segment the response, the acknowledgement of its
/// request and the FIN. The backend receives the SYN, and in one segment the end of the handshake,
/// header and request. Without piggybacking the client receives two more and the backend one more.
fn request_and_response(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "submissions", "")?;
    let sessions: Result<Vec<_>, _> =
        (0..TRIES).map(|_| session(testbed, &backend, Duration::ZERO)).collect();
    let sessions = sessions?;
    let fewest = sessions.iter().min();
    ensure!(fewest == Some(&Segments { client: 2, backend: 2 }), "{sessions:?}");
    finished(&injector, TRIES)?;
    Ok(())
}

/// The backend's SYN-ACK is acknowledged if the client stays silent for too long; no data is lost.
fn late_request(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "submissions", "")?;
    let seen = session(testbed, &backend, Duration::from_millis(500))?;
    ensure!(seen.backend == 3, "{seen:?}");
    finished(&injector, 1)?;
    Ok(())
}
