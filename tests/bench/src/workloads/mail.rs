//! Real mail: Postfix' own `smtp-source` through the system to Postfix, which discards it.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use injector_load::cpu::Cpu;
use injector_load::service::PortKind;

use super::{Measured, MeasurementContext, Workload, cpu_figure, figure, float, measured};
use crate::mail_sink::{BARE, DOMAIN, MailSink, PROXIED};
use crate::record::Figure;
use injector_testbed::netns::CLIENT;

/// Simultaneous sessions.
const SENDERS: &str = "16";
/// Bytes of a message.
const LENGTH: &str = "4096";
/// Messages per second of measurement, about what two processors do.
const PER_SECOND: f64 = 400.0;

/// Messages before the measurement.
const WARM_UP: u64 = 64;

struct Mail;

pub(super) fn workload() -> Box<dyn Workload> {
    Box::new(Mail)
}

impl Workload for Mail {
    fn name(&self) -> String {
        "mail".to_owned()
    }

    fn about(&self) -> String {
        format!(
            "smtp-source to Postfix' smtpd, {SENDERS} at a time, one message of {LENGTH} bytes for each connection; \
             Postfix logs the client of every one"
        )
    }

    fn figures(&self) -> Vec<Figure> {
        vec![figure("rate", "messages/s", true, false), cpu_figure("CPU µs/message")]
    }

    fn measure(&self, context: &mut MeasurementContext<'_>) -> anyhow::Result<Measured> {
        let sink = MailSink::start(&context.testbed.topology.mail)?;
        // Postfix forks its processes for the first messages.
        send(context, WARM_UP)?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "thousands")]
        let messages = (PER_SECOND * context.seconds).clamp(1.0, 1e5) as u64;
        let mark = sink.log().mark();
        let before = Cpu::now()?;
        let begun = Instant::now();
        send(context, messages)?;
        let (seconds, cpu) = (begun.elapsed().as_secs_f64(), Cpu::now()? - before);
        if context.system.port_kind == PortKind::Header {
            ensure_clients(&sink, mark, messages)?;
        }
        let count = float(messages);
        Ok(measured(cpu, [("rate", count / seconds), ("cpu", cpu.busy() * 1e6 / count)]))
    }
}

fn send(context: &MeasurementContext<'_>, messages: u64) -> anyhow::Result<()> {
    let target = context.system.target_port(PROXIED, BARE);
    let mut command = context.testbed.topology.client.command("timeout");
    // smtp-source has no time limit of its own.
    command.arg("--signal=KILL").arg(format!("{}", 60.0 + 10.0 * context.seconds));
    command.args(["smtp-source", "-s", SENDERS, "-l", LENGTH, "-m", &messages.to_string()]);
    command.args(["-f", &format!("from@{DOMAIN}"), "-t", &format!("to@{DOMAIN}")]);
    command.arg(format!("{}:{}", target.ip(), target.port())).stdin(Stdio::null());
    let output = command.output().context("cannot run smtp-source (install postfix)")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "smtp-source: {}: {}", output.status, complaint.trim());
    Ok(())
}

/// Checks that Postfix saw the client's address for every message.
fn ensure_clients(
    sink: &MailSink,
    mark: injector_testbed::log_file::Mark,
    messages: u64,
) -> anyhow::Result<()> {
    let wanted = format!(": client=unknown[{}]", CLIENT.v4);
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let seen = sink.log().since(mark).lines().filter(|line| line.contains(&wanted)).count() as u64;
        if seen >= messages {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "Postfix saw the client behind {seen} of {messages} messages");
        std::thread::sleep(Duration::from_millis(50));
    }
}
