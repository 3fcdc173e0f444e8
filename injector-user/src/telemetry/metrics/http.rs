//! `/metrics`, `/healthz` and `/readyz`.

use std::{fmt, time::Duration};

use axum::{
    Router,
    extract::{RawQuery, State},
    http::{
        HeaderMap, StatusCode,
        header::{ACCEPT, CONTENT_TYPE, VARY},
    },
    response::{IntoResponse, Response},
    routing::get,
};
use hyper::server::conn::http1;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use super::{
    exposition::{Format, text_0_0_4},
    registry::Metrics,
};
use crate::telemetry::{
    log::target,
    operator_connections::{ACCEPT_RETRY_DELAY, OperatorConnections},
};

/// How long a connection may take, from accept(2) until the response is read. Prometheus waits as
/// long for a scrape.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a request may continue after shutdown began. An incomplete request must not keep the
/// process running.
const GRACE: Duration = Duration::from_secs(2);

/// Whether the daemon accepts connections, for `/readyz`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Not all listeners are open yet.
    Starting,
    /// Every listener is open.
    Ready,
    /// Every listener is draining.
    Draining,
    /// The daemon is shutting down.
    Stopping,
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
        })
    }
}

/// `/healthz` and `/readyz`, for an address of probes alone.
pub fn health(metrics: Metrics, readiness: watch::Receiver<Readiness>) -> Router {
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready).with_state((readiness, metrics)))
}

/// These, and `/metrics`.
pub fn with_metrics(health: Router, metrics: Metrics) -> Router {
    health.route("/metrics", get(exposition).with_state(metrics))
}

/// Serves until `stop` is cancelled, and at most two seconds longer.
pub async fn serve(listener: TcpListener, app: Router, stop: CancellationToken) {
    let mut connections = OperatorConnections::default();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => connections.serve(EXCHANGE_TIMEOUT, exchange(stream, app.clone())).await,
            Err(error) => {
                tracing::debug!(target: target::METRICS, %error, "accepting a connection failed; retrying");
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
    }
    connections.finish(GRACE).await;
}

/// Answers one request, and closes: a connection that waits for the next one would take the place
/// of another client.
async fn exchange(stream: TcpStream, app: Router) {
    let service = TowerToHyperService::new(app);
    let exchange = http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service);
    if let Err(error) = exchange.await {
        tracing::debug!(target: target::METRICS, %error, "a request failed");
    }
}

