//! The mail host: Postfix and Dovecot in the mail namespace, with one certificate; Postfix delivers
//! to Dovecot.

use anyhow::Context;
use tempfile::TempDir;

use crate::certificate::Certificate;
use crate::dovecot::Dovecot;
use crate::log_file::Mark;
use crate::netns::{self, Netns};
use crate::postfix::{Neighbours, Postfix};

/// Both servers; stopped on drop.
#[derive(Debug)]
pub struct MailHost {
    /// Receives mail.
    pub postfix: Postfix,
    /// Stores mail, and authenticates users.
    pub dovecot: Dovecot,
    /// The certificate of both.
    pub certificate: Certificate,
    _dir: TempDir,
}

/// Positions in both logs.
#[derive(Clone, Copy, Debug)]
pub struct Marks {
    /// In Postfix's.
    pub postfix: Mark,
    /// In Dovecot's.
    pub dovecot: Mark,
}

impl MailHost {
    /// Starts both servers.
    ///
    /// # Errors
    /// As [`Postfix::start`] and [`Dovecot::start`].
    pub fn start(netns: &Netns) -> anyhow::Result<Self> {
        Self::start_with(netns, "")
    }

    /// As [`Self::start`], with these lines after Dovecot's configuration.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(netns: &Netns, more_of_dovecot: &str) -> anyhow::Result<Self> {
        let dir = netns::scratch_dir("certificate")?;
        let certificate = Certificate::new(dir.path())?;
        let dovecot =
            Dovecot::start_adding(netns, &certificate, more_of_dovecot).context("cannot start Dovecot")?;
        let (lmtp_socket, auth_socket) = (dovecot.lmtp_socket(), dovecot.auth_socket());
        let neighbours =
            Neighbours { lmtp_socket: &lmtp_socket, auth_socket: &auth_socket, certificate: &certificate };
        let postfix = Postfix::start(netns, neighbours).context("cannot start Postfix")?;
        Ok(Self { postfix, dovecot, certificate, _dir: dir })
    }

    /// The current ends of both logs.
    #[must_use]
    pub fn mark(&self) -> Marks {
        Marks { postfix: self.postfix.log().mark(), dovecot: self.dovecot.log().mark() }
    }

    /// What both have logged since then, for error messages.
    #[must_use]
    pub fn logged_since(&self, marks: Marks) -> String {
        let (postfix, dovecot) =
            (self.postfix.log().since(marks.postfix), self.dovecot.log().since(marks.dovecot));
        format!("Postfix logged:\n{postfix}Dovecot logged:\n{dovecot}")
    }
}
