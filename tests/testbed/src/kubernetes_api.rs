//! An API server of Kubernetes that knows the slices of one Service, and may go away.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::{netns::Netns, sockets::patient};

/// Where it listens, on the edge.
const ADDRESS: &str = "127.0.0.1:8082";

/// How long it sleeps between two looks at what has changed.
const TICK: Duration = Duration::from_millis(5);

/// The API server.
#[derive(Debug)]
pub struct ApiStub {
    model: Arc<Mutex<Model>>,
    /// Ends the connections of the time in which it is up.
    down: Arc<AtomicBool>,
    accepting: Option<thread::JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Model {
    slices: BTreeMap<String, Value>,
    /// Every change. The version of the API's objects is how many there were.
    events: Vec<Value>,
}

impl ApiStub {
    /// Starts it in a namespace.
    ///
    /// # Errors
    /// When its port is taken.
    pub fn start(netns: &Netns) -> anyhow::Result<Self> {
        let mut stub = Self { model: Arc::default(), down: Arc::default(), accepting: None };
        stub.up(netns)?;
        Ok(stub)
    }

    /// A kubeconfig for it.
    #[must_use]
    pub fn kubeconfig() -> String {
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "stub",
            "contexts": [{ "name": "stub", "context": { "cluster": "stub", "user": "injector" } }],
            "clusters": [{ "name": "stub", "cluster": { "server": format!("http://{ADDRESS}") } }],
            "users": [{ "name": "injector", "user": { "token": "a token" } }],
        })
        .to_string()
    }

    /// Adds a slice with one endpoint, whose port is called `smtp`.
    pub fn add(&self, name: &str, endpoint: SocketAddr, ready: bool) {
        let slice = json!({
            "metadata": { "name": name },
            "addressType": "IPv4",
            "endpoints": [{ "addresses": [endpoint.ip()], "conditions": { "ready": ready } }],
            "ports": [{ "name": "smtp", "port": endpoint.port(), "protocol": "TCP" }],
        });
        let mut model = lock(&self.model);
        let slice = model.change("ADDED", slice);
        model.slices.insert(name.to_owned(), slice);
    }

    /// Removes a slice.
    pub fn remove(&self, name: &str) {
        let mut model = lock(&self.model);
        if let Some(slice) = model.slices.remove(name) {
            model.change("DELETED", slice);
        }
    }

    /// Listens.
    ///
    /// # Errors
    /// When its port is taken.
    pub fn up(&mut self, netns: &Netns) -> anyhow::Result<()> {
        let listener = netns.listen(ADDRESS.parse()?)?;
        listener.set_nonblocking(true)?;
        self.down = Arc::default();
        let (model, down) = (Arc::clone(&self.model), Arc::clone(&self.down));
        self.accepting = Some(thread::spawn(move || accept(&listener, &model, &down)));
        Ok(())
    }

    /// Closes its port and all connections.
    pub fn go_down(&mut self) {
        self.down.store(true, Ordering::Relaxed);
        if let Some(accepting) = self.accepting.take() {
            // A panic of the thread has been printed.
            let _ = accepting.join();
        }
    }
}

impl Drop for ApiStub {
    fn drop(&mut self) {
        self.go_down();
    }
}

impl Model {
    /// Gives the object its new version.
    fn change(&mut self, kind: &str, mut object: Value) -> Value {
        object["metadata"]["resourceVersion"] = json!((self.events.len() + 1).to_string());
        self.events.push(json!({ "type": kind, "object": object }));
        object
    }

    fn list(&self) -> String {
        let items: Vec<_> = self.slices.values().collect();
        json!({ "metadata": { "resourceVersion": self.events.len().to_string() }, "items": items })
            .to_string()
    }
}

fn accept(listener: &TcpListener, model: &Mutex<Model>, down: &AtomicBool) {
    thread::scope(|scope| {
        while !down.load(Ordering::Relaxed) {
            match listener.accept() {
                // An error means that the client has gone.
                Ok((stream, _)) => drop(scope.spawn(move || serve(stream, model, down))),
                Err(_) => thread::sleep(TICK),
            }
        }
    });
}

/// Serves one request.
fn serve(mut stream: TcpStream, model: &Mutex<Model>, down: &AtomicBool) -> anyhow::Result<()> {
    stream.set_nonblocking(false)?;
    patient(&stream)?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    // Its end is the end of the answer.
    stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")?;
    let target = request.split(' ').nth(1).unwrap_or_default();
    let parameter = |name: &str| {
        target
            .split(['?', '&'])
            .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
            .unwrap_or_default()
    };
    if parameter("watch") != "true" {
        let list = lock(model).list();
        return Ok(stream.write_all(list.as_bytes())?);
    }
    let mut seen: usize = parameter("resourceVersion").parse()?;
    while !down.load(Ordering::Relaxed) {
        let new = lock(model).events.get(seen..).unwrap_or_default().to_vec();
        for event in &new {
            stream.write_all(format!("{event}\n").as_bytes())?;
        }
        seen += new.len();
        thread::sleep(TICK);
    }
    Ok(())
}

fn lock(model: &Mutex<Model>) -> MutexGuard<'_, Model> {
    model.lock().unwrap_or_else(PoisonError::into_inner)
}
