//! The backend on loopback, with real clients: what it accepts, returns, rejects and records.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::client::{self, Route};
use super::{Backend, Config, HeaderError, Protocol, Visit};

/// PROXY, 198.51.100.7:40000 to 192.0.2.10:25, written by hand after section 2.2 of the
/// specification.
const HEADER: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\xc6\x33\x64\x07\xc0\x00\x02\x0a\x9c\x40\x00\x19";

/// The same over IPv6: [2001:db8:c::7]:40000 to [2001:db8:a::10]:25.
const HEADER_V6: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x21\x00\x24\
    \x20\x01\x0d\xb8\x00\x0c\0\0\0\0\0\0\0\0\0\x07\x20\x01\x0d\xb8\x00\x0a\0\0\0\0\0\0\0\0\0\x10\x9c\x40\x00\x19";

async fn start(header_timeout: Duration) -> Backend {
    let any = vec!["127.0.0.1:0".parse().unwrap()];
    Backend::start(Config { smtp: any.clone(), imap: any, header_timeout, ..Config::default() })
        .await
        .unwrap()
}

async fn visits(backend: &Backend, count: usize) -> Vec<Visit> {
    let mut visits = backend.visits();
    let waited =
        tokio::time::timeout(Duration::from_secs(5), visits.wait_for(|visits| visits.len() >= count));
    waited.await.expect("visits in time").unwrap().clone()
}

/// A message whose text has everything that SMTP and IMAP might alter: dots, empty lines, 8-bit
/// text, lone dots.
fn message() -> Vec<u8> {
    let mut content = b"From: a@client.example\r\nTo: b@mail.example\r\nSubject: dots\r\n\r\n".to_vec();
    for line in
        ["first", ".", "..", ". ", ".hidden", "", "Grüße", "* 1 FETCH (BODY[] {3}", "a1 OK no, not yet"]
    {
        content.extend_from_slice(line.as_bytes());
        content.extend_from_slice(b"\r\n");
    }
    for number in 0..4_000 {
        content.extend_from_slice(format!(".{number:07} filler\r\n").as_bytes());
    }
    content
}

const SENDER: &str = "a@client.example";
const RECIPIENT: &str = "b@mail.example";

fn with_header(to: SocketAddr, header: &[u8]) -> Route {
    Route { preamble: header.to_vec(), ..Route::to(to) }
}

#[tokio::test]
async fn mail_goes_in_by_smtp_and_comes_out_by_imap_unchanged() {
    let backend = start(Duration::from_secs(3)).await;
    let content = message();
    let sent_from =
        client::send(&with_header(backend.smtp()[0], HEADER), SENDER, RECIPIENT, &content).await.unwrap();
    let route = with_header(backend.imap()[0], HEADER_V6);
    let fetched = client::fetch(&route, &Config::default().account).await.unwrap();

    assert_eq!(fetched.exists, 1);
    assert!(fetched.newest == content, "{} bytes came back of {}", fetched.newest.len(), content.len());
    let stored = &backend.messages()[0];
    assert_eq!((stored.from.as_str(), stored.to.as_slice()), (SENDER, &[RECIPIENT.to_owned()][..]));
    assert!(stored.content == content, "stored as sent");

    let visits = visits(&backend, 2).await;
    let by_smtp = visits[0].header.as_ref().unwrap();
    assert_eq!((visits[0].protocol, visits[0].peer), (Protocol::Smtp, sent_from));
    assert_eq!(by_smtp.raw, HEADER);
    assert_eq!(by_smtp.source, Some("198.51.100.7:40000".parse().unwrap()));
    assert_eq!(by_smtp.destination, Some("192.0.2.10:25".parse().unwrap()));
    assert!(visits[0].received > content.len() as u64, "dots are stuffed, so more bytes than the message");

    let by_imap = visits[1].header.as_ref().unwrap();
    assert_eq!((visits[1].protocol, visits[1].peer), (Protocol::Imap, fetched.local));
    assert_eq!(by_imap.raw, HEADER_V6);
    assert_eq!(by_imap.source, Some("[2001:db8:c::7]:40000".parse().unwrap()));
    assert_eq!(by_imap.destination, Some("[2001:db8:a::10]:25".parse().unwrap()));
    assert!(visits[1].sent > content.len() as u64);
}

