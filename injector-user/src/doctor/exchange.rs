//! Carries out a dialogue over a connection: sends lines, reads replies, starts TLS if the server
//! requires it.

use std::{io, net::IpAddr, time::Duration};

use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::{Instant, timeout, timeout_at},
};

use super::{
    dialogue::{Action, Script},
    observation::Dialogue,
};
use crate::{net::tls, protocol::Protocol};

/// How long to read after QUIT or a rejection.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);
/// Longer than any greeting.
const MAX_REPLY_BYTES: usize = 16 * 1024;

/// The parameters of a dialogue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) protocol: Protocol,
    pub(super) server: IpAddr,
    /// For all of its replies together.
    pub(super) timeout: Duration,
}

/// Runs a dialogue. Its replies are appended to `said` only if the server did not understand the
/// first command: then it read the header as commands, and the replies must be classified.
pub(super) async fn run_script<S: Stream>(
    stream: &mut S,
    said: &mut Vec<u8>,
    (mut script, mut action): (Script, Action),
    terms: Terms,
) -> Option<Dialogue> {
    let Terms { protocol, server, timeout: limit } = terms;
    let until = Instant::now() + limit;
    let unread = said.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let mut heard = said.split_off(unread);
    action = run_actions(stream, &mut heard, &mut script, action, protocol, until).await;
    if action == Action::StartTls
        && let Ok(connector) = tls::unverified_connector()
    {
        match timeout_at(until, connector.connect(ServerName::from(server), &mut *stream)).await {
            Ok(Ok(mut stream)) => {
                let (heard, first) = (&mut Vec::new(), script.tls_started());
                run_actions(&mut stream, heard, &mut script, first, protocol, until).await;
            }
            Ok(Err(error)) => script.abort(&format!("the TLS handshake failed ({error})")),
            Err(_) => script.abort("the TLS handshake timed out"),
        }
    }
    if !script.is_understood() {
        said.append(&mut heard);
    }
    script.into_result()
}

/// Runs actions until TLS must start, or none is left.
async fn run_actions<S: Stream>(
    stream: &mut S,
    heard: &mut Vec<u8>,
    script: &mut Script,
    mut action: Action,
    protocol: Protocol,
    until: Instant,
) -> Action {
    let mut parsed = 0;
    while let Action::Send(line) = &action {
        // The read below reports the error.
        let _ = stream.write_all(line.as_bytes()).await;
        let _ = stream.flush().await;
        action = loop {
            if let Some((reply, len)) = script.parse(heard.get(parsed..).unwrap_or_default()) {
                parsed += len;
                break script.next(&reply);
            }
            match timeout_at(until, read(stream, heard)).await {
                Ok(Read::More) if heard.len() < MAX_REPLY_BYTES => {}
                Ok(Read::More) => {
                    script.abort("the reply is too long");
                    break Action::Quit;
                }
                Ok(Read::End { .. }) => {
                    script.abort("the server closed the connection");
                    return Action::Quit;
                }
                Err(_) => {
                    script.abort("no answer");
                    break Action::Quit;
                }
            }
        };
    }
    if action == Action::Quit {
        quit(stream, heard, protocol).await;
    }
    action
}

/// Sends a command that does nothing, and reads its reply. A greeting alone does not show that the
/// server serves the client: Exim greets one whose header is missing or unusable, and then refuses
/// all its commands but QUIT (`proxy_session_failed` in `src/smtp_in.c`).
pub(super) async fn probe_service<S: Stream>(stream: &mut S, said: &mut Vec<u8>, protocol: Protocol) {
    let Some(command) = protocol.noop_command() else { return };
    let before = said.len();
    let reply = async {
        let _ = stream.write_all(command).await;
        let _ = stream.flush().await;
        let replied = |said: &[u8]| said.get(before..).is_some_and(|new| new.contains(&b'\n'));
        while !replied(said) && said.len() < MAX_REPLY_BYTES && matches!(read(stream, said).await, Read::More)
        {
        }
    };
    // A server that does not reply is classified by what it sent before.
    let _ = timeout(CLOSE_TIMEOUT, reply).await;
}

