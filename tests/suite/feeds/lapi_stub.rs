//! A LAPI of the test, which may answer anything.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use injector_testbed::netns::Netns;
use injector_testbed::sockets::patient;

/// Where it listens, on the edge.
pub(crate) const ADDRESS: &str = "127.0.0.1:8081";

/// Writes an answer; an error means that the client has gone.
pub(crate) type Answer = fn(&mut TcpStream) -> std::io::Result<()>;

/// It answers every request for all decisions with `good`, and those for changes with one answer after the other.
#[derive(Debug)]
pub(crate) struct Stub {
    ended: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    accepting: Option<thread::JoinHandle<()>>,
}

impl Stub {
    pub(crate) fn start(netns: &Netns, good: Answer, changes: &'static [Answer]) -> anyhow::Result<Self> {
        let address: SocketAddr = ADDRESS.parse()?;
        let listener = netns.listen(address)?;
        listener.set_nonblocking(true)?;
        let (ended, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stop, count) = (Arc::clone(&ended), Arc::clone(&answered));
        let accepting = thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let Ok((mut stream, _)) = listener.accept() else {
                    thread::sleep(Duration::from_millis(2));
                    continue;
                };
                let count = Arc::clone(&count);
                thread::spawn(move || -> anyhow::Result<()> {
                    stream.set_nonblocking(false)?;
                    patient(&stream)?;
                    let wants_all = read_request(&stream)?.contains("startup=true");
                    let answer = if wants_all {
                        good
                    } else {
                        let number = count.fetch_add(1, Ordering::Relaxed);
                        changes.get(number).copied().unwrap_or(nothing_new)
                    };
                    Ok(answer(&mut stream)?)
                });
            }
        });
        Ok(Self { ended, answered, accepting: Some(accepting) })
    }

    /// How many requests for changes there were.
    pub(crate) fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

/// Reads the head of a request and returns its first line.
fn read_request(stream: &TcpStream) -> anyhow::Result<String> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    Ok(first)
}

/// An answer with this status and body.
pub(crate) fn respond(stream: &mut TcpStream, status: &str, body: &str) -> std::io::Result<()> {
    let length = body.len();
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
}

fn nothing_new(stream: &mut TcpStream) -> std::io::Result<()> {
    respond(stream, "200 OK", r#"{"new":null,"deleted":null}"#)
}
