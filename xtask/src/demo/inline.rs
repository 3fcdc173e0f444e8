//! The inline engine beside splice: the same client sends a message to another listener, whose
//! packets a BPF program forwards. Then the backend goes down and comes back: meanwhile the listener's
//! own socket answers, at the same address.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use injector_testbed::bpffs::BpfFs;
use injector_testbed::daemon::{
    BPF_EVENTS, BYTES, DIRECTION, PIPED, PLANE, RELAYED, SPLICED, TO_BACKEND, TO_CLIENT,
};
use injector_testbed::demo_backend::{Backend, Config, HeaderError};
use injector_testbed::metrics::Metrics;
use injector_testbed::netns::Family;
use serde_json::Value;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

use super::assertions::{
    ACCEPTED, Assertion, HEADERS_SENT, assertion, destination, difference, moved, source,
};
use super::injector::Injector;
use super::narration;
use super::scenario::{self, Scenario, Sent, TIMEOUT};
use super::service::{INLINE, SMTP};
use super::terminal::{Style, count, heading, mark, row, styled};
use super::testbed::Testbed;

/// What precedes the addresses in a PROXY v2 header: signature, command, family, length.
const BEFORE_ADDRESSES: usize = 16;

/// The answer of a mail service without a backend.
const UNAVAILABLE: &str = "421 ";

/// Everything that was observed.
pub(super) struct Inline {
    /// A message sent through inline, in each family.
    pub(super) sent: Vec<Sent>,
    /// A client that comes while the backend is down, in each family.
    pub(super) refused: Vec<Refused>,
    /// A message sent after that.
    pub(super) again: Vec<Sent>,
    /// The injector's metrics before all that, and after each step.
    pub(super) metrics: [Metrics; 4],
}

/// A client that comes while the backend is down.
pub(super) struct Refused {
    /// Where it connected to.
    pub(super) listener: SocketAddr,
    /// What it read until the end of the connection.
    pub(super) answer: String,
    /// After how long.
    pub(super) took: Duration,
    /// The injector's access log line.
    pub(super) line: Value,
}

/// The listeners of inline, to the same backend as the others.
pub(super) fn configuration(testbed: &Testbed, bpffs: &BpfFs) -> String {
    let mut text = format!("\n[inline]\npin = \"{}\"\n", bpffs.path().display());
    for (&family, backend) in testbed.families.iter().zip(testbed.backends(INLINE)) {
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "\n[[listener]]\nname = \"{}\"\nbind = [\"{}\"]\nprotocol = \"{}\"\nengine = \"inline\"\n\
             backends = [\"{backend}\"]\n",
            INLINE.listener_name(family),
            testbed.listener(INLINE, family),
            INLINE.name,
        );
    }
    text
}

impl Inline {
    /// Sends a message in each family, with the backend up, down and up again.
    pub(super) async fn run(
        testbed: &Testbed,
        backend: Backend,
        config: Config,
        injector: &mut Injector,
    ) -> Result<Self> {
        let before = injector.metrics(testbed).await?;
        let sent = send(testbed, &backend, injector).await?;
        let after_sent = injector.metrics(testbed).await?;
        stop(testbed, backend).await?;
        let mut refused = Vec::new();
        for &family in testbed.families {
            refused.push(Refused::connect(testbed, injector, family).await?);
        }
        let after_refused = injector.metrics(testbed).await?;
        let backend = testbed.mail.run(Backend::start(config)).await??;
        let again = send(testbed, &backend, injector).await?;
        let after_again = injector.metrics(testbed).await?;
        let metrics = [before, after_sent, after_refused, after_again];
        Ok(Self { sent, refused, again, metrics })
    }

    /// Prints it; the scenarios are splice's.
    pub(super) fn print(&self, scenarios: &[Scenario], testbed: &Testbed) {
        for (sent, scenario) in self.sent.iter().zip(scenarios) {
            let ip = if scenario.family == Family::V4 { "IPv4" } else { "IPv6" };
            heading(&format!(
                "Inline beside it, SMTP over {ip}: the same client, to {}",
                sent.transaction.listener
            ));
            narration::addresses(&sent.transaction, testbed, scenario.family);
            narration::message("stored by the backend", &sent.sent, &sent.stored);
            let length = sent.transaction.visit.header.as_ref().map_or(0, |header| header.raw.len());
            let same = same_header(sent, scenario).is_none();
            row("the header, as through splice", &format!("{length} bytes  {}", mark(same)));
        }
        self.print_carriers(scenarios);
        heading("The backend goes down, and comes back");
        for (refused, again) in self.refused.iter().zip(&self.again) {
            let seconds = refused.took.as_secs_f64();
            row(
                &format!("down: {} answers", refused.listener),
                &format!("after {seconds:.1} s, by {}", text(&refused.line, "engine")),
            );
            println!("    {}", styled(Style::Cyan, refused.answer.trim_end()));
            let engine = text(&again.transaction.line, "engine");
            row(
                "back: the next client is served by",
                &format!("{engine}  {}", mark(again.sent == again.stored)),
            );
        }
        let [before, .., after] = &self.metrics;
        heading("Events of inline's program");
        narration::changes(before, after, |title| {
            title.starts_with(BPF_EVENTS) && title.contains("program=inline")
        });
        heading("The access log of inline's listeners");
        for line in self.lines() {
            narration::access_log_line(line);
        }
    }

