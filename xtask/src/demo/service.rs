//! The protocols that the demo shows.

use injector_testbed::demo_backend::Protocol;
use injector_testbed::netns::{Family, HostAddresses, VIP_INLINE, VIP_SPLICE};

/// A protocol of the demo.
#[derive(Clone, Copy, Debug)]
pub(super) struct Service {
    /// The protocol of the backend.
    pub(super) protocol: Protocol,
    /// The protocol's name in the injector's configuration.
    pub(super) name: &'static str,
    /// What the names of its listeners begin with.
    pub(super) listener: &'static str,
    /// Where clients connect, in namespaces.
    pub(super) address: HostAddresses,
    /// The backend's port where it can choose one: the alternative port that requires a header.
    pub(super) backend_port: u16,
}

/// Sending mail.
pub(super) const SMTP: Service = Service {
    protocol: Protocol::Smtp,
    name: "smtp",
    listener: "smtp",
    address: VIP_SPLICE,
    backend_port: 2525,
};
/// Reading mail, without TLS so that everything can be compared.
pub(super) const IMAP: Service = Service {
    protocol: Protocol::Imap,
    name: "imap",
    listener: "imap",
    address: VIP_SPLICE,
    backend_port: 10143,
};
/// Sending mail through the inline engine.
pub(super) const INLINE: Service = Service { listener: "inline", address: VIP_INLINE, ..SMTP };

impl Service {
    /// The listener's name for one family.
    pub(super) fn listener_name(self, family: Family) -> String {
        format!("{}-{}", self.listener, family.name())
    }
}
