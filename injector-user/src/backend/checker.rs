//! One health check of a backend: a connection of the daemon itself, without a client.
//!
//! The check waits for the greeting, sends the protocol's quit command and reads the reply before
//! it closes. A server logs a connection that closes in the middle, and Postfix's smtpd up to 3.10
//! terminates if a header came first.

use std::{io, net::SocketAddr, sync::LazyLock, time::Duration};

use injector_common::proxy::{Command, v2};
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::{
    io::{
        AsyncBufRead, AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _,
        BufReader,
    },
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::TlsConnector;

use super::reply::{Lines, MAX_REPLY, Reply, ReplyError};
use crate::{
    config::{Check, CheckHeader},
    net::tls,
    protocol::{FirstSpeaker, Protocol},
};

/// How long the server may take to close after the quit command.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a health check failed.
#[derive(Debug, Error)]
pub enum CheckError {
    /// The check did not finish in time.
    #[error("{stage}: no reply within {within:?}")]
    Timeout {
        /// The awaited step.
        stage: &'static str,
        /// The timeout of the whole check.
        within: Duration,
    },
    /// A socket operation failed.
    #[error("{stage}: {error}")]
    Io {
        /// The failed step.
        stage: &'static str,
        /// The error of the kernel or of TLS.
        error: io::Error,
    },
    /// The server sent a reply that is not a success.
    #[error("{stage}: unexpected reply {reply:?}")]
    UnexpectedReply {
        /// The step that the reply belongs to.
        stage: &'static str,
        /// The line, truncated.
        reply: String,
    },
    /// The server answered the check's header as commands.
    #[error("the header: the server answered it as commands ({reply:?}): this is not a PROXY port")]
    HeaderMisread {
        /// The line, truncated.
        reply: String,
    },
    /// The reply has no end within `MAX_REPLY` bytes.
    #[error("{stage}: the reply is longer than {MAX_REPLY} bytes: is this the port of a mail server?")]
    ReplyTooLong {
        /// The step that the reply belongs to.
        stage: &'static str,
    },
    /// TLS is not available.
    #[error("TLS: {0}")]
    Tls(#[from] &'static rustls::Error),
}

static TLS: LazyLock<Result<TlsConnector, rustls::Error>> = LazyLock::new(tls::unverified_connector);

/// Checks the server at `address`, on the port of the check or the backend's own.
///
/// # Errors
/// [`CheckError`] with the failed step.
pub(super) async fn check(address: SocketAddr, check: &Check) -> Result<(), CheckError> {
    let address = SocketAddr::new(address.ip(), check.port.unwrap_or(address.port()));
    let deadline = Instant::now() + check.timeout;
    let timed_out = |stage| move |_elapsed| CheckError::Timeout { stage, within: check.timeout };
    let connected =
        timeout_at(deadline, TcpStream::connect(address)).await.map_err(timed_out("connecting"))?;
    let mut stream = connected.map_err(|error| CheckError::Io { stage: "connecting", error })?;
    let Some(protocol) = check.protocol else { return Ok(()) };
    let mut stage = "the header";
    let outcome =
        match timeout_at(deadline, run_check(&mut stream, address, protocol, check.header, &mut stage)).await
        {
            Ok(outcome) => outcome,
            Err(elapsed) => Err(timed_out(stage)(elapsed)),
        };
    close(&mut stream).await;
    match outcome {
        Err(CheckError::UnexpectedReply { reply, .. })
            if check.tries_the_header() && protocol.misreads_header(reply.as_bytes(), false) =>
        {
            Err(CheckError::HeaderMisread { reply })
        }
        outcome => outcome,
    }
}

async fn run_check(
    stream: &mut TcpStream,
    address: SocketAddr,
    protocol: Protocol,
    header: CheckHeader,
    stage: &mut &'static str,
) -> Result<(), CheckError> {
    let failed = |stage| move |error| CheckError::Io { stage, error };
    if header == CheckHeader::Local {
        let mut header = [0; 16];
        let local = v2::encode(&Command::Local, &[], &mut header);
        let len = local.map_err(io::Error::other).map_err(failed("the header"))?;
        let header = header.get(..len).unwrap_or_default();
        stream.write_all(header).await.map_err(failed("the header"))?;
    }
    if protocol.speaks_first() == FirstSpeaker::Server {
        return exchange(stream, protocol, stage).await;
    }
    *stage = "the TLS handshake";
    let connector = TLS.as_ref()?;
    let name = ServerName::IpAddress(address.ip().into());
    let stream = connector.connect(name, stream).await.map_err(failed("the TLS handshake"))?;
    exchange(stream, protocol, stage).await
}

/// Closes with a FIN, even if the server still sends. A reset after LOCAL is fatal to Postfix's
/// smtpd, which then reads the peer's address ("fatal: smtpd_peer_hostaddr_to_sockaddr", observed
/// with 3.7 and 3.10).
async fn close(stream: &mut TcpStream) {
    // The server may have closed first.
    let _ = stream.shutdown().await;
    let rest = async { while stream.read(&mut [0; 1024]).await.is_ok_and(|count| count > 0) {} };
    let _ = timeout(CLOSE_TIMEOUT, rest).await;
}

/// The replies of a healthy server.
struct Expectations {
    greeting: Lines,
    quit_reply: Lines,
}

const fn expectations(protocol: Protocol) -> Option<&'static Expectations> {
    Some(match protocol {
        Protocol::Smtp | Protocol::Submission | Protocol::Submissions => &Expectations {
            greeting: Lines { last: &["220 "], before: &["220-"] },
            quit_reply: Lines { last: &["221 "], before: &["221-"] },
        },
        Protocol::Imap | Protocol::Imaps => &Expectations {
            greeting: Lines { last: &["* OK", "* PREAUTH"], before: &[] },
            quit_reply: Lines { last: &["a OK"], before: &["* "] },
        },
        Protocol::Pop3 | Protocol::Pop3s => &Expectations {
            greeting: Lines { last: &["+OK"], before: &[] },
            quit_reply: Lines { last: &["+OK"], before: &[] },
        },
        // Capabilities, one per line (RFC 5804, section 1.7).
        Protocol::Sieve => &Expectations {
            greeting: Lines { last: &["OK"], before: &["\""] },
            quit_reply: Lines { last: &["OK", "BYE"], before: &[] },
        },
        Protocol::Plain => return None,
    })
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    protocol: Protocol,
    stage: &mut &'static str,
) -> Result<(), CheckError> {
    // The configuration rejects such a check.
    let (Some(expectations), Some(quit)) = (expectations(protocol), protocol.quit_command()) else {
        return Ok(());
    };
    let mut stream = BufReader::new(stream);
    *stage = "the greeting";
    expect_reply(&mut stream, &expectations.greeting, "the greeting").await?;
    *stage = "the quit command";
    let reply = stream.get_mut().write_all(quit).await;
    reply.map_err(|error| CheckError::Io { stage: "the quit command", error })?;
    expect_reply(&mut stream, &expectations.quit_reply, "the quit command").await?;
    // Closes TLS, or the server would log a broken connection. It may have closed first.
    let _ = stream.get_mut().shutdown().await;
    Ok(())
}

/// Reads one reply; fails with the first line that does not match.
async fn expect_reply(
    stream: &mut (impl AsyncBufRead + Unpin),
    lines: &'static Lines,
    stage: &'static str,
) -> Result<(), CheckError> {
    let mut reply = Reply::new(lines);
    loop {
        let bytes = stream.fill_buf().await.map_err(|error| CheckError::Io { stage, error })?;
        if bytes.is_empty() {
            let error = io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection");
            return Err(CheckError::Io { stage, error });
        }
        let len = bytes.len();
        match reply.push(bytes) {
            Ok(None) => stream.consume(len),
            Ok(Some(used)) => {
                stream.consume(used);
                return Ok(());
            }
            Err(ReplyError::Unexpected(reply)) => return Err(CheckError::UnexpectedReply { stage, reply }),
            Err(ReplyError::TooLong) => return Err(CheckError::ReplyTooLong { stage }),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn plan(protocol: Option<Protocol>) -> Check {
        Check {
            protocol,
            port: None,
            header: CheckHeader::None,
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(5),
            rise: 1,
            fall: 1,
        }
    }

    /// A server that sends `greeting`, and `answer` after the client's first line. Returns the
    /// result of the check and what the client sent until it closed.
    async fn server(
        greeting: &'static str,
        answer: &'static str,
        plan: Check,
    ) -> (Result<(), CheckError>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(greeting.as_bytes()).await.unwrap();
            let mut received = Vec::new();
            let mut bytes = [0; 256];
            while let Ok(count @ 1..) = stream.read(&mut bytes).await {
                received.extend_from_slice(&bytes[..count]);
                if received.ends_with(b"\r\n") {
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            }
            String::from_utf8_lossy(&received).into_owned()
        });
        let result = check(address, &plan).await;
        (result, serving.await.unwrap())
    }

    #[tokio::test]
    async fn a_healthy_server_receives_the_quit_command() {
        for (protocol, greeting, quit, answer) in [
            (Protocol::Smtp, "220 mx ESMTP\r\n", "QUIT\r\n", "221 2.0.0 Bye\r\n"),
            (Protocol::Submission, "220-wait\r\n220 mx ESMTP\r\n", "QUIT\r\n", "221 2.0.0 Bye\r\n"),
            (Protocol::Imap, "* OK ready\r\n", "a LOGOUT\r\n", "* BYE\r\na OK done\r\n"),
            (Protocol::Pop3, "+OK ready\r\n", "QUIT\r\n", "+OK bye\r\n"),
            (Protocol::Sieve, "\"SIEVE\" \"fileinto\"\r\nOK ready\r\n", "LOGOUT\r\n", "OK bye\r\n"),
        ] {
            let (result, received) = server(greeting, answer, plan(Some(protocol))).await;
            assert!(result.is_ok(), "{protocol}: {result:?}");
            assert_eq!(received, quit, "{protocol}");
        }
    }

    #[tokio::test]
    async fn a_tcp_check_only_connects() {
        let (result, received) = server("", "", plan(None)).await;
        assert!(result.is_ok() && received.is_empty(), "{result:?} {received}");
    }

    #[tokio::test]
    async fn a_local_header_is_sent_first() {
        let plan = Check { header: CheckHeader::Local, ..plan(Some(Protocol::Smtp)) };
        let (result, received) = server("220 mx\r\n", "221 bye\r\n", plan).await;
        assert!(result.is_ok(), "{result:?}");
        assert_eq!(received, "\r\n\r\n\0\r\nQUIT\n \0\0\0QUIT\r\n");
    }

    #[tokio::test]
    async fn a_server_that_reads_the_header_as_commands_is_recognized() {
        for (header, expected) in [
            (
                CheckHeader::Local,
                "the header: the server answered it as commands (\"500 5.5.2 Error: bad syntax\")",
            ),
            (CheckHeader::None, "the quit command: unexpected reply \"500 5.5.2 Error: bad syntax\""),
        ] {
            let plan = Check { header, ..plan(Some(Protocol::Smtp)) };
            let greeting = "220 mail ESMTP\r\n500 5.5.2 Error: bad syntax\r\n";
            let error = server(greeting, "221 bye\r\n", plan).await.0.unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[tokio::test]
    async fn a_failed_check_reports_the_step_and_the_reply() {
        for (greeting, answer, expected) in [
            ("421 4.3.2 closing\r\n", "", "the greeting: unexpected reply \"421 4.3.2 closing\""),
            ("220 mx\r\n", "500 what\r\n", "the quit command: unexpected reply \"500 what\""),
            ("SSH-2.0-x\r\n", "", "the greeting: unexpected reply \"SSH-2.0-x\""),
        ] {
            let error = server(greeting, answer, plan(Some(Protocol::Smtp))).await.0.unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }

    #[tokio::test]
    async fn a_greeting_without_end_fails_the_check() {
        let line = "x".repeat(9000);
        for greeting in [
            // More than the limit in two lines that could precede the last one.
            format!("220-{line}\r\n220-{line}\r\n220 mx\r\n"),
            format!("220-{line}{line}\r\n220 mx\r\n"),
            line.repeat(2),
        ] {
            let (result, received) = server(greeting.leak(), "221 bye\r\n", plan(Some(Protocol::Smtp))).await;
            let error = result.unwrap_err().to_string();
            assert!(error.starts_with("the greeting: the reply is longer than 16384 bytes"), "{error}");
            assert_eq!(received, "");
        }
    }

    #[tokio::test]
    async fn a_silent_server_times_out() {
        let plan = Check { timeout: Duration::from_millis(50), ..plan(Some(Protocol::Smtp)) };
        let error = server("", "", plan).await.0.unwrap_err();
        assert_eq!(error.to_string(), "the greeting: no reply within 50ms");
    }

    #[tokio::test]
    async fn a_closed_port_is_a_connect_error() {
        let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let error = check(address, &plan(None)).await.unwrap_err();
        assert!(error.to_string().starts_with("connecting: Connection refused"), "{error}");
    }
}
