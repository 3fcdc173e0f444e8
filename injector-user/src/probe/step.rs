//! The steps of a roundtrip, the clock that times them, and what to do when one fails.

use std::{
    fmt::{self, Display},
    future::Future,
    time::Duration,
};

use tokio::time::{Instant, timeout_at};

/// One step. The names are a closed set: they are values of the label `step`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// TCP to the SMTP server.
    SmtpConnect,
    /// The TLS handshake, and STARTTLS before it.
    SmtpTls,
    /// Banner and EHLO: behind the injector, the first sign that the PROXY header was accepted.
    SmtpGreeting,
    /// AUTH, if the server offers it.
    SmtpLogin,
    /// From MAIL FROM until the server has accepted the message.
    SmtpSend,
    /// TCP to the IMAP server.
    ImapConnect,
    /// The TLS handshake, and STARTTLS before it.
    ImapTls,
    /// The greeting.
    ImapGreeting,
    /// LOGIN and SELECT.
    ImapLogin,
    /// Waiting until the message is in the mailbox.
    Arrival,
    /// Fetching the message and comparing it.
    Content,
    /// The client's address in the oldest Received line, if one is expected.
    ClientAddress,
    /// Deleting the message, and older ones that earlier runs left.
    Cleanup,
    /// Testing whether the mail server's PROXY ports are closed to this host, if any are given.
    ProxyPort,
}

impl Step {
    /// All of them, in the order of a roundtrip.
    pub const ALL: [Self; 14] = [
        Self::SmtpConnect,
        Self::SmtpTls,
        Self::SmtpGreeting,
        Self::SmtpLogin,
        Self::SmtpSend,
        Self::ImapConnect,
        Self::ImapTls,
        Self::ImapGreeting,
        Self::ImapLogin,
        Self::Arrival,
        Self::Content,
        Self::ClientAddress,
        Self::Cleanup,
        Self::ProxyPort,
    ];

    /// The name in labels and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SmtpConnect => "smtp_connect",
            Self::SmtpTls => "smtp_tls",
            Self::SmtpGreeting => "smtp_greeting",
            Self::SmtpLogin => "smtp_login",
            Self::SmtpSend => "smtp_send",
            Self::ImapConnect => "imap_connect",
            Self::ImapTls => "imap_tls",
            Self::ImapGreeting => "imap_greeting",
            Self::ImapLogin => "imap_login",
            Self::Arrival => "arrival",
            Self::Content => "content",
            Self::ClientAddress => "client_address",
            Self::Cleanup => "cleanup",
            Self::ProxyPort => "proxy_port",
        }
    }

    /// What to do when it fails.
    #[must_use]
    pub const fn advice(self) -> &'static str {
        match self {
            Self::SmtpConnect | Self::ImapConnect => {
                "check that the injector runs and listens there, and that no firewall is in between"
            }
            Self::SmtpTls | Self::ImapTls => {
                "compare the certificate's name and authority with --tls-name and --ca, and check whether the port expects \
                 TLS from the first byte or STARTTLS"
            }
            Self::SmtpGreeting | Self::ImapGreeting => {
                "the port is open, but its server sent no greeting or an unexpected one: check that the backend is up and \
                 accepts the PROXY header (metric injector_connections_rejected_total and the backend's log)"
            }
            Self::SmtpLogin | Self::ImapLogin => {
                "check --user, the file of --password-file and --mailbox against the mail server's log"
            }
            Self::SmtpSend => {
                "the server rejected the message: check its reply, --from and --to; a 4xx reply may be greylisting: exempt \
                 the probe from it"
            }
            Self::Arrival => {
                "the server accepted the message, but it is not in the mailbox: check the mail server's queue, its delivery \
                 log and the spam folder, and that mail to --to is delivered to the mailbox of --user"
            }
            Self::Content => {
                "the message was changed on the way: check whether a filter rewrites mail, and exempt the probe's mail \
                 from it; otherwise report this with the injector's log"
            }
            Self::ClientAddress => {
                "the mail server recorded another client address: check that the port requires the PROXY header, that \
                 nothing in front of the injector hides the client, and the value of --expect-client"
            }
            Self::ProxyPort => {
                "close the port to all hosts but the injector's with a firewall (docs/security.md, \"Closing the PROXY \
                 ports\"); if it relays, also set smtpd_relay_restrictions=permit_sasl_authenticated,\
                 reject_unauth_destination on that service. `injector doctor --untrusted` prints both"
            }
            Self::Cleanup => {
                "delete the probe's messages by hand, and check whether the mailbox is read-only"
            }
        }
    }
}

impl Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Where a roundtrip ended, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The step that failed.
    pub step: Step,
    /// What was attempted, and the error.
    pub error: String,
}

/// Times the steps, and aborts them when the time is over.
#[derive(Debug)]
pub(super) struct Clock {
    began: Instant,
    limit: Duration,
    steps: Vec<(Step, Duration)>,
}

impl Clock {
    pub(super) fn start(limit: Duration) -> Self {
        Self { began: Instant::now(), limit, steps: Vec::new() }
    }

    /// Runs one step. A failed one is timed as well.
    pub(super) async fn step<T, E: Display>(
        &mut self,
        step: Step,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Failure> {
        let start = Instant::now();
        let done = timeout_at(self.began + self.limit, work).await;
        self.steps.push((step, start.elapsed()));
        let error = match done {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => {
                let limit = humantime::format_duration(self.limit);
                format!(
                    "not finished within the {limit} of --timeout, {:.1} s into this step",
                    start.elapsed().as_secs_f64()
                )
            }
        };
        Err(Failure { step, error })
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    pub(super) fn into_steps(self) -> Vec<(Step, Duration)> {
        self.steps
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, future::pending};

    use super::*;

    #[test]
    fn names_differ_and_every_step_has_advice() {
        let mut names = Step::ALL.map(Step::name).to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Step::ALL.len());
        assert!(Step::ALL.iter().all(|step| step.advice().len() > 20));
    }

    #[tokio::test]
    async fn a_step_that_hangs_is_aborted_and_timed() {
        let mut clock = Clock::start(Duration::from_millis(30));
        clock.step(Step::SmtpConnect, async { Ok::<_, Infallible>(()) }).await.unwrap();
        let failure = clock.step(Step::Arrival, pending::<Result<(), Infallible>>()).await.unwrap_err();
        assert_eq!(failure.step, Step::Arrival);
        assert!(failure.error.starts_with("not finished within the 30ms"), "{}", failure.error);
        let steps = clock.into_steps();
        assert_eq!(
            steps.iter().map(|(step, _)| *step).collect::<Vec<_>>(),
            [Step::SmtpConnect, Step::Arrival]
        );
        assert!(steps[1].1 >= Duration::from_millis(20));
    }
}
