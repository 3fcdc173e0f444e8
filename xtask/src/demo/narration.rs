//! Prints the demo, part by part.

use std::collections::BTreeMap;
use std::path::Path;

use injector_testbed::demo_backend::{Protocol, Visit};
use injector_testbed::metrics::{Metrics, Sample};
use injector_testbed::netns::Family;
use serde_json::Value;

use super::assertions::{self, Assertion};
use super::engine::Engine;
use super::header;
use super::injector::Injector;
use super::scenario::{Run, Scenario, Transaction};
use super::service::{IMAP, INLINE, SMTP};
use super::terminal::{Style, count, heading, hex, mark, row, styled, wrapped};
use super::testbed::Testbed;

/// The hosts and their addresses.
pub(super) fn introduction(testbed: &Testbed, injector: &Injector, engine: Engine, with_inline: bool) {
    println!(
        "{}",
        styled(
            Style::Bold,
            "Mail through the injector, from a client to a backend that requires a PROXY header"
        )
    );
    if !testbed.has_namespaces() {
        println!(
            "\n  Not root, so this is loopback and the relay engine. What cannot be shown this way: three hosts in\n  \
             network namespaces of their own, payload carried by the kernel, and the inline engine. Over IPv6\n  \
             even the client and the edge have one address, ::1, and only their ports differ. Run it as root\n  \
             to see the rest."
        );
    }
    let columns = |client: &str, edge: &str, mail: &str| println!("  {client:<22}{edge:<44}{mail}");
    if !testbed.families.contains(&Family::V6) {
        println!("\n  This machine has no IPv6, so the IPv6 half is missing.");
    }
    println!();
    columns("client", "edge: the injector, its address inside", "mail: the backend");
    for &family in testbed.families {
        let listener = testbed.listener(SMTP, family);
        let both = format!("{listener}, :{}", testbed.listener(IMAP, family).port());
        let client = testbed.client_ip(family).to_string();
        let arrow = styled(Style::Dim, "→");
        let backends =
            |service| testbed.backends(service).into_iter().find(|to| to.is_ipv4() == listener.is_ipv4());
        let mail = match (backends(SMTP), backends(IMAP)) {
            (Some(smtp), Some(imap)) if smtp.port() != 0 => format!("{smtp}, :{}", imap.port()),
            (Some(smtp), _) => format!("{}, free ports", smtp.ip()),
            (None, _) => String::new(),
        };
        println!(
            "  {client:<20}{arrow} {:<41} {arrow} {mail}",
            format!("{both}  as {}", testbed.edge_ip(family))
        );
    }
    println!(
        "\n  engine {}, daemon pid {}, metrics on {} of the edge",
        engine.name(),
        injector.pid(),
        testbed.metrics()
    );
    if with_inline {
        let addresses = testbed.families.iter().map(|family| testbed.listener(INLINE, *family).to_string());
        println!("  beside it engine inline, on {}", addresses.collect::<Vec<_>>().join(" and "));
    }
}

/// The connection without a header.
pub(super) fn without_header(visit: &Visit) {
    heading("Straight to the backend, without a header");
    match &visit.header {
        Err(refusal) => row("the backend closed the connection", &styled(Style::Dim, &refusal.to_string())),
        Ok(_) => row("the backend accepted it", &styled(Style::Red, "it must not")),
    }
}

/// One family's message, there and back.
pub(super) fn scenario(scenario: &Scenario, testbed: &Testbed) {
    for transaction in &scenario.transactions {
        let (protocol, what) = match transaction.service.protocol {
            Protocol::Smtp => ("SMTP", "a message sent through the injector"),
            Protocol::Imap => ("IMAP", "the message fetched through the injector"),
        };
        let family = if scenario.family == Family::V4 { "IPv4" } else { "IPv6" };
        heading(&format!("{protocol} over {family}: {what}"));
        addresses(transaction, testbed, scenario.family);
        match transaction.service.protocol {
            Protocol::Smtp => {
                message("stored by the backend", &scenario.sent, &scenario.stored);
                header_in_full(transaction);
            }
            Protocol::Imap => message("fetched by the client", &scenario.sent, &scenario.fetched),
        }
    }
}

pub(super) fn addresses(transaction: &Transaction, testbed: &Testbed, family: Family) {
    row("the client is", &transaction.client.to_string());
    let edge =
        if transaction.visit.peer.ip() == testbed.edge_ip(family) { "the edge" } else { "not the edge" };
    row("the TCP peer that the backend sees is", &format!("{}  ({edge})", transaction.visit.peer));
    let seen = match &transaction.visit.header {
        Ok(header) => {
            header.source.map_or_else(|| "no address (LOCAL)".to_owned(), |source| source.to_string())
        }
        Err(refusal) => refusal.to_string(),
    };
    let same = seen == transaction.client.to_string();
    row("the client in the header is", &format!("{}  {}", styled(Style::Cyan, &seen), mark(same)));
}

