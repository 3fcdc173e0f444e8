//! What was observed of one address, by what was sent.

use crate::{
    config::ProxyVersion,
    doctor::{
        observation::{Family, Observation, Probe, Step, Target},
        server::Server,
    },
};

/// All observations of one address.
pub(super) struct Evidence<'a> {
    pub(super) target: &'a Target,
    pub(super) all: &'a [Observation],
    pub(super) server: Server,
}

impl Evidence<'_> {
    pub(super) fn of(&self, probe: Probe) -> Option<&Observation> {
        self.all.iter().find(|one| one.step == Step { probe, from: None })
    }

    pub(super) fn header(&self, version: ProxyVersion, family: Family, tlvs: bool) -> Option<&Observation> {
        self.of(Probe::Header { version, family, tlvs })
    }

    /// The header that the injector sends.
    pub(super) fn configured(&self, family: Family) -> Option<&Observation> {
        self.header(self.target.receiver.version, family, true)
    }

    pub(super) fn accepts(&self, family: Family) -> bool {
        self.configured(family).is_some_and(Observation::answered)
    }

    /// The server answers without a header.
    pub(super) fn answers_without_header(&self) -> bool {
        let bare = if self.target.is_tls() { Probe::Tls } else { Probe::NoHeader };
        let Some(bare) = self.of(bare).filter(|one| one.answered()) else { return false };
        // Behind a header the same ClientHello leads to a session: then an alert is about what the
        // server read in place of the header. Exim sends one.
        let has_session =
            |family| self.configured(family).is_some_and(|with_header| with_header.tls.is_some());
        bare.tls.is_some() || !Family::ALL.into_iter().any(has_session)
    }
}
