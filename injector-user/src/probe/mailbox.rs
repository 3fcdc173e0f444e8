//! Fetches the message by IMAP, and deletes the messages of this run and earlier ones.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use async_imap::{Client, Session, error::Error, types::Uid};
use futures_util::TryStreamExt as _;

use super::{
    args::{Password, ProbeArgs, Security},
    message::{TAG_HEADER, Tag},
    step::{Clock, Failure, Step},
    tls::{self, Stream, Trust},
};

/// How often the probe searches the mailbox until the message has arrived.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// An opened mailbox.
pub(super) struct Mailbox(Session<Box<dyn Stream>>);

impl Mailbox {
    /// Connects, logs in and selects the mailbox.
    pub(super) async fn open(
        args: &ProbeArgs,
        trust: &Trust,
        password: &Password,
        clock: &mut Clock,
    ) -> Result<Self, Failure> {
        let security = args.imap_security();
        let name = args.tls_name_of(&args.imap);
        let tcp = clock.step(Step::ImapConnect, tls::connect(&args.imap)).await?;
        let stream: Box<dyn Stream> = match security {
            Security::Implicit => Box::new(clock.step(Step::ImapTls, trust.secure(tcp, name)).await?),
            Security::None | Security::Starttls => Box::new(tcp),
        };
        let mut client = Client::new(stream);
        let greeting = async {
            client.read_response().await?.context("the server closed the connection without a greeting")
        };
        clock.step(Step::ImapGreeting, greeting).await?;
        if security == Security::Starttls {
            let starttls = async {
                client.run_command_and_check_ok("STARTTLS", None).await.map_err(server_error)?;
                let secured: Box<dyn Stream> = Box::new(trust.secure(client.into_inner(), name).await?);
                Ok::<_, anyhow::Error>(Client::new(secured))
            };
            client = clock.step(Step::ImapTls, starttls).await?;
        }
        let login = async {
            let login = client.login(&args.user, password.expose()).await;
            let mut session = login.map_err(|(error, _)| server_error(error))?;
            let selected = session.select(&args.mailbox).await.map_err(server_error);
            selected.with_context(|| format!("cannot select {:?}", args.mailbox))?;
            Ok::<_, anyhow::Error>(Self(session))
        };
        clock.step(Step::ImapLogin, login).await
    }

    /// Waits until the message has arrived.
    pub(super) async fn find(&mut self, tag: &Tag) -> Result<Uid> {
        let query = format!("HEADER {TAG_HEADER} {}", tag.id);
        loop {
            if let Some(uid) = self.0.uid_search(&query).await.map_err(server_error)?.into_iter().next() {
                return Ok(uid);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
            // Some servers report new messages only in reply to a command.
            self.0.noop().await.map_err(server_error)?;
        }
    }

    /// A message as the server returns it.
    pub(super) async fn fetch(&mut self, uid: Uid) -> Result<Vec<u8>> {
        let fetched = self.0.uid_fetch(uid.to_string(), "BODY.PEEK[]").await.map_err(server_error)?;
        let fetched: Vec<_> = fetched.try_collect().await.map_err(server_error)?;
        let body = fetched.iter().find_map(|fetch| fetch.body());
        body.map(<[u8]>::to_vec).context("the server found the message but did not return it")
    }

    /// Deletes the message of this run and those that earlier runs of the same probe left, which
    /// began more than `limit` ago. Returns the number of the latter.
    pub(super) async fn clean(&mut self, tag: &Tag, limit: Duration) -> Result<usize> {
        let query = format!("HEADER {TAG_HEADER} \"{} \"", tag.probe);
        let found = self.0.uid_search(&query).await.map_err(server_error)?;
        let mut own = Vec::new();
        let mut left = 0;
        for uid in found {
            let Some(other) = self.tag_of(uid).await? else { continue };
            let leftover = tag.is_leftover(&other, limit);
            if leftover || other == *tag {
                own.push(uid.to_string());
                left += usize::from(leftover);
            }
        }
        if !own.is_empty() {
            self.delete(&own.join(",")).await?;
        }
        Ok(left)
    }

    async fn tag_of(&mut self, uid: Uid) -> Result<Option<Tag>> {
        let wanted = format!("BODY.PEEK[HEADER.FIELDS ({TAG_HEADER})]");
        let fetched = self.0.uid_fetch(uid.to_string(), &wanted).await.map_err(server_error)?;
        let fetched: Vec<_> = fetched.try_collect().await.map_err(server_error)?;
        let header = fetched.iter().find_map(|fetch| fetch.header());
        let header = header.map(String::from_utf8_lossy);
        Ok(header.and_then(|header| Tag::parse(header.split_once(':')?.1)))
    }

    async fn delete(&mut self, uids: &str) -> Result<()> {
        let stored = self.0.uid_store(uids, "+FLAGS.SILENT (\\Deleted)").await.map_err(server_error)?;
        stored.try_collect::<Vec<_>>().await.map_err(server_error)?;
        let has_uidplus = self.0.capabilities().await.map_err(server_error)?.has_str("UIDPLUS");
        if has_uidplus {
            let expunged = self.0.uid_expunge(uids).await.map_err(server_error)?;
            expunged.try_collect::<Vec<_>>().await.map_err(server_error)?;
        } else {
            let expunged = self.0.expunge().await.map_err(server_error)?;
            expunged.try_collect::<Vec<_>>().await.map_err(server_error)?;
        }
        Ok(())
    }

    /// Logs out; the result is known, so errors do not matter.
    pub(super) async fn close(mut self) {
        let _ = tokio::time::timeout(Duration::from_secs(2), self.0.logout()).await;
    }
}

/// The server's reply, without the library's wrapping.
fn server_error(error: Error) -> anyhow::Error {
    match error {
        Error::No(text) => anyhow!("the server replied NO: {text}"),
        Error::Bad(text) => anyhow!("the server replied BAD: {text}"),
        other => anyhow!(other),
    }
}
