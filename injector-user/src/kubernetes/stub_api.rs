//! An API server for tests: TLS, tokens, lists in parts, watches, and everything that can go wrong.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use rcgen::CertifiedKey;
use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader},
    net::TcpListener,
    sync::watch,
    task::JoinHandle,
    time::{Instant, timeout_at},
};
use tokio_rustls::TlsAcceptor;

use super::{Watcher, follower::Limits};
use crate::config::Kubernetes;

/// The API server, which ends with this value.
#[derive(Debug)]
pub(crate) struct StubApi {
    address: SocketAddr,
    /// The kubeconfig, and the files that it names.
    folder: TempDir,
    model: Arc<Mutex<Model>>,
    /// Sent at each change; the number says how often all connections were cut.
    changed: watch::Sender<u64>,
    listening: Option<JoinHandle<()>>,
}

/// What the server answers.
#[derive(Debug, Default)]
struct Model {
    /// The version of the last change.
    version: u64,
    objects: BTreeMap<String, Value>,
    history: Vec<(u64, Value)>,
    /// The oldest version from which a watch may begin.
    oldest: u64,
    token: String,
    /// The version of the API that is served.
    served: &'static str,
    /// How many objects a part of a list has.
    page: usize,
    /// What every request is answered with, as HTTP, if anything.
    answer: Option<String>,
    /// Watches neither say anything nor end.
    silent: bool,
    requests: Vec<String>,
}

/// Limits with which nothing takes long.
pub(super) const LIMITS: Limits = Limits {
    answer: Duration::from_secs(2),
    watch: Duration::from_secs(1),
    late: Duration::from_millis(300),
    retry: Duration::from_millis(20),
    pause: Duration::from_millis(10),
    bytes: 64 << 10,
    linger: Duration::from_millis(50),
};

impl StubApi {
    pub(crate) async fn start() -> Self {
        let model = Model { served: "v1", page: 100, token: "first".to_owned(), ..Model::default() };
        let mut api = Self {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            folder: tempfile::tempdir().unwrap(),
            model: Arc::new(Mutex::new(model)),
            changed: watch::Sender::new(0),
            listening: None,
        };
        api.up().await;
        let kubeconfig = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "stub",
            "contexts": [{ "name": "stub", "context": { "cluster": "stub", "user": "injector" } }],
            "clusters": [{ "name": "stub", "cluster": {
                "server": format!("https://{}", api.address),
                "certificate-authority": "ca.crt",
            } }],
            "users": [{ "name": "injector", "user": { "tokenFile": api.folder.path().join("token") } }],
        });
        // JSON is YAML.
        api.write("kubeconfig", &kubeconfig.to_string());
        api.write("token", "first");
        api
    }

    /// Settings with this server.
    pub(crate) fn settings(&self) -> Kubernetes {
        Kubernetes { kubeconfig: Some(self.folder.path().join("kubeconfig")), ..Kubernetes::default() }
    }

    pub(crate) fn watcher(&self) -> Watcher {
        Watcher::with_limits(self.settings(), LIMITS)
    }

    /// Makes or replaces an object.
    pub(crate) fn set(&self, name: &str, mut object: Value) {
        let mut model = self.model();
        model.version += 1;
        object["metadata"] = json!({ "name": name, "resourceVersion": model.version.to_string() });
        let kind = if model.objects.contains_key(name) { "MODIFIED" } else { "ADDED" };
        let event = (model.version, json!({ "type": kind, "object": object }));
        model.history.push(event);
        model.objects.insert(name.to_owned(), object);
        drop(model);
        self.changed.send_modify(|_| ());
    }

    pub(crate) fn delete(&self, name: &str) {
        let mut model = self.model();
        model.version += 1;
        let mut object = model.objects.remove(name).unwrap();
        object["metadata"]["resourceVersion"] = json!(model.version.to_string());
        let event = (model.version, json!({ "type": "DELETED", "object": object }));
        model.history.push(event);
        drop(model);
        self.changed.send_modify(|_| ());
    }

    /// Cuts all connections.
    pub(crate) fn cut(&self) {
        self.changed.send_modify(|cuts| *cuts += 1);
    }

    /// Forgets which changes there were, as etcd does after a while.
    pub(crate) fn compact(&self) {
        let mut model = self.model();
        // Also a version that a client has already.
        model.version += 1;
        model.oldest = model.version;
        model.history.clear();
    }

    pub(crate) fn serve_version(&self, version: &'static str) {
        self.model().served = version;
    }

    pub(crate) fn set_page(&self, objects: usize) {
        self.model().page = objects;
    }

    /// Answers every request so, until `None`.
    pub(crate) fn set_answer(&self, status: &str, body: Option<&str>) {
        let http = |body: &str| {
            format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
        };
        self.model().answer = body.map(http);
        self.cut();
    }

    pub(crate) fn set_silent(&self, silent: bool) {
        self.model().silent = silent;
    }

    /// Accepts this token only. `written`: whether it is in the client's file.
    pub(crate) fn rotate_token(&self, token: &str, written: bool) {
        token.clone_into(&mut self.model().token);
        if written {
            self.write("token", token);
        }
        self.cut();
    }

    /// Stops listening, and cuts all connections.
    pub(crate) async fn down(&mut self) {
        let Some(listening) = self.listening.take() else { return };
        listening.abort();
        let _ = listening.await;
        self.cut();
    }

    /// Listens, with another certificate, which is in the client's file.
    pub(crate) async fn up(&mut self) {
        let CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed([self.address.ip().to_string()]).unwrap();
        self.write("ca.crt", &cert.pem());
        let key = PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
        let config = ServerConfig::builder().with_no_client_auth();
        let config = config.with_single_cert(vec![cert.der().clone()], key).unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        let listener: TcpListener = socket.listen(64).unwrap();
        self.address = listener.local_addr().unwrap();
        let (model, changed) = (Arc::clone(&self.model), self.changed.clone());
        self.listening = Some(tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, model, changed) = (acceptor.clone(), Arc::clone(&model), changed.subscribe());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let mut connection = Connection { stream: BufReader::new(stream), model, changed };
                    // The client may have gone.
                    let _ = connection.serve().await;
                });
            }
        }));
    }

    /// How many lists, and how many watches, the server was asked for.
    pub(crate) fn requests(&self) -> (usize, usize) {
        let requests = &self.model().requests;
        let watches = requests.iter().filter(|request| request.contains("watch=true")).count();
        (requests.len() - watches, watches)
    }

    /// The targets of all requests.
    pub(crate) fn targets(&self) -> Vec<String> {
        self.model().requests.clone()
    }

    fn write(&self, name: &str, text: &str) {
        // As the kubelet does: never half a file.
        let new = self.folder.path().join("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.folder.path().join(name)).unwrap();
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap()
    }
}