    /// The same message by both engines.
    fn print_carriers(&self, scenarios: &[Scenario]) {
        heading("Who carried the bytes of a message, splice or inline");
        let columns =
            |name: &str, kernel: &str, daemon: &str| println!("  {name:<26}{kernel:>18}{daemon:>18}");
        columns("bytes", "kernel", "daemon");
        for (scenario, inline) in scenarios.iter().zip(&self.sent) {
            let [splice, _] = &scenario.transactions;
            for transaction in [splice, &inline.transaction] {
                for (way, direction) in [("→ backend", "to_backend"), ("→ client", "to_client")] {
                    let kernel = transaction.logged(&format!("spliced_{direction}"));
                    let daemon = transaction.logged(&format!("bytes_{direction}")).saturating_sub(kernel);
                    columns(
                        &format!("{:<12} {way}", transaction.listener_name()),
                        &count(kernel),
                        &count(daemon),
                    );
                }
            }
        }
    }

    /// For the demo's last line.
    pub(super) fn totals(&self) -> String {
        let served = || self.sent.iter().chain(&self.again).map(|sent| &sent.transaction);
        let bytes =
            served().map(|it| it.logged("spliced_to_backend") + it.logged("spliced_to_client")).sum::<u64>();
        format!("{} connections by inline, {} bytes by its program", served().count(), count(bytes))
    }

    fn lines<'a>(&'a self) -> impl Iterator<Item = &'a Value> {
        let of = |sent: &'a Sent| &sent.transaction.line;
        let refused = self.refused.iter().map(|refused| &refused.line);
        self.sent.iter().map(of).chain(refused).chain(self.again.iter().map(of))
    }

    /// Bytes of the first message's connection, by the metrics.
    fn bytes(&self, sent: &Sent, direction: &str, plane: &str) -> u64 {
        let listener = sent.transaction.listener_name();
        let [before, after, ..] = &self.metrics;
        moved(before, after, BYTES, &[("listener", &listener), (DIRECTION, direction), (PLANE, plane)])
    }

    /// How often the program has counted this during a step.
    fn events(&self, step: usize, event: &str) -> u64 {
        let during = self.metrics.get(step).zip(self.metrics.get(step + 1));
        let labels = [("program", "inline"), ("event", event)];
        during.map_or(0, |(before, after)| moved(before, after, BPF_EVENTS, &labels))
    }

    /// Checks all assertions about inline; the scenarios are splice's.
    pub(super) fn assertions(&self, scenarios: &[Scenario]) -> Vec<Assertion> {
        vec![
            assertion(
                "inline: the same header as through splice, with this connection's addresses",
                self.sent.iter().zip(scenarios).find_map(|(sent, scenario)| same_header(sent, scenario)),
            ),
            assertion(
                "inline: messages are stored byte for byte as they were sent",
                self.sent.iter().find_map(stored),
            ),
            assertion("inline: the program carried every byte, and the daemon none", self.carried()),
            assertion(
                "backend down: the same address answers 421, by the socket behind inline",
                self.refusals(),
            ),
            assertion("backend up again: inline serves the next client", self.served_again()),
        ]
    }

    fn carried(&self) -> Option<String> {
        let connections = self.sent.len() as u64;
        let each = self.sent.iter().find_map(|sent| {
            let listener = sent.transaction.listener_name();
            let [before, after, ..] = &self.metrics;
            let counted = |name, labels: &[_]| moved(before, after, name, labels);
            let by_listener = ("listener", listener.as_str());
            let connection = (
                counted(ACCEPTED, &[by_listener]),
                counted(HEADERS_SENT, &[by_listener, ("engine", "inline")]),
            );
            let [up, down] = [TO_BACKEND, TO_CLIENT]
                .map(|direction| [SPLICED, RELAYED, PIPED].map(|plane| self.bytes(sent, direction, plane)));
            let visit = &sent.transaction.visit;
            by_inline(&sent.transaction.line)
                .or_else(|| difference("accepted, sent", connection, (1, 1)))
                .or_else(|| difference("to backend: program, relayed, piped", up, [visit.received, 0, 0]))
                .or_else(|| difference("to client: program, relayed, piped", down, [visit.sent, 0, 0]))
                .map(|failure| format!("{listener}: {failure}"))
        });
        each.or_else(|| {
            let seen = (self.events(0, "opened"), self.events(0, "established"));
            difference("the program opened, established", seen, (connections, connections))
        })
    }

    fn refusals(&self) -> Option<String> {
        let each = self.refused.iter().find_map(|refused| {
            let (engine, reason) = (text(&refused.line, "engine"), text(&refused.line, "reason"));
            let answer = refused.answer.starts_with(UNAVAILABLE) && refused.answer.ends_with("\r\n");
            (!answer)
                .then(|| format!("{} answered {:?}", refused.listener, refused.answer))
                .or_else(|| difference("engine, reason", (engine, reason), ("splice", "backend_refused")))
        });
        each.or_else(|| {
            let clients = self.refused.len() as u64;
            let seen = (self.events(1, "refused"), self.events(1, "to_socket_unanswered"));
            difference("SYNs refused, left to the socket", seen, (clients, clients))
        })
    }

    fn served_again(&self) -> Option<String> {
        let each =
            self.again.iter().find_map(|sent| by_inline(&sent.transaction.line).or_else(|| stored(sent)));
        each.or_else(|| {
            difference("the program established", self.events(2, "established"), self.again.len() as u64)
        })
    }
}

