//! `injector probe`: sends a message by SMTP, fetches it by IMAP, and times every step.
//!
//! The probe does not use the daemon: it is a mail client, and runs where clients run. From there
//! it also tests whether the mail server's PROXY ports are closed, as they should be. Read [`run`]
//! first.

mod args;
mod mailbox;
mod message;
mod proxy_port;
mod publish;
mod report;
mod smtp;
mod step;
mod tls;

use std::{
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result};

pub use self::{
    args::{EXAMPLES, ExpectedClient, Name, Password, ProbeArgs, Security, Server},
    proxy_port::{Exposure, ProxyPort},
    report::Report,
    step::{Failure, Step},
};
use self::{
    mailbox::Mailbox,
    message::{Message, Tag, received_from},
    step::Clock,
    tls::Trust,
};

/// Makes one roundtrip, prints its report and publishes its metrics. The exit code shows whether it
/// passed.
///
/// # Errors
/// When there is nothing to begin with (password file, authorities), or the metrics cannot be
/// published.
pub fn run(args: &ProbeArgs) -> Result<ExitCode> {
    let password = Password::read(&args.password_file)
        .with_context(|| format!("cannot read the password in {}", args.password_file.display()))?;
    let trust = Trust::new(args.ca.as_deref(), args.insecure)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(roundtrip(args, &trust, &password))?;
    if args.json {
        println!("{:#}", report.json());
    } else {
        print!("{}", report.text());
    }
    if let Some(file) = &args.textfile {
        publish::to_file(&report, file)?;
    }
    if let Some(url) = &args.pushgateway {
        publish::to_gateway(&report, url)?;
    }
    Ok(if report.failure.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn roundtrip(args: &ProbeArgs, trust: &Trust, password: &Password) -> Result<Report> {
    let began = SystemTime::now();
    let (name, body) = (random()?, random()?);
    let tag = Tag::new(args.name.as_str(), began, &name);
    let size = usize::try_from(args.size)?;
    let message = Message::new(&tag, args.from.as_ref(), args.to.as_ref(), began, size, &body);
    let mut clock = Clock::start(args.timeout);
    let roundtrip = async {
        let outcome = send_and_fetch(args, trust, password, &message, &tag, &mut clock).await;
        (outcome, clock.elapsed())
    };
    let ((outcome, took), (proxy_ports, ports_took)) = tokio::join!(roundtrip, check_proxy_ports(args));
    let (failure, leftovers) = match outcome {
        Ok(leftovers) => (None, leftovers),
        Err(failure) => (Some(failure), 0),
    };
    let failure = failure.or_else(|| {
        let error = proxy_ports.iter().find_map(ProxyPort::failure)?;
        Some(Failure { step: Step::ProxyPort, error })
    });
    let mut steps = clock.into_steps();
    if !proxy_ports.is_empty() {
        steps.push((Step::ProxyPort, ports_took));
    }
    let ended = SystemTime::now();
    Ok(Report { probe: tag.probe, id: tag.id, ended, took, steps, failure, proxy_ports, leftovers })
}

/// Runs in parallel with the roundtrip and does not affect it. Also returns the time it took.
async fn check_proxy_ports(args: &ProbeArgs) -> (Vec<ProxyPort>, Duration) {
    let began = Instant::now();
    (proxy_port::check_all(&args.proxy_port, args.timeout).await, began.elapsed())
}

/// Sends the message and fetches it; returns how many older messages were deleted.
async fn send_and_fetch(
    args: &ProbeArgs,
    trust: &Trust,
    password: &Password,
    message: &Message,
    tag: &Tag,
    clock: &mut Clock,
) -> Result<usize, Failure> {
    let local = smtp::send(args, trust, password, message, clock).await?;
    let mut mailbox = Mailbox::open(args, trust, password, clock).await?;
    let uid = clock.step(Step::Arrival, mailbox.find(tag)).await?;
    let content = async {
        let fetched = mailbox.fetch(uid).await?;
        message.compare(&fetched).map_err(anyhow::Error::msg)?;
        Ok::<_, anyhow::Error>(fetched)
    };
    let mut verdict = clock.step(Step::Content, content).await;
    if let (Ok(fetched), Some(expected)) = (&verdict, args.expect_client) {
        let expected = match expected {
            ExpectedClient::Local => local,
            ExpectedClient::Address(address) => address.to_canonical(),
        };
        let seen = async { check_client(expected, fetched) };
        if let Err(failure) = clock.step(Step::ClientAddress, seen).await {
            verdict = Err(failure);
        }
    }
    // Delete the messages even after a failure.
    let cleaned = clock.step(Step::Cleanup, mailbox.clean(tag, args.timeout)).await;
    mailbox.close().await;
    verdict.and(cleaned)
}

fn check_client(expected: std::net::IpAddr, fetched: &[u8]) -> Result<(), String> {
    let seen = received_from(fetched).ok_or("the message has no Received line")?;
    if seen.contains(&expected) {
        return Ok(());
    }
    let seen: Vec<_> = seen.iter().map(ToString::to_string).collect();
    let seen = if seen.is_empty() { "no address".to_owned() } else { seen.join(", ") };
    Err(format!("the mail server recorded the client as {seen}, not as {expected}"))
}

/// A random seed from the kernel.
fn random() -> Result<[u8; 32]> {
    let mut seed = [0; 32];
    let filled = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
    anyhow::ensure!(
        filled.context("cannot get random numbers from the kernel")? == seed.len(),
        "the kernel returned too few random numbers"
    );
    Ok(seed)
}
