//! `/metrics`, `/healthz` and `/readyz`.

use std::{fmt, io, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use super::registry::Metrics;

/// The text format of OpenMetrics 1.0.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
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

/// Serves until `stop` is cancelled, and at most two seconds longer.
///
/// # Errors
/// None at present: failed accepts are retried.
pub async fn serve(
    listener: TcpListener,
    metrics: Metrics,
    readiness: watch::Receiver<Readiness>,
    stop: CancellationToken,
) -> io::Result<()> {
    let app = router(metrics, readiness);
    let serving = axum::serve(listener, app).with_graceful_shutdown(stop.clone().cancelled_owned());
    let too_late = async {
        stop.cancelled().await;
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        result = serving => result,
        () = too_late => Ok(()),
    }
}

fn router(metrics: Metrics, readiness: watch::Receiver<Readiness>) -> Router {
    Router::new()
        .route("/metrics", get(exposition).with_state(metrics.clone()))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready).with_state((readiness, metrics)))
}

async fn exposition(State(metrics): State<Metrics>) -> Response {
    match metrics.encode() {
        Ok(text) => ([(CONTENT_TYPE, OPENMETRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn ready(State((readiness, metrics)): State<(watch::Receiver<Readiness>, Metrics)>) -> Response {
    let readiness = *readiness.borrow();
    let status = match readiness {
        Readiness::Ready => StatusCode::OK,
        Readiness::Starting | Readiness::Draining | Readiness::Stopping => StatusCode::SERVICE_UNAVAILABLE,
    };
    let mut body = format!("{readiness}\n");
    for (listener, backend) in metrics.misreading_backends() {
        body +=
            &format!("{listener}: backend {backend} reads the PROXY header as commands: not a PROXY port\n");
    }
    (status, body).into_response()
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
        task::JoinHandle,
        time::{Instant, timeout},
    };

    use super::*;

    struct Server {
        address: SocketAddr,
        readiness: watch::Sender<Readiness>,
        stop: CancellationToken,
        serving: JoinHandle<io::Result<()>>,
    }

    async fn server() -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (readiness, watched) = watch::channel(Readiness::Starting);
        let stop = CancellationToken::new();
        let serving = tokio::spawn(serve(listener, Metrics::new(), watched, stop.clone()));
        Server { address, readiness, stop, serving }
    }

    /// Head and body of the response.
    async fn request(address: SocketAddr, method: &str, path: &str) -> (String, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(Duration::from_secs(10), stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }

    #[tokio::test]
    async fn metrics_are_exported_as_openmetrics() {
        let server = server().await;
        let (head, body) = request(server.address, "GET", "/metrics").await;
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert!(head.contains(&format!("content-type: {OPENMETRICS}\r\n")), "{head}");
        assert!(body.contains("injector_build_info{") && body.ends_with("# EOF\n"), "{body}");
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
            let (head, body) = request(server.address, "GET", "/readyz").await;
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{readiness}: {head}");
            assert_eq!(body, format!("{readiness}\n"));
            let (head, body) = request(server.address, "GET", "/healthz").await;
            assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
            assert_eq!(body, "ok\n");
        }
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
    async fn an_incomplete_request_does_not_delay_the_shutdown() {
        let server = server().await;
        let mut stuck = TcpStream::connect(server.address).await.unwrap();
        stuck.write_all(b"GET /metrics HTTP/1.1\r\n").await.unwrap();
        request(server.address, "GET", "/healthz").await;
        let began = Instant::now();
        server.stop.cancel();
        timeout(Duration::from_secs(10), server.serving).await.unwrap().unwrap().unwrap();
        assert!(began.elapsed() < GRACE + Duration::from_secs(3), "{:?}", began.elapsed());
    }
}
