//! Services as nftables objects.

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashSet},
    net::{IpAddr, SocketAddr},
};

use nftables::{
    expr::{
        CT, CTDir, Expression, Fib, FibFlag, FibResult, Map, Meta, MetaKey, NamedExpression, NgMode, Numgen,
        Payload, PayloadField, Range, SetItem,
    },
    schema::{Chain, Rule},
    stmt::{Match, NAT, NATFamily, Operator, Statement},
    types::{NfChainPolicy, NfChainType, NfFamily, NfHook},
};

use super::service::{NatError, Service, TableName};

pub(super) const PREROUTING: &str = "prerouting";
pub(super) const POSTROUTING: &str = "postrouting";

/// `dstnat` and `srcnat` of nft(8): NF_IP_PRI_NAT_DST and NF_IP_PRI_NAT_SRC,
/// include/uapi/linux/netfilter_ipv4.h.
const PRIORITY_DSTNAT: i32 = -100;
const PRIORITY_SRCNAT: i32 = 100;

/// The comment of the rule that serves no service.
const TRACKING: &str = "keeps_connections_tracked";

/// Longer comments are refused by nft.
const COMMENT_LEN: usize = 127;

/// The two chains, always both.
pub(super) fn chains(table: &TableName) -> Vec<Chain<'static>> {
    vec![
        base_chain(table, PREROUTING, NfHook::Prerouting, PRIORITY_DSTNAT),
        base_chain(table, POSTROUTING, NfHook::Postrouting, PRIORITY_SRCNAT),
    ]
}

/// One rule per listening address, and one more where it masquerades; before them the one that
/// keeps connections tracked.
pub(super) fn rules(table: &TableName, services: &[Service]) -> Result<Vec<Rule<'static>>, NatError> {
    let mut rules = vec![rule(table, PREROUTING, TRACKING, keep_tracking())];
    for any in [false, true] {
        let listeners =
            services.iter().flat_map(|service| service.listen.iter().map(move |at| (service, at)));
        for (service, listen) in listeners.filter(|(_, listen)| listen.ip().is_unspecified() == any) {
            let targets = Targets::of(service, listen)?;
            rules.push(rule(table, PREROUTING, &service.name, dnat_rule(listen, &targets)));
            if service.masquerade {
                rules.push(rule(table, POSTROUTING, &service.name, masquerade(listen, &targets)));
            }
        }
    }
    Ok(rules)
}

/// `ct state established accept`, which matches nothing here: a nat chain only sees what is new.
///
/// But a network namespace tracks connections only as long as some rule asks for it
/// (nf_ct_netns_get, net/netfilter/nf_conntrack_proto.c), and without tracking nothing is
/// translated. So the last service could not be taken out without cutting its connections.
fn keep_tracking() -> Vec<Statement<'static>> {
    let established = matches(Operator::IN, conntrack("state", None), text("established"));
    vec![established, Statement::Accept(None)]
}

/// The backends of one family that get connections, and out of how many.
struct Targets {
    family: Family,
    /// With the numbers that lead to each, from and to, without gaps.
    shares: Vec<(SocketAddr, u32, u32)>,
    /// Numbers are drawn below this.
    modulus: u32,
}

impl Targets {
    fn of(service: &Service, listen: &SocketAddr) -> Result<Self, NatError> {
        let family = Family::of(listen);
        let family_name = family.name();
        let too_heavy = || NatError::Weights { service: service.name.clone(), family: family_name };
        let of_family =
            service.backends.iter().filter(|backend| backend.address.is_ipv4() == listen.is_ipv4());
        let backends: Vec<_> = of_family.filter(|backend| backend.weight > 0).collect();
        let divisor = backends.iter().map(|backend| backend.weight).fold(0, greatest_common_divisor);
        let mut shares = Vec::new();
        let mut modulus = 0_u32;
        for backend in backends {
            let next = modulus.checked_add(backend.weight / divisor).ok_or_else(too_heavy)?;
            shares.push((backend.address, modulus, next - 1));
            modulus = next;
        }
        if shares.is_empty() {
            return Err(NatError::NoBackend {
                service: service.name.clone(),
                listen: *listen,
                family: family_name,
            });
        }
        Ok(Self { family, shares, modulus })
    }

    fn addresses(&self) -> BTreeSet<SocketAddr> {
        self.shares.iter().map(|(address, ..)| *address).collect()
    }
}

/// Never 0 unless both are.
fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn of(address: &SocketAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// As the header's name in payload expressions.
    fn header(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }

    fn nat(self) -> NATFamily {
        match self {
            Self::V4 => NATFamily::IP,
            Self::V6 => NATFamily::IP6,
        }
    }

    /// As `meta nfproto` names it.
    fn nfproto(self) -> &'static str {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }
}

/// `iif != lo  DESTINATION  tcp dport PORT  dnat …`
fn dnat_rule(listen: &SocketAddr, targets: &Targets) -> Vec<Statement<'static>> {
    // What the host sends to its own addresses has been through conntrack when it comes in by lo,
    // and would not be translated anyway; the rule says so.
    let mut statements = vec![differs(meta(MetaKey::Iif), text("lo"))];
    if listen.ip().is_unspecified() {
        statements.push(equals(meta(MetaKey::Nfproto), text(targets.family.nfproto())));
        let destination = Fib { result: FibResult::Type, flags: HashSet::from([FibFlag::Daddr]) };
        statements.push(equals(Expression::Named(NamedExpression::Fib(destination)), text("local")));
    } else {
        statements.push(equals(destination(targets.family), address(listen.ip())));
    }
    statements.push(equals(destination_port(), port(listen)));
    statements.push(Statement::DNAT(Some(dnat(targets))));
    statements
}

