//! Health checks against real servers: the servers understand them, and are not harmed.

use std::fmt::Write as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use injector_testbed::daemon::{ADMIN, Injector};
use injector_testbed::netns::{MAIL, VIP_RELAY};
use injector_testbed::service::{MATRIX, SUBMISSION, Service};
use serde_json::Value;

use crate::testbed::Testbed;

/// The first port on the public address that the shared instance does not use.
const PORT: u16 = 8100;
/// Number of checks of each kind.
const CHECKS: u64 = 2;
/// postscreen greets an unknown client after some seconds, and a loaded machine takes its time.
const LIMIT: Duration = Duration::from_secs(90);

/// A listener with a checked backend.
fn listener(number: u16, service: Service, name: &str, check: &str) -> String {
    let Service { protocol, proxied, .. } = service;
    let (bind, backend) = (PORT + number, MAIL.v4);
    format!(
        "[[listener]]\nname = \"{protocol}-{name}\"\nprotocol = \"{protocol}\"\nengine = \"relay\"\n\
         bind = [\"{}:{bind}\"]\nbackends = [\"{backend}:{proxied}\"]\n[listener.health]\ncheck = \"mail\"\n\
         interval = \"300ms\"\nfall = 1\n{check}\n",
        VIP_RELAY.v4
    )
}

/// With LOCAL on the ports that require a header, TLS among them, and without a header on the
/// standard ports: the servers respond, and none of their processes dies, even if a check is
/// aborted.
pub(crate) fn understood(testbed: &Testbed) -> anyhow::Result<()> {
    let mut config = format!("[metrics]\nlisten = \"127.0.0.1:9198\"\n{ADMIN}");
    for (number, service) in (0..).zip(MATRIX) {
        // Writing to a String cannot fail.
        let patient = "timeout = \"15s\"";
        config += &listener(2 * number, service, "own", &format!("header = \"local\"\n{patient}"));
        let _ = write!(
            config,
            "{}",
            listener(2 * number + 1, service, "standard", &format!("port = {}\n{patient}", service.standard))
        );
    }
    config += &listener(90, SUBMISSION, "hasty", "header = \"local\"\ntimeout = \"1ms\"");
    let marks = testbed.host.mark();
    let injector = Injector::start(&testbed.topology.edge, &config)?;
    let deadline = Instant::now() + LIMIT;
    let counted = |backend: &Value, what: &str| backend[what].as_u64().unwrap_or_default();
    loop {
        let status = injector.status()?;
        let listeners = status["listeners"].as_array().cloned().unwrap_or_default();
        let backends: Vec<_> = listeners
            .iter()
            .map(|listener| (listener["name"].to_string(), &listener["backends"][0]))
            .collect();
        let enough = |(name, backend): &(String, &Value)| {
            let hasty = name.contains("hasty");
            counted(backend, if hasty { "checks_failed" } else { "checks_passed" }) >= CHECKS
        };
        for (name, backend) in backends.iter().filter(|(name, _)| !name.contains("hasty")) {
            ensure!(counted(backend, "checks_failed") == 0, "{name}: {backend:#}\n{}", injector.log());
        }
        if backends.len() == 2 * MATRIX.len() + 1 && backends.iter().all(enough) {
            break;
        }
        ensure!(Instant::now() < deadline, "{status:#}\n{}", injector.log());
        thread::sleep(Duration::from_millis(100));
    }
    injector.stop()?;
    let logged = testbed.host.logged_since(marks);
    for word in ["fatal:", "panic:", "Panic:", "Fatal:", "killed by signal", "bad command startup"] {
        ensure!(!logged.contains(word), "{word} in what the servers logged:\n{logged}");
    }
    // The checks were logged.
    ensure!(logged.contains("QUIT") || logged.contains("quit=1"), "{logged}");
    Ok(())
}
