//! Backends that are Services of Kubernetes.

use std::fs;
use std::net::{IpAddr, SocketAddr};

use anyhow::ensure;
use injector_testbed::daemon::Injector;
use injector_testbed::kubernetes_api::ApiStub;
use injector_testbed::netns::MAIL;
use injector_testbed::wait::wait_until;
use tempfile::TempDir;

use crate::Run;
use crate::testbed::{BACKEND_PORTS, Config, Testbed};

pub(crate) const TRIALS: &[(&str, Run)] =
    &[("endpoints are followed, and their last state while the API is away", followed)];

fn endpoint(number: usize) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(MAIL.v4), BACKEND_PORTS[number])
}

/// Whether the API answered the last request, as the metrics have it.
fn is_up(injector: &Injector) -> anyhow::Result<bool> {
    let labels = [("service", "mail/mailserver"), ("resource", "endpointslices")];
    Ok(injector.metrics()?.sum("injector_kubernetes_watch_up", &labels) > 0.5)
}

fn followed(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _servers = [testbed.backend(0)?, testbed.backend(1)?];
    let mut api = ApiStub::start(&testbed.topology.edge)?;
    api.add("first", endpoint(0), true);
    let dir = TempDir::new()?;
    let kubeconfig = dir.path().join("kubeconfig");
    fs::write(&kubeconfig, ApiStub::kubeconfig())?;
    let mut config = Config::new(engine);
    config.top = format!("[kubernetes]\nkubeconfig = {kubeconfig:?}\n");
    config.backends = "{ service = \"mail/mailserver\", port = \"smtp\" }".to_owned();
    let injector = testbed.start(&config.text())?;
    let answers = |number: usize| wait_until("server", || testbed.who_answers(), move |it| *it == number);

    // The daemon is ready once it has asked; new clients wait for the answer no longer than for a server.
    answers(0)?;
    let mut session = testbed.client()?;
    session.greeted()?;
    api.add("second", endpoint(1), true);
    api.remove("first");
    answers(1)?;
    // Its endpoint has left, and has not ended.
    session.talk()?;

    api.go_down();
    wait_until("the API's end", || is_up(&injector), |up| !up)?;
    let warning = "following the service failed; its last known addresses stay in use";
    ensure!(injector.log().contains(warning), "{}", injector.log());
    ensure!(testbed.who_answers()? == 1, "another server while the API is away");
    session.talk()?;

    // What happens meanwhile is known once it is back.
    api.add("first", endpoint(0), true);
    api.remove("second");
    api.up(&testbed.topology.edge)?;
    answers(0)?;
    ensure!(is_up(&injector)?, "the API answers, and the metric says otherwise");
    session.talk()?;
    session.quit()?;
    let status = injector.command(&["status"])?;
    ensure!(status.contains("mail/mailserver"), "{status}");
    Ok(())
}
