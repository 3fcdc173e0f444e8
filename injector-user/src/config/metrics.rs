//! `[metrics]`

use std::net::SocketAddr;

use super::parse::{
    address,
    section::{Section, Spanned},
};

/// `[metrics]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metrics {
    /// Address of `/metrics`, `/healthz` and `/readyz`.
    pub listen: SocketAddr,
}

/// The port in suggestions.
const EXAMPLE_PORT: u16 = 9145;

pub(super) fn read(section: Section<'_>) -> Option<Spanned<SocketAddr>> {
    let listen = section.required("listen", |section, field| section.string(field));
    let listen = listen.and_then(|(at, text)| address::listen(&section, at, text, EXAMPLE_PORT));
    section.finish();
    listen
}