pub(super) fn message(what: &str, sent: &[u8], arrived: &[u8]) {
    let same = sent == arrived;
    let verdict = if same { "the same bytes as sent" } else { "NOT the bytes sent" };
    row(what, &format!("{} bytes, {verdict}  {}", count(arrived.len() as u64), mark(same)));
}

fn header_in_full(transaction: &Transaction) {
    let Ok(seen) = &transaction.visit.header else { return };
    println!("  the header, {} bytes, whole in the backend's first read:", seen.raw.len());
    match header::fields(&seen.raw) {
        Ok(fields) => {
            for header::Field { bytes, meaning } in fields {
                println!("    {:<50}{meaning}", hex(&bytes));
            }
        }
        Err(error) => println!("    {}: {error}", hex(&seen.raw)),
    }
}

/// The injector's own account: planes, metrics, access log.
pub(super) fn summary(run: &Run) {
    planes(run);
    metrics(&run.before, &run.after);
    heading("The daemon's access log");
    for transaction in run.transactions() {
        access_log_line(&transaction.line);
    }
}

/// One line of the access log.
pub(super) fn access_log_line(line: &Value) {
    for line in wrapped(&words(line)) {
        println!("{line}");
    }
}

fn planes(run: &Run) {
    heading("Payload by plane");
    let columns = |name: &str, kernel: &str, daemon: &str, share: &str| {
        println!("  {name:<26}{kernel:>18}{daemon:>18}{share:>18}");
    };
    columns("bytes", "kernel (spliced)", "daemon (relayed)", "kernel's share");
    let line = |name: &str, spliced: u64, relayed: u64| {
        columns(name, &count(spliced), &count(relayed), &share(spliced, relayed));
    };
    for transaction in run.transactions() {
        for (way, direction) in [("→ backend", "to_backend"), ("→ client", "to_client")] {
            let spliced = transaction.logged(&format!("spliced_{direction}"));
            let all = transaction.logged(&format!("bytes_{direction}"));
            line(&format!("{:<10} {way}", transaction.listener_name()), spliced, all.saturating_sub(spliced));
        }
    }
    let carried = assertions::carried(run);
    line("all        → backend", carried.spliced_to_backend, carried.relayed_to_backend);
    line("all        → client", carried.spliced_to_client, carried.relayed_to_client);
}

/// The kernel's share in tenths of a percent, rounded down: 100 % means every byte.
fn share(spliced: u64, relayed: u64) -> String {
    let thousandths = (spliced * 1000).checked_div(spliced + relayed);
    thousandths.map_or_else(|| "-".to_owned(), |share| format!("{}.{} %", share / 10, share % 10))
}

/// Metrics that changed, summed over listeners, without buckets of histograms and creation times of
/// series.
fn metrics(before: &Metrics, after: &Metrics) {
    heading("Metrics that changed, summed over listeners");
    changes(before, after, |_| true);
}

/// The same, only those whose title is chosen.
pub(super) fn changes(before: &Metrics, after: &Metrics, chosen: fn(&str) -> bool) {
    let mut changes = totals(after);
    for (title, earlier) in totals(before) {
        *changes.entry(title).or_default() -= earlier;
    }
    let changed = |(title, change): &(String, f64)| *change != 0.0 && chosen(title);
    for (title, change) in changes.into_iter().filter(changed) {
        println!("  {:>12}  {title}", signed(change));
    }
}

/// The sum of every series over all listeners, by name and remaining labels.
fn totals(metrics: &Metrics) -> BTreeMap<String, f64> {
    let shown = |sample: &&Sample| !sample.name.ends_with("_bucket") && !sample.name.ends_with("_created");
    let mut totals = BTreeMap::new();
    for sample in metrics.samples().iter().filter(shown) {
        *totals.entry(title(sample)).or_default() += sample.value;
    }
    totals
}

fn title(sample: &Sample) -> String {
    let others = sample.labels.iter().filter(|(name, _)| name != "listener");
    let labels: Vec<_> = others.map(|(name, value)| format!("{name}={value}")).collect();
    if labels.is_empty() { sample.name.clone() } else { format!("{}{{{}}}", sample.name, labels.join(",")) }
}

/// `+1,234`, or with six decimals if it is not a whole number (seconds).
fn signed(change: f64) -> String {
    let sign = if change < 0.0 { '-' } else { '+' };
    let size = change.abs();
    if size.fract() != 0.0 {
        return format!("{sign}{size:.6}");
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "whole and positive; saturates"
    )]
    let whole = size as u64;
    format!("{sign}{}", count(whole))
}

