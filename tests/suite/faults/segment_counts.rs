//! How many segments a session takes: what can go along with something else is not sent by itself.

use std::io::Write;
use std::time::Duration;

use anyhow::ensure;
use injector_testbed::sockets::segments_received;

use crate::Run;
use crate::close_semantics::send_with_fin;
use crate::testbed::{Ending, Testbed, accept_with_header, ending, finished};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("segments/client speaks first, backend responds and closes", question_and_answer),
    ("segments/client speaks first, but late", late_question),
];

/// An acknowledgement waits for something to go along with for 40 ms, that of the SYN for 200: on a busy machine not every session
/// has it in time.
const TRIES: usize = 20;

/// What the client has received when it has read all, and what the backend has when it has read the question.
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

/// The client gets the answer to its SYN, and in one segment the answer to its question, the acknowledgement of that and the FIN.
/// The backend gets the SYN, and in one segment the end of the handshake, header and question. Where nothing is spared they get
/// two more and one more.
fn question_and_answer(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
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

/// The backend's SYN is acknowledged when the client keeps silent for too long; nothing is lost by that.
fn late_question(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "submissions", "")?;
    let seen = session(testbed, &backend, Duration::from_millis(500))?;
    ensure!(seen.backend == 3, "{seen:?}");
    finished(&injector, 1)?;
    Ok(())
}