pub(super) async fn quit<S: Stream>(stream: &mut S, said: &mut Vec<u8>, protocol: Protocol) {
    if let Some(goodbye) = protocol.quit_command() {
        let _ = stream.write_all(goodbye).await;
        let _ = stream.flush().await;
        let _ = timeout(CLOSE_TIMEOUT, read_to_end(stream, said)).await;
    }
}

/// A connection, in clear text or TLS.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

pub(super) enum Read {
    More,
    End { reset: bool },
}

pub(super) async fn read<S: AsyncRead + Unpin>(stream: &mut S, said: &mut Vec<u8>) -> Read {
    match stream.read_buf(said).await {
        Ok(0) => Read::End { reset: false },
        Ok(_) => Read::More,
        // The server closed TLS without a close_notify.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Read::End { reset: false },
        Err(_) => Read::End { reset: true },
    }
}

pub(super) async fn read_to_end<S: AsyncRead + Unpin>(stream: &mut S, said: &mut Vec<u8>) {
    while said.len() < MAX_REPLY_BYTES && matches!(read(stream, said).await, Read::More) {}
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::io::{BufReader, DuplexStream, duplex, split};

    use super::{super::observation::Relay, *};

    /// Runs the dialogue with a server that answers each line with the next of these replies, and
    /// then closes.
    async fn asked(greeting: &str, replies: &'static [&'static str]) -> (Option<Dialogue>, Vec<u8>, String) {
        let (mut stream, server) = duplex(4096);
        let server = tokio::spawn(serve(server, replies));
        let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let begun = Script::start(Protocol::Smtp, localhost, greeting.as_bytes()).unwrap();
        let terms =
            Terms { protocol: Protocol::Smtp, server: localhost, timeout: Duration::from_millis(300) };
        let mut said = greeting.as_bytes().to_vec();
        let dialogue = run_script(&mut stream, &mut said, begun, terms).await;
        drop(stream);
        (dialogue, said, server.await.unwrap())
    }

    async fn serve(stream: DuplexStream, replies: &[&str]) -> String {
        use tokio::io::AsyncBufReadExt as _;
        let (reader, mut writer) = split(stream);
        let (mut lines, mut received) = (BufReader::new(reader).lines(), Vec::new());
        let mut replies = replies.iter();
        while let Ok(Some(line)) = lines.next_line().await {
            received.push(line);
            match replies.next() {
                Some(&"wait") => {}
                Some(reply) => writer.write_all(reply.as_bytes()).await.unwrap(),
                None => break,
            }
        }
        received.join("\n")
    }

    const GREETING: &str = "220 mail ESMTP\r\n";

    #[tokio::test]
    async fn a_dialogue_ends_with_quit_and_never_sends_data() {
        let replies = &["250-mail\r\n250 OK\r\n", "250 OK\r\n", "250 2.1.5 Ok\r\n", "250 OK\r\n"];
        let (dialogue, said, received) = asked(GREETING, replies).await;
        assert_eq!(dialogue, Some(Dialogue::Relay(Relay::Accepted("250 2.1.5 Ok".to_owned()))));
        let expected = "EHLO [127.0.0.1]\nMAIL FROM:<>\nRCPT TO:<relay-test@example.com>\nRSET\nQUIT";
        assert_eq!((received.as_str(), said.as_slice()), (expected, GREETING.as_bytes()));
    }

    #[tokio::test]
    async fn relaying_is_unknown_if_the_server_closes_or_stops() {
        let why = |dialogue| match dialogue {
            Some(Dialogue::Relay(Relay::Unknown(why))) => why,
            other => panic!("{other:?}"),
        };
        let (dialogue, ..) = asked(GREETING, &["250 mail\r\n", "250 OK\r\n"]).await;
        assert_eq!(why(dialogue), "the server closed the connection after RCPT TO");
        let (dialogue, _, received) = asked(GREETING, &["250 mail\r\n", "wait"]).await;
        assert_eq!(why(dialogue), "no answer after MAIL FROM");
        assert!(received.ends_with("QUIT"), "{received}");
    }

    #[tokio::test]
    async fn errors_about_the_header_are_kept_for_classification() {
        let (_, said, _) = asked("220 mail\r\n500 5.5", &["500 5.5.2 Error: bad syntax\r\n"]).await;
        let said = String::from_utf8(said).unwrap();
        assert!(said.starts_with("220 mail\r\n500 5.5") && said.contains("bad syntax"), "{said:?}");
    }
}
