//! An HTTP server instead of a Pushgateway, which records requests. `cargo xtask observe` uses a
//! real one.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use injector_testbed::netns::Netns;

/// A recorded request.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) line: String,
    pub(crate) body: String,
}

/// The server, at a port of the namespace's loopback; stopped on drop.
pub(crate) struct Gateway {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Gateway {
    /// Responds to everything with this status and text.
    pub(crate) fn start(netns: &Netns, status: u16, text: &'static str) -> anyhow::Result<Self> {
        let listener = netns.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))??;
        let address = listener.local_addr()?;
        let (requests, stop) = (Arc::<Mutex<Vec<Request>>>::default(), Arc::<AtomicBool>::default());
        let (kept, stopped) = (Arc::clone(&requests), Arc::clone(&stop));
        listener.set_nonblocking(true)?;
        let serve = move || {
            while !stopped.load(Ordering::Relaxed) {
                let Ok((stream, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                };
                if let Ok(request) = answer(stream, status, text) {
                    kept.lock().unwrap_or_else(PoisonError::into_inner).push(request);
                }
            }
        };
        Ok(Self { address, requests, stop, thread: Some(std::thread::spawn(serve)) })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer(mut stream: TcpStream, status: u16, text: &str) -> anyhow::Result<Request> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    let request = loop {
        let read = stream.read(&mut buffer)?;
        anyhow::ensure!(read > 0, "it ended early");
        bytes.extend_from_slice(buffer.get(..read).unwrap_or_default());
        if let Some(request) = parse(&String::from_utf8_lossy(&bytes)) {
            break request;
        }
    };
    let length = text.len();
    write!(stream, "HTTP/1.1 {status} So\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}")
        .context("no answer")?;
    Ok(request)
}

/// A request whose body is complete.
fn parse(text: &str) -> Option<Request> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let field = |line: &str| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    };
    let length = head.lines().find_map(field)?;
    (body.len() >= length)
        .then(|| Request { line: head.lines().next().unwrap_or_default().to_owned(), body: body.to_owned() })
}
