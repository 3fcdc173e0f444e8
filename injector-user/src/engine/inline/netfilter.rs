//! Warns of rules of the host's firewall that would decide about clients, if their packets did not
//! go past it.

use std::{collections::BTreeSet, fmt, io};

use rtnetlink::{
    packet_core::{DecodeError, NLM_F_DUMP, NLM_F_REQUEST},
    sys::protocols::NETLINK_NETFILTER,
};

use crate::engine::attach::netlink::{attribute, exchange, short};
use crate::telemetry::log::target;

/// A base chain of nftables that sees clients' packets before a socket does, and has rules. Those of
/// iptables-nft are among them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Chain {
    family: &'static str,
    table: String,
    name: String,
    hook: &'static str,
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of table {} {} (hook {})", self.name, self.family, self.table, self.hook)
    }
}

/// The chains that were reported.
#[derive(Debug, Default)]
pub(super) struct Firewall {
    reported: BTreeSet<Chain>,
}

impl Firewall {
    /// Warns of chains that were not there the last time.
    pub(super) fn warn_of_new_chains(&mut self) {
        let chains = match chains() {
            Ok(chains) => chains,
            // Without nftables in the kernel there is none.
            Err(error) => {
                tracing::debug!(target: target::ENGINE_INLINE, %error, "the host's firewall cannot be read");
                return;
            }
        };
        let new: Vec<_> = chains.difference(&self.reported).map(ToString::to_string).collect();
        if !new.is_empty() {
            let chains = new.join(", ");
            tracing::warn!(target: target::ENGINE_INLINE, chains, "the host's firewall does not see the clients of inline: rules that refuse some of them do not apply. Ban with [guard] or `injector ban`, which hold for every engine, or set engine = \"splice\"");
        }
        self.reported = chains;
    }
}

/// All such chains.
fn chains() -> io::Result<BTreeSet<Chain>> {
    let mut found = BTreeSet::new();
    exchange(NETLINK_NETFILTER, &request(), |payload| {
        found.extend(chain(payload)?);
        Ok(())
    })?;
    Ok(found)
}

/// A request for the chains of all families: struct nlmsghdr, and struct nfgenmsg.
fn request() -> [u8; 20] {
    /// `NFNL_SUBSYS_NFTABLES` and `NFT_MSG_GETCHAIN`.
    const GET_CHAIN: u16 = 10 << 8 | 4;

    let [l0, l1, l2, l3] = 20_u32.to_ne_bytes();
    let [t0, t1] = GET_CHAIN.to_ne_bytes();
    let [f0, f1] = (NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes();
    [l0, l1, l2, l3, t0, t1, f0, f1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
}

/// Reads a chain (nf_tables_fill_chain_info, net/netfilter/nf_tables_api.c); `None` if it is not of
/// the kind that is looked for.
fn chain(payload: &[u8]) -> Result<Option<Chain>, DecodeError> {
    /// struct nfgenmsg
    const HEADER: usize = 4;
    const TABLE: u16 = 1;
    const NAME: u16 = 3;
    const HOOK: u16 = 4;
    const POLICY: u16 = 5;
    const USE: u16 = 6;
    const TYPE: u16 = 7;
    /// `NFTA_HOOK_HOOKNUM`
    const NUMBER: u16 = 1;
    /// `NF_DROP`
    const DROP: u32 = 0;

    let (family, attributes) =
        (*payload.first().ok_or_else(short)?, payload.get(HEADER..).ok_or_else(short)?);
    let text = |kind| -> Result<String, DecodeError> {
        let bytes = attribute(attributes, kind)?.unwrap_or_default();
        let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(bytes).into_owned())
    };
    let Some(hook) = attribute(attributes, HOOK)? else { return Ok(None) };
    let number = attribute(&hook, NUMBER)?.as_deref().and_then(word);
    let Some((family, hook)) = number.and_then(|number| place(family, number)) else { return Ok(None) };
    let drops = attribute(attributes, POLICY)?.as_deref().and_then(word) == Some(DROP);
    let rules = attribute(attributes, USE)?.as_deref().and_then(word).unwrap_or_default();
    if text(TYPE)? != "filter" || (rules == 0 && !drops) {
        return Ok(None);
    }
    Ok(Some(Chain { family, table: text(TABLE)?, name: text(NAME)?, hook }))
}

/// The names of a family and of a hook that sees a client's packets to this host.
fn place(family: u8, hook: u32) -> Option<(&'static str, &'static str)> {
    let family = match family {
        1 => "inet",
        2 => "ip",
        10 => "ip6",
        // `NFPROTO_NETDEV`, whose first hook is that of a device's ingress. tcx runs before it.
        5 if hook == 0 => return Some(("netdev", "ingress")),
        _ => return None,
    };
    match hook {
        0 => Some((family, "prerouting")),
        1 => Some((family, "input")),
        // `NF_INET_INGRESS`
        5 if family == "inet" => Some((family, "ingress")),
        _ => None,
    }
}

/// A 32-bit number in network order.
fn word(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An attribute, padded to whole words.
    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let len = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(family: u8, hook: Option<u32>, kind: &str, policy: u32, rules: u32) -> Vec<u8> {
        let mut bytes = vec![family, 0, 0, 0];
        bytes.extend(attribute(1, b"filter\0"));
        bytes.extend(attribute(3, b"INPUT\0"));
        if let Some(hook) = hook {
            bytes.extend(attribute(4, &attribute(1, &hook.to_be_bytes())));
            bytes.extend(attribute(5, &policy.to_be_bytes()));
        }
        bytes.extend(attribute(7, format!("{kind}\0").as_bytes()));
        bytes.extend(attribute(6, &rules.to_be_bytes()));
        bytes
    }

    #[test]
    fn only_chains_that_may_refuse_clients_are_found() {
        const ACCEPT: u32 = 1;
        let found = |family, hook, kind, policy, rules| {
            chain(&message(family, hook, kind, policy, rules)).unwrap().map(|chain| chain.to_string())
        };
        let expected = Some("INPUT of table ip filter (hook input)".to_owned());
        assert_eq!(found(2, Some(1), "filter", ACCEPT, 1), expected);
        assert_eq!(found(2, Some(1), "filter", 0, 0), expected);
        assert_eq!(found(2, Some(1), "filter", ACCEPT, 0), None);
        // Forwarded, sent, translated; not a base chain; bridged.
        assert_eq!(found(2, Some(2), "filter", ACCEPT, 1), None);
        assert_eq!(found(2, Some(3), "filter", ACCEPT, 1), None);
        assert_eq!(found(2, Some(0), "nat", ACCEPT, 1), None);
        assert_eq!(found(2, None, "filter", ACCEPT, 1), None);
        assert_eq!(found(7, Some(1), "filter", ACCEPT, 1), None);
        let ingress = |family: &str| Some(format!("INPUT of table {family} filter (hook ingress)"));
        assert_eq!(found(1, Some(5), "filter", ACCEPT, 1), ingress("inet"));
        assert_eq!(found(5, Some(0), "filter", ACCEPT, 1), ingress("netdev"));
        assert!(chain(&[]).is_err());
    }
}
