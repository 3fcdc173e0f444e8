//! Which sessions a command is for.

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use crate::config::Network;

/// The number of a session of splice or relay, or of an inline connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SessionId {
    Session(u64),
    Inline(u64),
}

/// Sessions by their number or by their client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SessionTarget {
    Id(SessionId),
    Client(SocketAddr),
    Clients(Network),
}

impl std::fmt::Display for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Session(id) => write!(f, "{id}"),
            Self::Inline(id) => write!(f, "i{id:x}"),
        }
    }
}

impl FromStr for SessionTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(id) = text.parse() {
            return Ok(Self::Id(SessionId::Session(id)));
        }
        if let Some(id) = text.strip_prefix('i').and_then(|hex| u64::from_str_radix(hex, 16).ok()) {
            return Ok(Self::Id(SessionId::Inline(id)));
        }
        if let Ok(client) = text.parse() {
            return Ok(Self::Client(client));
        }
        text.parse().map(Self::Clients).map_err(|error| {
            format!(
                "{text:?} names no session: give an ID of `injector sessions`, a client's address with or without \
                 port, or a network ({error})"
            )
        })
    }
}

impl SessionTarget {
    /// Whether it names this session.
    pub(super) fn matches(&self, id: SessionId, client: SocketAddr) -> bool {
        match self {
            Self::Id(wanted) => *wanted == id,
            Self::Client(wanted) => canonical(*wanted) == canonical(client),
            Self::Clients(network) => network.contains(client.ip().to_canonical()),
        }
    }
}

fn canonical(address: SocketAddr) -> (IpAddr, u16) {
    (address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_named_by_id_address_or_network() {
        let session = (SessionId::Session(17), "[::ffff:192.0.2.7]:40000".parse().unwrap());
        let inline = (SessionId::Inline(0xfe), "[2001:db8::7]:993".parse().unwrap());
        for (text, names) in [
            ("17", [true, false]),
            ("18", [false, false]),
            ("ife", [false, true]),
            ("192.0.2.7", [true, false]),
            ("192.0.2.7:40000", [true, false]),
            ("192.0.2.7:40001", [false, false]),
            ("192.0.2.0/24", [true, false]),
            ("192.0.3.0/24", [false, false]),
            ("2001:db8::/32", [false, true]),
            ("[2001:db8::7]:993", [false, true]),
            ("::/0", [false, true]),
            ("0.0.0.0/0", [true, false]),
        ] {
            let target: SessionTarget = text.parse().unwrap();
            let found = [session, inline].map(|(id, client)| target.matches(id, client));
            assert_eq!(found, names, "{text}");
        }
        for id in [session.0, inline.0] {
            assert_eq!(id.to_string().parse(), Ok(SessionTarget::Id(id)));
        }
    }

    #[test]
    fn other_words_are_refused_with_advice() {
        for text in ["", "smtp", "mail.example.org", "192.0.2.7/24", "-1"] {
            let error = text.parse::<SessionTarget>().unwrap_err();
            assert!(error.contains("give an ID of `injector sessions`"), "{error}");
        }
    }
}