/// `to ADDRESS:PORT`, or `to numgen random mod N map { 0-2 : ADDRESS . PORT, 3 : … }`.
fn dnat(targets: &Targets) -> NAT<'static> {
    let to = |addr, port| NAT { addr: Some(addr), family: Some(targets.family.nat()), port, flags: None };
    if let [(only, ..)] = targets.shares[..] {
        return to(address(only.ip()), Some(port(&only)));
    }
    let entry = |&(backend, first, last): &(SocketAddr, u32, u32)| {
        let numbers = if first == last {
            Expression::Number(first)
        } else {
            let range = [Expression::Number(first), Expression::Number(last)];
            Expression::Range(Box::new(Range { range }))
        };
        SetItem::Mapping(numbers, endpoint(&backend))
    };
    let drawn = Numgen { mode: NgMode::Random, ng_mod: targets.modulus, offset: Some(0) };
    let map = Map {
        key: Expression::Named(NamedExpression::Numgen(drawn)),
        data: Expression::Named(NamedExpression::Set(targets.shares.iter().map(entry).collect())),
    };
    to(Expression::Named(NamedExpression::Map(Box::new(map))), None)
}

/// `iif != 0  BACKEND  ct status dnat  ct original … masquerade`: what came for this listener from
/// elsewhere and goes to one of its backends.
///
/// The destination stands first, because `ct original proto-dst` is only understood once the
/// protocol is known.
fn masquerade(listen: &SocketAddr, targets: &Targets) -> Vec<Statement<'static>> {
    // Interface 0 in postrouting: the host's own, which another's rules may have sent to the same
    // backend.
    let mut statements = vec![differs(meta(MetaKey::Iif), text("0"))];
    let backends = targets.addresses();
    if let [only] = backends.iter().collect::<Vec<_>>()[..] {
        statements.push(equals(destination(targets.family), address(only.ip())));
        statements.push(equals(destination_port(), port(only)));
    } else {
        let pair = NamedExpression::Concat(vec![destination(targets.family), destination_port()]);
        let set = backends.iter().map(|backend| SetItem::Element(endpoint(backend))).collect();
        statements.push(equals(Expression::Named(pair), Expression::Named(NamedExpression::Set(set))));
    }
    statements.push(matches(Operator::IN, conntrack("status", None), text("dnat")));
    if !listen.ip().is_unspecified() {
        let key = format!("{} daddr", targets.family.header());
        statements.push(equals(conntrack(key, Some(CTDir::Original)), address(listen.ip())));
    }
    statements.push(equals(conntrack("proto-dst", Some(CTDir::Original)), port(listen)));
    statements.push(Statement::Masquerade(None));
    statements
}

fn base_chain(table: &TableName, name: &'static str, hook: NfHook, priority: i32) -> Chain<'static> {
    Chain {
        family: NfFamily::INet,
        table: Cow::Owned(table.as_str().to_owned()),
        name: Cow::Borrowed(name),
        _type: Some(NfChainType::NAT),
        hook: Some(hook),
        prio: Some(priority),
        policy: Some(NfChainPolicy::Accept),
        newname: None,
        handle: None,
        dev: None,
    }
}

fn rule(table: &TableName, chain: &'static str, name: &str, expr: Vec<Statement<'static>>) -> Rule<'static> {
    Rule {
        family: NfFamily::INet,
        table: Cow::Owned(table.as_str().to_owned()),
        chain: Cow::Borrowed(chain),
        expr: Cow::Owned(expr),
        handle: None,
        index: None,
        comment: Some(Cow::Owned(comment(name))),
    }
}

/// A name as a comment that nft can list and load again.
fn comment(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_graphic() && !matches!(c, '"' | '\\') { c } else { '_' };
    name.chars().take(COMMENT_LEN).map(plain).collect()
}

fn matches(op: Operator, left: Expression<'static>, right: Expression<'static>) -> Statement<'static> {
    Statement::Match(Match { left, right, op })
}

fn equals(left: Expression<'static>, right: Expression<'static>) -> Statement<'static> {
    matches(Operator::EQ, left, right)
}

fn differs(left: Expression<'static>, right: Expression<'static>) -> Statement<'static> {
    matches(Operator::NEQ, left, right)
}

fn text(text: &'static str) -> Expression<'static> {
    Expression::String(Cow::Borrowed(text))
}

fn address(ip: IpAddr) -> Expression<'static> {
    Expression::String(Cow::Owned(ip.to_string()))
}

fn port(address: &SocketAddr) -> Expression<'static> {
    Expression::Number(address.port().into())
}

/// `ADDRESS . PORT`
fn endpoint(backend: &SocketAddr) -> Expression<'static> {
    Expression::Named(NamedExpression::Concat(vec![address(backend.ip()), port(backend)]))
}

fn meta(key: MetaKey) -> Expression<'static> {
    Expression::Named(NamedExpression::Meta(Meta { key }))
}

fn conntrack(key: impl Into<Cow<'static, str>>, dir: Option<CTDir>) -> Expression<'static> {
    Expression::Named(NamedExpression::CT(CT { key: key.into(), family: None, dir }))
}

fn destination(family: Family) -> Expression<'static> {
    field(family.header(), "daddr")
}

fn destination_port() -> Expression<'static> {
    field("tcp", "dport")
}

fn field(protocol: &'static str, field: &'static str) -> Expression<'static> {
    let field = PayloadField { protocol: Cow::Borrowed(protocol), field: Cow::Borrowed(field) };
    Expression::Named(NamedExpression::Payload(Payload::PayloadField(field)))
}
