//! The command line of `injector probe`.

use std::{
    fmt, io,
    net::IpAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::{Args, ValueEnum};
use lettre::Address;

use crate::config::{DurationError, parse_duration};

/// Shown at the end of `injector probe --help`.
pub const EXAMPLES: &str = "\
Examples:
  By hand: port 25 through the injector, and back by IMAP
    $ injector probe --smtp mx.example.org:25 --smtp-tls starttls --imap imap.example.org:993 \\
        --user probe --password-file /etc/injector/probe.password \\
        --from probe@example.org --to probe@example.org

  And from outside: the ports with the PROXY header are closed to this host
    $ injector probe --proxy-port mail.example.org:2525 --proxy-port mail.example.org:10993 …

  By a timer, for node_exporter's textfile collector; the other flags from the environment
    $ injector probe --textfile /var/lib/prometheus/node-exporter/injector_probe.prom";

/// Arguments of `injector probe`.
#[derive(Clone, Debug, Args)]
pub struct ProbeArgs {
    /// SMTP server that receives the message
    #[arg(long, env = "INJECTOR_SMTP", value_name = "HOST:PORT")]
    pub smtp: Server,

    /// TLS mode of the SMTP connection [default: implicit on port 465, starttls on 587, else none]
    ///
    /// If it is secured and the server offers AUTH, the probe logs in.
    #[arg(long, env = "INJECTOR_SMTP_TLS", value_name = "TLS")]
    pub smtp_tls: Option<Security>,

    /// IMAP server from which the message is fetched
    #[arg(long, env = "INJECTOR_IMAP", value_name = "HOST:PORT")]
    pub imap: Server,

    /// TLS mode of the IMAP connection [default: implicit on port 993, else starttls]
    ///
    /// With "none" the password crosses the network in clear.
    #[arg(long, env = "INJECTOR_IMAP_TLS", value_name = "TLS")]
    pub imap_tls: Option<Security>,

    /// User name for SMTP and IMAP
    #[arg(long, env = "INJECTOR_USER", value_name = "NAME")]
    pub user: String,

    /// A file with the password in its first line
    #[arg(long, env = "INJECTOR_PASSWORD_FILE", value_name = "FILE")]
    pub password_file: PathBuf,

    /// The sender of the message
    #[arg(long, env = "INJECTOR_FROM", value_name = "ADDRESS")]
    pub from: Address,

    /// Recipient of the message; must be delivered to the mailbox of --user
    #[arg(long, env = "INJECTOR_TO", value_name = "ADDRESS")]
    pub to: Address,

    /// The mailbox in which the message arrives
    #[arg(long, env = "INJECTOR_MAILBOX", value_name = "NAME", default_value = "INBOX")]
    pub mailbox: String,

    /// Trust the authorities in this PEM file, and no others [default: Mozilla's list, built in]
    #[arg(long, env = "INJECTOR_CA", value_name = "FILE", conflicts_with = "insecure")]
    pub ca: Option<PathBuf>,

    /// Do not check certificates at all
    #[arg(long, env = "INJECTOR_INSECURE")]
    pub insecure: bool,

    /// The name in the servers' certificates [default: the host in --smtp, and in --imap]
    #[arg(long, env = "INJECTOR_TLS_NAME", value_name = "NAME")]
    pub tls_name: Option<String>,

    /// The name with which the probe greets the SMTP server [default: this host's]
    #[arg(long, env = "INJECTOR_HELLO", value_name = "NAME")]
    pub hello: Option<String>,

    /// Fail unless the mail server logged this client address; "local" is the address of the
    /// probe's own socket
    ///
    /// It is read from the oldest Received line, so it shows whether the mail server trusts the PROXY header.
    #[arg(long, env = "INJECTOR_EXPECT_CLIENT", value_name = "IP|local")]
    pub expect_client: Option<ExpectedClient>,

    /// A port of the mail server that requires a PROXY header, which must be closed to this host;
    /// repeatable, accepts a comma-separated list
    ///
    /// The probe sends a header with the source 127.0.0.1 (::1 over IPv6), as any host that reaches
    /// the port could, and fails if the port answers. It also reports whether the server would then
    /// relay mail to a foreign domain: it stops after RCPT TO and sends no message. Run the probe on
    /// a host other than the injector's.
    #[arg(long, env = "INJECTOR_PROXY_PORT", value_name = "HOST:PORT", value_delimiter = ',')]
    pub proxy_port: Vec<Server>,

    /// Size of the message's body in bytes
    #[arg(long, env = "INJECTOR_SIZE", value_name = "BYTES", default_value_t = 65536,
          value_parser = clap::value_parser!(u32).range(1..=10_485_760))]
    pub size: u32,

    /// Time limit of the whole roundtrip
    #[arg(long, env = "INJECTOR_TIMEOUT", value_name = "DURATION", default_value = "60s", value_parser = duration)]
    pub timeout: Duration,

    /// The name of this probe: the label `probe` of its metrics
    #[arg(long, env = "INJECTOR_NAME", value_name = "NAME", default_value = "mail")]
    pub name: Name,

    /// Write the metrics to this file, for node_exporter's textfile collector (which reads *.prom)
    #[arg(long, env = "INJECTOR_TEXTFILE", value_name = "FILE")]
    pub textfile: Option<PathBuf>,

    /// Push the metrics to the Pushgateway at this URL, such as http://127.0.0.1:9091
    #[arg(long, env = "INJECTOR_PUSHGATEWAY", value_name = "URL", value_parser = url)]
    pub pushgateway: Option<String>,

    /// Print the result as JSON
    #[arg(long, env = "INJECTOR_JSON")]
    pub json: bool,
}