impl Refused {
    /// Connects, and reads until the end.
    async fn connect(testbed: &Testbed, injector: &mut Injector, family: Family) -> Result<Self> {
        let listener = testbed.listener(INLINE, family);
        let from = SocketAddr::new(testbed.client_ip(family), 0);
        let work = async move {
            let begun = Instant::now();
            let socket = if from.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
            socket.bind(from)?;
            let mut stream = socket.connect(listener).await?;
            let client = stream.local_addr()?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            anyhow::Ok((client, answer, begun.elapsed()))
        };
        let (client, answer, took) = testbed
            .client
            .run(timeout(TIMEOUT, work))
            .await?
            .with_context(|| format!("no answer from {listener} while the backend is down"))??;
        let line = injector.access_log_line(client).await?;
        Ok(Self { listener, answer, took, line })
    }
}

async fn send(testbed: &Testbed, backend: &Backend, injector: &mut Injector) -> Result<Vec<Sent>> {
    let mut sent = Vec::new();
    for &family in testbed.families {
        sent.push(scenario::send(testbed, backend, injector, INLINE, family).await?);
    }
    Ok(sent)
}

/// Stops the backend, and waits until its ports are closed.
async fn stop(testbed: &Testbed, backend: Backend) -> Result<()> {
    let addresses = backend.smtp().to_vec();
    drop(backend);
    let closed = async move {
        for address in addresses {
            while TcpStream::connect(address).await.is_ok() {
                sleep(Duration::from_millis(20)).await;
            }
        }
    };
    testbed.mail.run(timeout(TIMEOUT, closed)).await?.context("the backend does not close its ports")
}

/// The text of a field of a log line.
fn text<'a>(line: &'a Value, field: &str) -> &'a str {
    line.get(field).and_then(Value::as_str).unwrap_or("nothing")
}

fn by_inline(line: &Value) -> Option<String> {
    let (engine, reason) = (text(line, "engine"), text(line, "reason"));
    let clean = reason == "client_closed" || reason == "backend_closed";
    (engine != "inline" || !clean).then(|| format!("engine {engine}, reason {reason}"))
}

fn stored(sent: &Sent) -> Option<String> {
    let sizes = || format!("{} sent, {} stored", sent.sent.len(), sent.stored.len());
    (sent.stored != sent.sent).then(sizes)
}

