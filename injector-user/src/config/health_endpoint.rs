//! `[health]`

use std::net::SocketAddr;

use super::parse::{
    address,
    section::{Section, Spanned},
};

/// `[health]`: an address for probes alone, so that a firewall may close the one with the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthEndpoint {
    /// Address of `/healthz` and `/readyz`.
    pub listen: SocketAddr,
}

/// The port in suggestions: the one after that of the metrics.
const EXAMPLE_PORT: u16 = 9146;

pub(super) fn read(
    section: Section<'_>,
    metrics: Option<Spanned<SocketAddr>>,
) -> Option<Spanned<SocketAddr>> {
    let listen = section.required("listen", |section, field| section.string(field));
    let listen = listen.and_then(|(at, text)| address::listen(&section, at, text, EXAMPLE_PORT));
    if let (Some((at, address)), Some((metrics_at, metrics))) = (listen, metrics)
        && address::overlap(address, metrics)
    {
        let line = section.line(metrics_at);
        let message = format!(
            " \"{address}\": overlaps metrics.listen in line {line}, which answers /healthz and /readyz too: \
             leave [health] out, or choose another port"
        );
        section.report_field(at, "listen", &message);
    }
    section.finish();
    listen
}
