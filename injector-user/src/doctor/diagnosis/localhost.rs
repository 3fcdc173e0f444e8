//! Findings about headers with the source 127.0.0.1.

use std::net::IpAddr;

use super::{
    evidence::Evidence,
    verdict::{Finding, Verdict},
};
use crate::doctor::{
    advice::{self, Change},
    dialogue::FOREIGN_RECIPIENT,
    observation::{Client, Dialogue, Family, Observation, Probe, Relay},
};

impl Evidence<'_> {
    /// The finding if the server allows more to a client that the header places on the server's own
    /// host.
    pub(super) fn localhost_finding(&self, injectors: &[IpAddr]) -> Option<Finding> {
        match self.claim(Client::Localhost)?.dialogue.as_ref()? {
            Dialogue::Relay(Relay::Accepted(said)) => Some(self.relay_finding(said, injectors)),
            Dialogue::Relay(Relay::Refused(_)) => None,
            Dialogue::Relay(Relay::Unknown(why)) => Some(self.relay_unknown(why)),
            Dialogue::ClearTextLogin(login) => self.clear_text_login(*login, injectors),
        }
    }

    /// The fault of a port that trusts this host, which is not the injector's, and relays.
    pub(super) fn open_relay_fault(&self, from: &str) -> Option<Finding> {
        let Dialogue::Relay(Relay::Accepted(said)) = self.claim(Client::Localhost)?.dialogue.as_ref()? else {
            return None;
        };
        let (address, localhost) = (self.target.address, self.ip(Client::Localhost));
        let mut changes = vec![advice::restrict_port(address.port(), &[], false)];
        changes.extend(advice::restrict_relaying(self.target, self.server));
        Some(Finding::fault(
            Verdict::OpenRelay,
            format!(
                "{address} is an open relay: it trusts a header from {from}, which is not the injector, and accepts mail \
                 for {FOREIGN_RECIPIENT} if the header has the source {localhost} ({said:?}). Any host that can reach the \
                 port can send spam through this server"
            ),
            changes,
        ))
    }

    /// What is appended to "trusts a header" if the doctor could not determine whether the server
    /// relays.
    pub(super) fn relay_remark(&self) -> Option<String> {
        let Dialogue::Relay(Relay::Unknown(why)) = self.claim(Client::Localhost)?.dialogue.as_ref()? else {
            return None;
        };
        let localhost = self.ip(Client::Localhost);
        Some(format!("; whether it relays for {localhost} is unknown: {why}"))
    }

    fn relay_finding(&self, said: &str, injectors: &[IpAddr]) -> Finding {
        let address = self.target.address;
        let (localhost, other) = (self.ip(Client::Localhost), self.ip(Client::Documentation));
        let documentation = self.claim(Client::Documentation).and_then(|one| one.dialogue.as_ref());
        if let Some(Dialogue::Relay(Relay::Accepted(said))) = documentation {
            return Finding::fault(
                Verdict::OpenRelay,
                format!(
                    "{address} is an open relay: it accepts mail for {FOREIGN_RECIPIENT} from {other}, a documentation address \
                     ({said:?}). Any client of the injector can send spam through this server"
                ),
                advice::restrict_relaying(self.target, self.server),
            );
        }
        let others = match documentation {
            Some(Dialogue::Relay(Relay::Refused(_))) => format!("it does not for {other}"),
            Some(Dialogue::Relay(Relay::Unknown(why))) => format!("for {other} it is unknown ({why})"),
            _ => format!("for {other} it is unknown"),
        };
        let mut changes = advice::restrict_relaying(self.target, self.server);
        if let Some(from) = self.accepted_from_other() {
            return Finding::fault(
                Verdict::OpenRelay,
                format!(
                    "{address} is an open relay: it trusts a header from {from}, and accepts mail for {FOREIGN_RECIPIENT} \
                     if the header has the source {localhost} ({said:?}); {others}. Any host that can reach the port can send \
                     spam through this server"
                ),
                changes,
            );
        }
        changes.extend(self.firewall(injectors));
        Finding {
            verdict: Verdict::RelaysForLocalhost,
            fault: false,
            message: format!(
                "{address} accepts mail for {FOREIGN_RECIPIENT} if the header has the source {localhost} ({said:?}); \
                 {others}. The injector never sends such a header for clients on the network, but any other host \
                 that can reach the port can, and could send spam through this server"
            ),
            changes,
        }
    }

    fn relay_unknown(&self, why: &str) -> Finding {
        let Evidence { target, .. } = self;
        let localhost = self.ip(Client::Localhost);
        Finding::note(
            Verdict::RelayUnknown,
            format!(
                "whether {} relays mail if the header has the source {localhost} is unknown: {why}. Run the doctor again \
                 later, or see the server's log",
                target.address
            ),
        )
    }

    /// A note only if the server rejects passwords of other clients: a server that accepts them
    /// from all clients is configured to.
    fn clear_text_login(&self, localhost: bool, injectors: &[IpAddr]) -> Option<Finding> {
        let other = self.claim(Client::Documentation)?.dialogue.as_ref();
        if !localhost || other != Some(&Dialogue::ClearTextLogin(false)) {
            return None;
        }
        let address = self.target.address;
        let (localhost, other) = (self.ip(Client::Localhost), self.ip(Client::Documentation));
        let mut changes: Vec<_> = advice::distrust_localhost(self.server).into_iter().collect();
        changes.extend(self.firewall(injectors));
        Some(Finding {
            verdict: Verdict::TrustsLocalhost,
            fault: false,
            message: format!(
                "{address} accepts passwords in clear text if the header has the source {localhost}, and not for \
                 {other}: any host that can reach the port can pass for a trusted client"
            ),
            changes,
        })
    }

    /// The rule that closes the port, unless an observation shows that it is closed to other
    /// addresses.
    fn firewall(&self, injectors: &[IpAddr]) -> Option<Change> {
        let tried = self.all.iter().any(|one| one.step.from.is_some());
        (!tried).then(|| advice::restrict_port(self.target.address.port(), injectors, true))
    }

    /// An address other than the injector's from which the server trusted a header.
    fn accepted_from_other(&self) -> Option<IpAddr> {
        self.all.iter().filter(|one| one.answered()).find_map(|one| one.step.from)
    }

    fn claim(&self, wanted: Client) -> Option<&Observation> {
        self.all.iter().find(|one| matches!(one.step.probe, Probe::Claim { client, .. } if client == wanted))
    }

    /// The address of a client, in the family that was tested.
    fn ip(&self, client: Client) -> IpAddr {
        let family = self.all.iter().find_map(|one| match one.step.probe {
            Probe::Claim { family, .. } => Some(family),
            _ => None,
        });
        client.ip(family.unwrap_or(Family::V4))
    }
}