impl Drop for StubApi {
    fn drop(&mut self) {
        if let Some(listening) = self.listening.take() {
            listening.abort();
        }
    }
}

/// A slice with an address and port 2525, called `smtp`.
pub(crate) fn slice(addresses: &[&str]) -> Value {
    json!({
        "addressType": "IPv4",
        "endpoints": addresses.iter().map(|it| json!({ "addresses": [it], "conditions": { "ready": true } }))
            .collect::<Vec<_>>(),
        "ports": [{ "name": "smtp", "port": 2525, "protocol": "TCP" }],
    })
}

struct Connection<S> {
    stream: BufReader<S>,
    model: Arc<Mutex<Model>>,
    changed: watch::Receiver<u64>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Serves one request.
    async fn serve(&mut self) -> std::io::Result<()> {
        let (mut target, mut token) = (String::new(), String::new());
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line).await?;
            match line.trim_end().split_once(' ') {
                Some(("GET", rest)) => target = rest.trim_end_matches(" HTTP/1.1").to_owned(),
                Some((name, value)) if name.eq_ignore_ascii_case("authorization:") => {
                    value.trim_start_matches("Bearer ").clone_into(&mut token);
                }
                Some(_) => {}
                None => break,
            }
        }
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let parameter = |name: &str| {
            query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default()
        };
        let answer = {
            let mut model = self.model.lock().unwrap();
            model.requests.push(target.clone());
            let version = path.split('/').find(|part| part.starts_with('v')).unwrap();
            if token != model.token {
                Some(refusal("401 Unauthorized", "Unauthorized"))
            } else if let Some(answer) = &model.answer {
                Some(answer.clone())
            } else if version != model.served {
                // Not JSON, as the real one.
                Some("HTTP/1.1 404 Not Found\r\nconnection: close\r\n\r\n404 page not found\n".to_owned())
            } else if parameter("watch") == "true" {
                None
            } else {
                Some(model.list(parameter("continue")))
            }
        };
        match answer {
            Some(answer) => self.stream.write_all(answer.as_bytes()).await?,
            None => {
                let seconds: u64 = parameter("timeoutSeconds").parse().unwrap();
                self.watch(parameter("resourceVersion").parse().unwrap(), Duration::from_secs(seconds))
                    .await?;
            }
        }
        self.stream.shutdown().await
    }

    async fn watch(&mut self, mut since: u64, within: Duration) -> std::io::Result<()> {
        let cuts = *self.changed.borrow_and_update();
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n";
        self.stream.write_all(head.as_bytes()).await?;
        self.stream.flush().await?;
        let end = Instant::now() + within;
        loop {
            let events: Vec<Value> = {
                let model = self.model.lock().unwrap();
                if since < model.oldest {
                    vec![
                        json!({ "type": "ERROR", "object": { "kind": "Status", "code": 410, "message": "too old" } }),
                    ]
                } else {
                    let new = model.history.iter().filter(|(version, _)| *version > since && !model.silent);
                    let events = new.map(|(_, event)| event.clone()).collect();
                    since = model.version;
                    events
                }
            };
            for event in events {
                let line = format!("{event}\n");
                // In two parts: a line need not come at once.
                for part in [&line[..9], &line[9..]] {
                    let chunk = format!("{:x}\r\n{part}\r\n", part.len());
                    self.stream.write_all(chunk.as_bytes()).await?;
                    self.stream.flush().await?;
                }
            }
            let silent = self.model.lock().unwrap().silent;
            let changed = self.changed.changed();
            match if silent { Ok(changed.await) } else { timeout_at(end, changed).await } {
                Ok(Ok(())) if *self.changed.borrow_and_update() == cuts => {}
                // Cut: no last chunk.
                Ok(_) => return Ok(()),
                Err(_elapsed) => return self.stream.write_all(b"0\r\n\r\n").await,
            }
        }
    }
}

impl Model {
    fn list(&self, from: &str) -> String {
        let from: usize = from.parse().unwrap_or(0);
        let items: Vec<_> = self.objects.values().skip(from).take(self.page).cloned().collect();
        let next = from + items.len();
        let rest = if next < self.objects.len() { next.to_string() } else { String::new() };
        let metadata = json!({ "resourceVersion": self.version.to_string(), "continue": rest });
        let body = json!({ "kind": "List", "metadata": metadata, "items": items }).to_string();
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
    }
}

fn refusal(status: &str, message: &str) -> String {
    let code: u16 = status[..3].parse().unwrap();
    let body =
        json!({ "kind": "Status", "status": "Failure", "message": message, "reason": "", "code": code });
    let body = body.to_string();
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
}