async fn exposition(State(metrics): State<Metrics>, headers: HeaderMap) -> Response {
    let accept = headers.get_all(ACCEPT).into_iter().filter_map(|value| value.to_str().ok());
    let format = Format::negotiate(accept);
    let text = metrics.encode().map(|text| match format {
        Format::OpenMetrics => text,
        Format::Text => text_0_0_4(&text),
    });
    match text {
        Ok(text) => ([(CONTENT_TYPE, format.content_type()), (VARY, "accept")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn ready(
    State((readiness, metrics)): State<(watch::Receiver<Readiness>, Metrics)>,
    RawQuery(query): RawQuery,
) -> Response {
    let without_backend = match query.as_deref() {
        None | Some("") => Vec::new(),
        Some("backends") => metrics.listeners_without_backend(),
        Some(_) => {
            let usage = "unknown query: use /readyz, or /readyz?backends\n";
            return (StatusCode::BAD_REQUEST, usage).into_response();
        }
    };
    let readiness = *readiness.borrow();
    let (status, mut body) = match readiness {
        Readiness::Ready if without_backend.is_empty() => (StatusCode::OK, format!("{readiness}\n")),
        Readiness::Ready => {
            let listeners = without_backend.join(", ");
            (StatusCode::SERVICE_UNAVAILABLE, format!("no backend is up: {listeners}\n"))
        }
        Readiness::Starting | Readiness::Draining | Readiness::Stopping => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("{readiness}\n"))
        }
    };
    for (listener, backend) in metrics.misreading_backends() {
        body +=
            &format!("{listener}: backend {backend} reads the PROXY header as commands: not a PROXY port\n");
    }
    (status, body).into_response()
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, sync::Arc};

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        task::JoinHandle,
        time::{Instant, timeout},
    };

    use super::*;
    use crate::telemetry::{
        metrics::{BackendSample, BackendSource},
        operator_connections::MAX_OPERATOR_CONNECTIONS,
    };

    struct Server {
        address: SocketAddr,
        metrics: Metrics,
        readiness: watch::Sender<Readiness>,
        stop: CancellationToken,
        serving: JoinHandle<()>,
    }

    async fn server() -> Server {
        server_of(with_metrics).await
    }

    /// A server of the router that `complete` makes of the one for probes.
    async fn server_of(complete: fn(Router, Metrics) -> Router) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (readiness, watched) = watch::channel(Readiness::Starting);
        let (metrics, stop) = (Metrics::new(), CancellationToken::new());
        let app = complete(health(metrics.clone(), watched), metrics.clone());
        let serving = tokio::spawn(serve(listener, app, stop.clone()));
        Server { address, metrics, readiness, stop, serving }
    }

    /// Head and body of the response. `headers` end with a line end.
    async fn request_with(address: SocketAddr, method: &str, path: &str, headers: &str) -> (String, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nhost: test\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(Duration::from_secs(10), stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }

    async fn request(address: SocketAddr, method: &str, path: &str) -> (String, String) {
        request_with(address, method, path, "").await
    }

    #[tokio::test]
    async fn metrics_are_served_in_the_format_of_the_scraper() {
        let server = server().await;
        for (accept, format) in [
            ("", Format::Text),
            ("accept: */*\r\n", Format::Text),
            ("accept: application/openmetrics-text;version=1.0.0\r\n", Format::OpenMetrics),
            (
                "accept: text/plain;q=0.3\r\naccept: application/openmetrics-text;q=0.5\r\n",
                Format::OpenMetrics,
            ),
        ] {
            let (head, body) = request_with(server.address, "GET", "/metrics", accept).await;
            assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
            assert!(head.contains(&format!("content-type: {}\r\n", format.content_type())), "{head}");
            assert!(body.contains("injector_build_info{"), "{body}");
            assert_eq!(body.ends_with("# EOF\n"), format == Format::OpenMetrics, "{body}");
        }
    }

    #[tokio::test]
    async fn healthz_reports_a_running_process_and_readyz_its_readiness() {
        let server = server().await;
        for (readiness, status) in [
            (Readiness::Starting, "503"),
            (Readiness::Ready, "200"),
            (Readiness::Draining, "503"),
            (Readiness::Stopping, "503"),
        ] {
            server.readiness.send_replace(readiness);
            for path in ["/readyz", "/readyz?backends"] {
                let (head, body) = request(server.address, "GET", path).await;
                assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{readiness}: {head}");
                assert_eq!(body, format!("{readiness}\n"));
            }
            let (head, body) = request(server.address, "GET", "/healthz").await;
            assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
            assert_eq!(body, "ok\n");
        }
    }

    #[tokio::test]
    async fn an_address_for_probes_has_no_metrics() {
        let server = server_of(|health, _| health).await;
        server.readiness.send_replace(Readiness::Ready);
        for (path, status) in
            [("/healthz", "200"), ("/readyz", "200"), ("/readyz?backends", "200"), ("/metrics", "404")]
        {
            let (head, body) = request(server.address, "GET", path).await;
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{path}: {head}");
            assert!(!body.contains("injector_"), "{path}: {body}");
        }
    }

    /// Backends of which these are up.
    #[derive(Debug)]
    struct Backends(&'static [bool]);

    impl BackendSource for Backends {
        fn sample(&self) -> Vec<BackendSample> {
            let sample = |up: &bool| BackendSample {
                name: "mail.internal:2525".to_owned(),
                up: *up,
                active: 0,
                sessions: 0,
                checks_passed: 0,
                checks_failed: 0,
                ejections: 0,
                misread: 0,
                misreads_header: false,
            };
            self.0.iter().map(sample).collect()
        }

        fn queued(&self) -> usize {
            0
        }
    }

    #[tokio::test]
    async fn readyz_knows_backends_if_asked() {
        let server = server().await;
        server.readiness.send_replace(Readiness::Ready);
        for (imap, smtp, status, text) in [
            (&[true][..], &[false, true][..], "200", "ready\n"),
            (&[true], &[false, false], "503", "no backend is up: smtp\n"),
            (&[false], &[false], "503", "no backend is up: imap, smtp\n"),
        ] {
            server.metrics.watch_backends("imap", Arc::new(Backends(imap)));
            server.metrics.watch_backends("smtp", Arc::new(Backends(smtp)));
            let (head, body) = request(server.address, "GET", "/readyz?backends").await;
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")) && body == text, "{head} {body}");
            let (head, body) = request(server.address, "GET", "/readyz").await;
            assert!(head.starts_with("HTTP/1.1 200 ") && body == "ready\n", "{head} {body}");
        }
        // A reload removed the listeners.
        server.metrics.forget_listener("imap");
        server.metrics.forget_listener("smtp");
        let (head, _) = request(server.address, "GET", "/readyz?backends").await;
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        // A mistake must not read as an answer.
        let (head, body) = request(server.address, "GET", "/readyz?backend").await;
        assert!(head.starts_with("HTTP/1.1 400 ") && body.contains("/readyz?backends"), "{head} {body}");
    }

    #[tokio::test]
    async fn other_requests_are_rejected() {
        let server = server().await;
        for (method, path, status) in
            [("GET", "/", "404"), ("GET", "/metrics/x", "404"), ("POST", "/metrics", "405")]
        {
            let (head, _) = request(server.address, method, path).await;
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{method} {path}: {head}");
        }
    }

    #[tokio::test]
    async fn idle_connections_do_not_keep_a_probe_from_its_answer() {
        let server = server().await;
        server.readiness.send_replace(Readiness::Ready);
        let mut idle = Vec::new();
        for _ in 0..4 * MAX_OPERATOR_CONNECTIONS {
            idle.push(TcpStream::connect(server.address).await.unwrap());
        }
        let (head, _) = request(server.address, "GET", "/readyz").await;
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        // The oldest was closed.
        let read = timeout(Duration::from_secs(10), idle[0].read(&mut [0])).await.unwrap();
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }

    #[tokio::test]
    async fn an_incomplete_request_does_not_delay_the_shutdown() {
        let server = server().await;
        let mut stuck = TcpStream::connect(server.address).await.unwrap();
        stuck.write_all(b"GET /metrics HTTP/1.1\r\n").await.unwrap();
        request(server.address, "GET", "/healthz").await;
        let began = Instant::now();
        server.stop.cancel();
        timeout(Duration::from_secs(10), server.serving).await.unwrap().unwrap();
        assert!(began.elapsed() < GRACE + Duration::from_secs(3), "{:?}", began.elapsed());
    }
}
