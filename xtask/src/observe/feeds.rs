//! What the injector of the live run follows: a list of bans, Debian's CrowdSec, and an API of Kubernetes
//! that knows one Service.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use injector_testbed::{
    crowdsec::{CrowdSec, LAPI},
    netns::{MAIL, Netns},
    service::SMTP,
};
use serde_json::json;

/// A client that is banned by the list.
pub(super) const BANNED: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 66);

/// The Service that a listener's backend names.
pub(super) const SERVICE: &str = "mail/mailserver-proxy";

const API: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8001);

/// How long the API may need to notice its end, or a new client.
const POLL: Duration = Duration::from_millis(20);

/// They run until drop.
pub(super) struct Feeds {
    _crowdsec: CrowdSec,
    _api: Api,
}

impl Feeds {
    /// Starts them on the edge, and writes the files that [`tables`] names.
    pub(super) fn start(edge: &Netns, folder: &Path) -> Result<Self> {
        let crowdsec = CrowdSec::start(edge, None)?;
        fs::write(folder.join("crowdsec.key"), crowdsec.add_bouncer("injector")?)?;
        for decision in [
            &["--ip", "192.0.2.201", "--type", "ban"],
            &["--range", "192.0.2.208/28", "--type", "ban"],
            // Not a ban.
            &["--ip", "192.0.2.202", "--type", "throttle"],
        ] {
            crowdsec.cscli(&[&["decisions", "add", "--duration", "4h"][..], decision].concat())?;
        }
        fs::write(folder.join("deny.txt"), format!("{BANNED}\n203.0.113.0/24\n"))?;
        let kubeconfig = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "live",
            "contexts": [{ "name": "live", "context": { "cluster": "live", "user": "injector" } }],
            "clusters": [{ "name": "live", "cluster": { "server": format!("http://{API}") } }],
            "users": [{ "name": "injector", "user": { "token": "any" } }],
        });
        // JSON is YAML.
        fs::write(folder.join("kubeconfig"), kubeconfig.to_string())?;
        Ok(Self { _crowdsec: crowdsec, _api: Api::start(edge)? })
    }
}

/// The tables of the configuration that name them.
pub(super) fn tables(folder: &Path, pin: &Path) -> String {
    let (folder, pin) = (folder.display(), pin.display());
    format!(
        "\n[guard]\npin = \"{pin}/guard\"\ndeny_files = [\"{folder}/deny.txt\"]\n\
         [guard.crowdsec]\nurl = \"http://{LAPI}\"\napi_key_file = \"{folder}/crowdsec.key\"\n\
         interval = \"1s\"\n\n[kubernetes]\nkubeconfig = \"{folder}/kubeconfig\"\n"
    )
}

/// The API. Nothing changes there, so a watch says nothing.
struct Api {
    ended: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Api {
    fn start(edge: &Netns) -> Result<Self> {
        let listener = edge.listen(API).context("the API of Kubernetes")?;
        listener.set_nonblocking(true)?;
        let ended = Arc::new(AtomicBool::new(false));
        let accepting = Some(thread::spawn({
            let ended = Arc::clone(&ended);
            move || accept(&listener, &ended)
        }));
        Ok(Self { ended, accepting })
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn accept(listener: &TcpListener, ended: &AtomicBool) {
    thread::scope(|scope| {
        while !ended.load(Ordering::Relaxed) {
            match listener.accept() {
                // The client may have gone.
                Ok((stream, _)) => drop(scope.spawn(move || drop(answer(stream, ended)))),
                Err(_) => thread::sleep(POLL),
            }
        }
    });
}

fn answer(mut stream: TcpStream, ended: &AtomicBool) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let request = request(&stream)?;
    if !request.contains("watch=true") {
        let body = slices().to_string();
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n")?;
    let seconds = request.split("timeoutSeconds=").nth(1).unwrap_or_default();
    let seconds = seconds.split(|it: char| !it.is_ascii_digit()).next().unwrap_or_default();
    let end = Instant::now() + Duration::from_secs(seconds.parse().unwrap_or(60));
    while Instant::now() < end && !ended.load(Ordering::Relaxed) {
        thread::sleep(POLL);
    }
    stream.write_all(b"0\r\n\r\n")
}

/// The first line of a request, whose head is read.
fn request(stream: &TcpStream) -> std::io::Result<String> {
    let mut lines = BufReader::new(stream.take(64 << 10)).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    Ok(first)
}

/// One pod that is ready, and one that is not.
fn slices() -> serde_json::Value {
    let endpoint =
        |address: &str, ready: bool| json!({ "addresses": [address], "conditions": { "ready": ready } });
    json!({ "kind": "EndpointSliceList", "metadata": { "resourceVersion": "1" }, "items": [{
        "metadata": { "name": "mailserver-proxy-1", "resourceVersion": "1" },
        "addressType": "IPv4",
        "endpoints": [endpoint(&MAIL.v4.to_string(), true), endpoint("10.25.0.3", false)],
        "ports": [{ "name": "smtp", "port": SMTP.proxied, "protocol": "TCP" }],
    }] })
}
