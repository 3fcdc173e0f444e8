//! The protocols that the demo shows.

use injector_testbed::demo_backend::Protocol;
use injector_testbed::netns::Family;

/// A protocol of the demo.
#[derive(Clone, Copy, Debug)]
pub(super) struct Service {
    /// The protocol of the backend.
    pub(super) protocol: Protocol,
    /// The protocol's name in the injector's configuration.
    pub(super) name: &'static str,
    /// The backend's port where it can choose one: the alternative port that requires a header.
    pub(super) backend_port: u16,
}

/// Sending mail.
pub(super) const SMTP: Service = Service { protocol: Protocol::Smtp, name: "smtp", backend_port: 2525 };
/// Reading mail, without TLS so that everything can be compared.
pub(super) const IMAP: Service = Service { protocol: Protocol::Imap, name: "imap", backend_port: 10143 };

impl Service {
    /// The listener's name for one family.
    pub(super) fn listener_name(self, family: Family) -> String {
        format!("{}-{}", self.name, family.name())
    }
}