/// The fields that begin a line, in this order; the others follow by name.
const FIRST_FIELDS: [&str; 5] = ["client", "listener", "local", "backend", "engine"];

/// Fields that every log line has, and that add nothing here.
const FRAME_FIELDS: [&str; 4] = ["timestamp", "level", "target", "message"];

/// A line of the log as `name=value`.
fn words(line: &Value) -> Vec<String> {
    let Some(fields) = line.as_object() else { return vec![line.to_string()] };
    let word = |name: &str, value: &Value| match value {
        Value::String(text) => format!("{name}={text}"),
        other => format!("{name}={other}"),
    };
    let first = FIRST_FIELDS.iter().filter_map(|name| Some(word(name, fields.get(*name)?)));
    let is_other = |name: &str| !FIRST_FIELDS.contains(&name) && !FRAME_FIELDS.contains(&name);
    let others = fields.iter().filter(|(name, _)| is_other(name)).map(|(name, value)| word(name, value));
    first.chain(others).collect()
}

/// The daemon's whole log.
pub(super) fn log(injector: &Injector) {
    heading("The daemon's log");
    for line in injector.log().lines() {
        println!("  {line}");
    }
}

/// The folder of the files that are kept.
pub(super) fn kept(directory: &Path) {
    println!("\nThe daemon's configuration and log are kept in {}", directory.display());
}

/// Every assertion, and one line for all of them, with what was shown beside; true if all hold.
pub(super) fn verdict(assertions: &[Assertion], testbed: &Testbed, run: &Run, beside: Option<&str>) -> bool {
    heading("Assertions");
    for assertion in assertions {
        println!("  {} {}", mark(assertion.failure.is_none()), assertion.text);
        if let Some(failure) = &assertion.failure {
            println!("      {}", styled(Style::Red, failure));
        }
    }
    let failed = assertions.iter().filter(|assertion| assertion.failure.is_some()).count();
    let carried = assertions::carried(run);
    let spliced = count(carried.spliced_to_backend + carried.spliced_to_client);
    let relayed = count(carried.relayed_to_backend + carried.relayed_to_client);
    let place = if testbed.has_namespaces() { "three namespaces" } else { "loopback only" };
    let connections = run.transactions().count();
    println!();
    if failed == 0 {
        let sums = format!("{connections} connections, {spliced} bytes spliced, {relayed} relayed");
        let text = format!("PASSED: all {} assertions hold; {sums}; {place}", assertions.len());
        println!("{}", styled(Style::Green, &text));
        if let Some(beside) = beside {
            println!("{}", styled(Style::Green, &format!("        beside them {beside}")));
        }
    } else {
        println!(
            "{}",
            styled(
                Style::Red,
                &format!("FAILED: {failed} of {} assertions do not hold; {place}", assertions.len())
            )
        );
    }
    failed == 0
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn shares_are_rounded_down() {
        let cases = [
            ((0, 0), "-"),
            ((1, 0), "100.0 %"),
            ((9_999, 1), "99.9 %"),
            ((0, 5), "0.0 %"),
            ((1, 2), "33.3 %"),
        ];
        for ((spliced, relayed), text) in cases {
            assert_eq!(share(spliced, relayed), text);
        }
    }

    #[test]
    fn a_log_line_begins_with_client_and_listener() {
        let line = json!({"timestamp": "t", "level": "INFO", "message": "connection closed", "reason": "idle",
            "client": "192.0.2.1:9", "engine": "splice", "bytes": 7, "listener": "smtp"});
        let words = words(&line);
        assert_eq!(words[..3], ["client=192.0.2.1:9", "listener=smtp", "engine=splice"]);
        let mut others = words[3..].to_vec();
        others.sort();
        assert_eq!(others, ["bytes=7", "reason=idle"]);
    }

    #[test]
    fn listeners_are_summed_and_other_labels_are_not() {
        let text = "a_total{listener=\"smtp\",plane=\"spliced\"} 2\na_total{listener=\"imap\",plane=\"spliced\"} 3\n\
            a_total{listener=\"imap\",plane=\"relayed\"} 4\nb_bucket{le=\"1\"} 5\nb_sum 6\n# EOF\n";
        let totals = totals(&Metrics::parse(text).unwrap());
        let totals: Vec<_> = totals.iter().map(|(title, total)| (title.as_str(), *total)).collect();
        assert_eq!(
            totals,
            [("a_total{plane=relayed}", 4.0), ("a_total{plane=spliced}", 5.0), ("b_sum", 6.0)]
        );
    }

    #[test]
    fn changes_carry_their_sign() {
        let cases = [(1234.0, "+1,234"), (-2.0, "-2"), (0.0125, "+0.012500")];
        for (change, text) in cases {
            assert_eq!(signed(change), text);
        }
    }
}