fn same_header(sent: &Sent, scenario: &Scenario) -> Option<String> {
    let shape = |header: &Result<injector_testbed::demo_backend::Header, HeaderError>| {
        let raw = header.as_ref().ok()?.raw.clone();
        Some((raw.len(), raw.get(..BEFORE_ADDRESSES)?.to_vec()))
    };
    let [smtp, _] = &scenario.transactions;
    debug_assert_eq!(smtp.service.listener, SMTP.listener);
    source(&sent.transaction).or_else(|| destination(&sent.transaction)).or_else(|| {
        let (inline, splice) = (shape(&sent.transaction.visit.header), shape(&smtp.visit.header));
        difference("length and first bytes, and splice's", inline, splice)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::assertions::tests::transaction;
    use super::super::service::IMAP;
    use super::*;

    fn sent() -> Sent {
        let mut transaction = transaction(INLINE);
        transaction.line["engine"] = json!("inline");
        let message = b"Subject: x\r\n\r\n".to_vec();
        Sent { sent: message.clone(), stored: message, transaction }
    }

    /// Metrics of one connection, and events of the program.
    fn metrics(connection: bool, events: [u64; 4]) -> Metrics {
        let mut text = String::new();
        let [bytes_up, bytes_down, one] = if connection { [10, 20, 1] } else { [0; 3] };
        for (direction, bytes) in [(TO_BACKEND, bytes_up), (TO_CLIENT, bytes_down)] {
            let labels =
                format!("listener=\"inline-ipv4\",{DIRECTION}=\"{direction}\",{PLANE}=\"{SPLICED}\"");
            let _ = writeln!(text, "{BYTES}{{{labels}}} {bytes}");
        }
        let _ = writeln!(text, "{ACCEPTED}{{listener=\"inline-ipv4\"}} {one}");
        let _ = writeln!(text, "{HEADERS_SENT}{{listener=\"inline-ipv4\",engine=\"inline\"}} {one}");
        for (event, number) in
            ["opened", "established", "refused", "to_socket_unanswered"].into_iter().zip(events)
        {
            let _ = writeln!(text, "{BPF_EVENTS}{{program=\"inline\",event=\"{event}\"}} {number}");
        }
        Metrics::parse(&(text + "# EOF\n")).unwrap()
    }

    /// A successful run over IPv4 alone.
    fn inline() -> Inline {
        let refused = Refused {
            listener: "192.0.2.12:25".parse().unwrap(),
            answer: "421 4.3.2 Mail service not available\r\n".to_owned(),
            took: Duration::from_secs(1),
            line: json!({"engine": "splice", "reason": "backend_refused"}),
        };
        Inline {
            sent: vec![sent()],
            refused: vec![refused],
            again: vec![sent()],
            metrics: [
                metrics(false, [0; 4]),
                metrics(true, [1, 1, 0, 0]),
                metrics(true, [2, 1, 1, 1]),
                metrics(true, [3, 2, 1, 1]),
            ],
        }
    }

    fn failed(inline: &Inline) -> Vec<String> {
        let message = Vec::new();
        let scenario = Scenario {
            family: Family::V4,
            sent: message.clone(),
            stored: message.clone(),
            fetched: message,
            transactions: [transaction(SMTP), transaction(IMAP)],
        };
        let assertions = inline.assertions(&[scenario]).into_iter();
        assertions.filter(|assertion| assertion.failure.is_some()).map(|assertion| assertion.text).collect()
    }

    #[test]
    fn a_successful_run_passes() {
        assert_eq!(failed(&inline()), Vec::<String>::new());
    }

    #[test]
    fn every_assertion_can_fail() {
        type Spoil = fn(&mut Inline);
        let cases: [(&str, Spoil); 12] = [
            ("same header", |it| it.sent[0].transaction.client.set_port(1)),
            ("same header", |it| it.sent[0].transaction.listener.set_port(1)),
            ("same header", |it| it.sent[0].transaction.visit.header.as_mut().unwrap().raw.push(0)),
            ("byte for byte", |it| it.sent[0].stored.truncate(3)),
            ("every byte", |it| it.sent[0].transaction.visit.received += 1),
            ("every byte", |it| it.sent[0].transaction.line["engine"] = json!("splice")),
            ("every byte", |it| it.metrics[1] = metrics(true, [1, 0, 0, 0])),
            ("answers 421", |it| it.refused[0].answer.clear()),
            ("answers 421", |it| it.refused[0].line["engine"] = json!("inline")),
            ("answers 421", |it| it.metrics[2] = metrics(true, [2, 1, 1, 0])),
            ("the next client", |it| it.again[0].transaction.line["engine"] = json!("splice")),
            ("the next client", |it| it.metrics[3] = metrics(true, [3, 1, 1, 1])),
        ];
        for (text, spoil) in cases {
            let mut inline = inline();
            spoil(&mut inline);
            let failed = failed(&inline);
            assert!(failed.iter().any(|failed| failed.contains(text)), "{text}: {failed:?}");
        }
    }
}
