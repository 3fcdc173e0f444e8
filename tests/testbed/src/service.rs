//! The ports of a mail host, standard ones and those behind the injector.

/// How a client secures the connection to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Security {
    /// Clear text.
    Plain,
    /// Clear text until STARTTLS (RFC 3207).
    StartTls,
    /// TLS from the first byte (RFC 8314).
    ImplicitTls,
}

/// One service, as clients and the injector reach it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name in the injector's configuration (`protocol = …`).
    pub protocol: &'static str,
    /// The standard port, which clients use, and the mail network directly, without a PROXY header.
    pub standard: u16,
    /// The mail host's port that requires a PROXY header.
    pub proxied: u16,
    /// What a client does after connecting.
    pub security: Security,
}

/// SMTP between servers, with postscreen in front.
pub const SMTP: Service =
    Service { protocol: "smtp", standard: 25, proxied: 2525, security: Security::Plain };
/// Submission with implicit TLS.
pub const SUBMISSIONS: Service =
    Service { protocol: "submissions", standard: 465, proxied: 4465, security: Security::ImplicitTls };
/// Submission with STARTTLS.
pub const SUBMISSION: Service =
    Service { protocol: "submission", standard: 587, proxied: 5587, security: Security::StartTls };
/// IMAP with STARTTLS; the mail host has it if Dovecot has [`CLEAR_IMAP`].
pub const IMAP: Service =
    Service { protocol: "imap", standard: 143, proxied: 10143, security: Security::StartTls };
/// IMAP with implicit TLS.
pub const IMAPS: Service =
    Service { protocol: "imaps", standard: 993, proxied: 10993, security: Security::ImplicitTls };
/// POP3 with implicit TLS.
pub const POP3S: Service =
    Service { protocol: "pop3s", standard: 995, proxied: 10995, security: Security::ImplicitTls };

/// The four ports of the matrix, in the order reports list them.
pub const MATRIX: [Service; 4] = [SMTP, SUBMISSIONS, SUBMISSION, IMAPS];

/// Dovecot's settings for [`IMAP`], which allow passwords in clear text besides STARTTLS.
pub const CLEAR_IMAP: &str = "
ssl = yes
disable_plaintext_auth = no
service imap-login {
  inet_listener imap {
    port = 143
  }
  inet_listener imap_proxied {
    port = 10143
    haproxy = yes
  }
}
";