#[tokio::test]
async fn local_leaves_the_peer_to_speak_for_itself() {
    let backend = start(Duration::from_secs(3)).await;
    let local = b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00";
    client::send(&with_header(backend.smtp()[0], local), SENDER, RECIPIENT, b"\r\nhello\r\n").await.unwrap();
    let visit = &visits(&backend, 1).await[0];
    let header = visit.header.as_ref().unwrap();
    assert_eq!((header.raw.as_slice(), header.source, header.destination), (&local[..], None, None));
}

#[tokio::test]
async fn a_wrong_password_is_refused() {
    let backend = start(Duration::from_secs(3)).await;
    let account = ("demo".to_owned(), "wrong".to_owned());
    let error = client::fetch(&with_header(backend.imap()[0], HEADER), &account).await.unwrap_err();
    assert!(format!("{error:#}").contains("AUTHENTICATIONFAILED"), "{error:#}");
}

/// Sends `first`, then `later` after a pause if there is any, and returns what the server sent
/// until it closed, and its record of the connection.
async fn converse(header_timeout: Duration, first: &[u8], later: Option<&[u8]>) -> (Vec<u8>, Visit) {
    let backend = start(header_timeout).await;
    let mut stream = TcpStream::connect(backend.smtp()[0]).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream.write_all(first).await.unwrap();
    if let Some(later) = later {
        tokio::time::sleep(Duration::from_millis(100)).await;
        // The server has rejected it by then, so the write may fail: only the record matters.
        let _closed = stream.write_all(later).await;
    }
    let mut answer = Vec::new();
    // A close with unread bytes on the other side arrives as a reset.
    let _reset = stream.read_to_end(&mut answer).await;
    (answer, visits(&backend, 1).await[0].clone())
}

#[tokio::test]
async fn a_header_in_two_pieces_is_refused_as_postfix_does() {
    let (answer, visit) = converse(Duration::from_secs(3), &HEADER[..16], Some(&HEADER[16..])).await;
    assert_eq!(answer, b"");
    assert_eq!(visit.header, Err(HeaderError::Split { seen: HEADER[..16].to_vec() }));
    assert_eq!((visit.received, visit.sent), (0, 0));
}

#[tokio::test]
async fn a_client_that_speaks_without_a_header_is_refused() {
    let (answer, visit) = converse(Duration::from_secs(3), b"EHLO client.example\r\n", None).await;
    assert_eq!(answer, b"", "not even a banner");
    assert!(matches!(visit.header, Err(HeaderError::Malformed { .. })), "{:?}", visit.header);
}

#[tokio::test]
async fn a_client_that_waits_for_the_banner_is_refused_in_time() {
    let (answer, visit) = converse(Duration::from_millis(200), b"", None).await;
    assert_eq!(answer, b"");
    assert_eq!(visit.header, Err(HeaderError::Silent));
}

#[tokio::test]
async fn a_lone_line_feed_ends_no_message() {
    let backend = start(Duration::from_secs(3)).await;
    let mut stream = TcpStream::connect(backend.smtp()[0]).await.unwrap();
    let smuggled = "EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n\
        one\n.\r\nMAIL FROM:<forged@bank>\r\n.\nstill one\r\n.\r\nQUIT\r\n";
    stream.write_all(&[HEADER, smuggled.as_bytes()].concat()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("250 2.0.0 taken\r\n221 2.0.0 goodbye\r\n"), "{answer}");
    let messages = backend.messages();
    assert_eq!(messages.len(), 1);
    assert_eq!(messages[0].content, b"one\n.\r\nMAIL FROM:<forged@bank>\r\n\nstill one\r\n");
}