impl ProbeArgs {
    /// How the SMTP connection is secured.
    #[must_use]
    pub fn smtp_security(&self) -> Security {
        self.smtp_tls.unwrap_or(match self.smtp.port {
            465 => Security::Implicit,
            587 => Security::Starttls,
            _ => Security::None,
        })
    }

    /// How the IMAP connection is secured.
    #[must_use]
    pub fn imap_security(&self) -> Security {
        self.imap_tls.unwrap_or(if self.imap.port == 993 { Security::Implicit } else { Security::Starttls })
    }

    /// The name that the server's certificate must have.
    #[must_use]
    pub fn tls_name_of<'a>(&'a self, server: &'a Server) -> &'a str {
        self.tls_name.as_deref().unwrap_or_else(|| server.certificate_name())
    }
}

/// A server, by name or address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// A name, or an address without brackets.
    pub host: String,
    /// Its port.
    pub port: u16,
}

impl Server {
    /// The host without the final dot of an absolute name, which TLS does not have (RFC 6066,
    /// section 3).
    fn certificate_name(&self) -> &str {
        self.host.strip_suffix('.').unwrap_or(&self.host)
    }
}

impl FromStr for Server {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const SHAPE: &str =
            "must be a host and a port, such as mail.example.org:25, 192.0.2.10:25 or [2001:db8::10]:25";
        let (host, port) = text.rsplit_once(':').ok_or(SHAPE)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or(SHAPE)?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = bracketed.unwrap_or(host);
        if host.is_empty() || bracketed.is_none() && host.contains(':') {
            return Err(SHAPE);
        }
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// How a connection is secured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Security {
    /// Clear text
    None,
    /// Clear text until STARTTLS
    Starttls,
    /// TLS from the first byte
    Implicit,
}

/// The client address that the mail server must have recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpectedClient {
    /// The address of the socket that sent the message.
    Local,
    /// This one.
    Address(IpAddr),
}

impl FromStr for ExpectedClient {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "local" {
            return Ok(Self::Local);
        }
        text.parse().map(Self::Address).map_err(|_| "must be an IP address, or \"local\"")
    }
}

/// The name of a probe. It becomes a label, part of a URL and part of a header, so few characters
/// are allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = |character: char| character.is_ascii_alphanumeric() || matches!(character, '-' | '_');
        if (1..=64).contains(&text.len()) && text.chars().all(plain) {
            return Ok(Self(text.to_owned()));
        }
        Err("must be 1 to 64 of A-Z, a-z, 0-9, - and _")
    }
}

/// A password. No output contains it.
#[derive(Clone)]
pub struct Password(String);

impl Password {
    /// The first line of a file.
    ///
    /// # Errors
    /// When it cannot be read, or the line is empty.
    pub fn read(path: &Path) -> io::Result<Self> {
        let text = std::fs::read_to_string(path)?;
        match text.lines().next() {
            Some(line) if !line.is_empty() => Ok(Self(line.to_owned())),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "its first line is empty")),
        }
    }

    /// For the server.
    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(…)")
    }
}

fn duration(text: &str) -> Result<Duration, DurationError> {
    parse_duration(text)
}

/// A password in the URL would show in the process list.
fn url(text: &str) -> Result<String, &'static str> {
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    let host = rest.and_then(|rest| rest.split('/').next()).unwrap_or_default();
    if host.is_empty()
        || host.contains('@')
        || text.contains(['?', '#'])
        || text.contains(char::is_whitespace)
    {
        return Err("must be a URL such as http://127.0.0.1:9091, without user, password or query");
    }
    Ok(text.trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_names_or_addresses_with_a_port() {
        for (text, host) in
            [("mx.example:25", "mx.example"), ("192.0.2.1:25", "192.0.2.1"), ("[::1]:25", "::1")]
        {
            let server: Server = text.parse().unwrap();
            assert_eq!((server.host.as_str(), server.port), (host, 25));
            assert_eq!(server.to_string(), text);
        }
        for text in ["mx.example", ":25", "mx.example:0", "mx.example:smtp", "::1:25", "[::1]", "[]:25"] {
            text.parse::<Server>().expect_err(text);
        }
    }

    #[test]
    fn a_certificate_has_no_final_dot() {
        for text in ["mx.example.:25", "mx.example:25"] {
            let server: Server = text.parse().unwrap();
            // The name is looked up as written.
            assert_eq!(server.to_string(), text);
            assert_eq!(server.certificate_name(), "mx.example");
        }
    }

    #[test]
    fn names_are_valid_in_labels_and_urls() {
        for text in ["mail", "mx1_587-v6"] {
            assert_eq!(text.parse::<Name>().unwrap().as_str(), text);
        }
        for text in ["", "a b", "a/b", "a\"b", "ä", &"x".repeat(65)] {
            text.parse::<Name>().expect_err(text);
        }
    }

    #[test]
    fn the_pushgateway_is_a_url_without_secrets() {
        assert_eq!(url("http://127.0.0.1:9091/").unwrap(), "http://127.0.0.1:9091");
        assert_eq!(url("https://push.example/base").unwrap(), "https://push.example/base");
        for text in
            ["127.0.0.1:9091", "http://", "http://user:word@host:9091", "http://host/?a", "ftp://host"]
        {
            url(text).expect_err(text);
        }
    }

    #[test]
    fn passwords_are_the_first_line_and_never_printed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "pass word\r\nand more\n").unwrap();
        let password = Password::read(file.path()).unwrap();
        assert_eq!(password.expose(), "pass word");
        assert_eq!(format!("{password:?}"), "Password(…)");
        std::fs::write(file.path(), "\n").unwrap();
        Password::read(file.path()).unwrap_err();
    }
}
