//! Limits on each source of connections: how many are open, and how many come in a second. They hold
//! for the sessions of the sockets and the connections of the inline engine together.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{BuildHasher as _, RandomState},
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use injector_common::guard::{Rate, SourceCounts, SourceLimits, Verdict, admit};

use crate::{
    config::{Guard, Network, PerSource},
    engine::usage::UsageCounts,
    telemetry::metrics::RejectReason,
};

/// How many parts the counts have, each with a lock of its own, so that workers seldom wait.
const SHARDS: usize = 16;
/// Of how many sources a part remembers the rate: of 100,000 in all.
const MAX_RATES: usize = 100_000 / SHARDS;

/// What the configuration says about sources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceRules {
    limits: SourceLimits,
    /// How many bits of an IPv4 and of an IPv6 address are one source.
    prefixes: (u8, u8),
}

impl SourceRules {
    /// These limits, with the sources of `[guard]`.
    #[must_use]
    pub fn new(guard: Option<&Guard>, limits: PerSource) -> Self {
        let default = Guard::default();
        let Guard { source_prefix_ipv4, source_prefix_ipv6, .. } = guard.unwrap_or(&default);
        Self { limits: limits.limits(), prefixes: (*source_prefix_ipv4, *source_prefix_ipv6) }
    }

    fn source(&self, client: IpAddr) -> Network {
        let ((ipv4, ipv6), client) = (self.prefixes, client.to_canonical());
        Network::around(client, if client.is_ipv4() { ipv4 } else { ipv6 })
    }
}

/// A limit on each source, of one listener or of all. It can be changed while connections exist.
#[derive(Debug)]
pub struct SourceLimit {
    /// Whether there is a limit. Without one, nothing is locked or counted.
    active: AtomicBool,
    rules: RwLock<Arc<SourceRules>>,
    hasher: RandomState,
    shards: [Mutex<Shard>; SHARDS],
    inline: Option<Arc<dyn UsageCounts>>,
}

#[derive(Debug, Default)]
struct Shard {
    /// Open sessions; at least 1.
    sessions: HashMap<Network, u32>,
    rates: HashMap<Network, Rate>,
}

/// Why a connection is rejected because of its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SourceRefusal {
    pub(super) reason: RejectReason,
    pub(super) source: Network,
    /// Its open connections, or those that may come at once.
    pub(super) limit: u32,
}

/// Counts as one session of its source until it is dropped, if sessions are counted.
#[derive(Debug)]
#[must_use]
pub(super) struct SourcePermit {
    /// Boxed, because most connections have none.
    _counted: Option<Box<Counted>>,
}

#[derive(Debug)]
struct Counted {
    limit: Arc<SourceLimit>,
    source: Network,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.limit.release(self.source);
    }
}

impl SourceLimit {
    /// The limits of `rules`. `inline` has the connections of the inline engine.
    #[must_use]
    pub fn new(rules: SourceRules, inline: Option<Arc<dyn UsageCounts>>) -> Arc<Self> {
        let limit = Self {
            active: AtomicBool::new(false),
            rules: RwLock::new(Arc::new(rules.clone())),
            hasher: RandomState::new(),
            shards: Default::default(),
            inline,
        };
        limit.set_rules(rules);
        Arc::new(limit)
    }

    /// Changes the limits. Existing sessions stay; one that was not counted before is not counted now.
    pub fn set_rules(&self, rules: SourceRules) {
        let active = rules.limits.is_set();
        if let Some(inline) = &self.inline {
            let (ipv4, ipv6) = rules.prefixes;
            inline.set_source_limits(rules.limits, [ipv4, ipv6]);
        }
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
        self.active.store(active, Ordering::Relaxed);
    }

    /// Takes a permit for a session of this client, now, in nanoseconds of `CLOCK_MONOTONIC`. The rate
    /// counts every connection that gets one. No limit concerns a client that `is_allowed`.
    pub(super) fn try_acquire(
        self: &Arc<Self>,
        client: IpAddr,
        is_allowed: impl FnOnce() -> bool,
        now_ns: impl FnOnce() -> u64,
    ) -> Result<SourcePermit, SourceRefusal> {
        let uncounted = SourcePermit { _counted: None };
        if !self.active.load(Ordering::Relaxed) {
            return Ok(uncounted);
        }
        let rules = Arc::clone(&self.rules.read().unwrap_or_else(PoisonError::into_inner));
        if is_allowed() {
            return Ok(uncounted);
        }
        let (limits, source, now_ns) = (&rules.limits, rules.source(client), now_ns());
        let mut shard = self.shard(source);
        let sessions = shard.sessions.get(&source).copied().unwrap_or(0);
        let rate = shard.rates.get(&source).copied().unwrap_or_default();
        let (inline, inline_rate) =
            self.inline.as_ref().map(|inline| inline.of_source(source)).unwrap_or_default();
        // Not handshakes: who sends SYNs in another's name must not shut it out.
        let counts = SourceCounts { pending: 0, sessions, ..inline };
        for rate in [rate, inline_rate] {
            let (reason, limit) = match admit(limits, &counts, rate, now_ns) {
                Verdict::Pass => continue,
                Verdict::TooManyConnections => (RejectReason::SourceConnections, limits.connections),
                Verdict::TooFast => (RejectReason::SourceRate, limits.burst),
            };
            return Err(SourceRefusal { reason, source, limit });
        }
        if limits.burst != 0
            && let Some(rate) = rate.take(limits, now_ns)
        {
            remember(&mut shard.rates, source, rate, now_ns);
        }
        if limits.connections == 0 {
            return Ok(uncounted);
        }
        shard.sessions.insert(source, sessions + 1);
        self.publish(source, sessions + 1);
        drop(shard);
        Ok(SourcePermit { _counted: Some(Box::new(Counted { limit: Arc::clone(self), source })) })
    }

    fn release(&self, source: Network) {
        let mut shard = self.shard(source);
        let Entry::Occupied(mut entry) = shard.sessions.entry(source) else { return };
        let left = entry.get() - 1;
        if left == 0 {
            entry.remove();
        } else {
            entry.insert(left);
        }
        // With the lock, so that the last number written is the last one counted.
        self.publish(source, left);
    }

    /// Tells the inline engine how many sessions a source has.
    fn publish(&self, source: Network, sessions: u32) {
        if let Some(inline) = &self.inline {
            inline.set_sessions_of_source(source, sessions);
        }
    }

    fn shard(&self, source: Network) -> std::sync::MutexGuard<'_, Shard> {
        let hash = self.hasher.hash_one(source);
        // The remainder is below the number of parts.
        let index = usize::try_from(hash % SHARDS as u64).unwrap_or(0);
        let shard = self.shards.get(index).unwrap_or(&self.shards[0]);
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Remembers the rate of a source. If too many are remembered, forgets those at rest, which say
/// nothing; if that is not enough, also a quarter of the others, those that come to rest first.
fn remember(rates: &mut HashMap<Network, Rate>, source: Network, rate: Rate, now_ns: u64) {
    if rates.len() >= MAX_RATES && !rates.contains_key(&source) {
        rates.retain(|_, rate| rate.arrival_ns > now_ns);
        if rates.len() > MAX_RATES * 3 / 4 {
            let mut arrivals: Vec<_> = rates.values().map(|rate| rate.arrival_ns).collect();
            let quarter = MAX_RATES / 4;
            let (_, last, _) = arrivals.select_nth_unstable(quarter);
            let last = *last;
            rates.retain(|_, rate| rate.arrival_ns > last);
        }
    }
    rates.insert(source, rate);
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// The inline engine's counts, of one source.
    #[derive(Debug, Default)]
    struct Inline(Mutex<OfSource>);

    #[derive(Debug, Default)]
    struct OfSource {
        counts: SourceCounts,
        rate: Rate,
        published: Option<(SourceLimits, [u8; 2])>,
    }

    impl UsageCounts for Inline {
        fn established(&self) -> u32 {
            0
        }

        fn accepted(&self) -> u64 {
            0
        }

        fn add_session(&self) {}

        fn remove_session(&self) {}

        fn set_limit(&self, _: u32) {}

        fn set_source_limits(&self, limits: SourceLimits, prefixes: [u8; 2]) {
            self.0.lock().unwrap().published = Some((limits, prefixes));
        }

        fn of_source(&self, _: Network) -> (SourceCounts, Rate) {
            let inline = self.0.lock().unwrap();
            (inline.counts, inline.rate)
        }

        fn set_sessions_of_source(&self, _: Network, sessions: u32) {
            self.0.lock().unwrap().counts.sessions = sessions;
        }
    }

    fn rules(connections: u32, rate: u32, burst: u32) -> SourceRules {
        let limits = PerSource {
            max_connections: NonZeroU32::new(connections),
            max_rate: NonZeroU32::new(rate),
            burst: NonZeroU32::new(burst),
        };
        SourceRules::new(Some(&Guard::default()), limits)
    }

    /// Takes a permit, for a client that is not in a network that is allowed.
    fn take(
        limit: &Arc<SourceLimit>,
        client: IpAddr,
        now_ns: impl FnOnce() -> u64,
    ) -> Result<SourcePermit, SourceRefusal> {
        limit.try_acquire(client, || false, now_ns)
    }

    fn limit(connections: u32, rate: u32, burst: u32) -> Arc<SourceLimit> {
        SourceLimit::new(rules(connections, rate, burst), None)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn reason(result: Result<SourcePermit, SourceRefusal>) -> Option<RejectReason> {
        result.err().map(|refusal| refusal.reason)
    }

    fn entries(limit: &SourceLimit) -> (usize, usize) {
        let shards = limit.shards.iter().map(|shard| shard.lock().unwrap());
        shards.fold((0, 0), |(sessions, rates), shard| {
            (sessions + shard.sessions.len(), rates + shard.rates.len())
        })
    }

    #[test]
    fn a_source_has_its_limit_and_leaves_others_alone() {
        let limit = limit(2, 0, 0);
        let of = |text| take(&limit, ip(text), || 0);
        let held = [of("192.0.2.1"), of("::ffff:192.0.2.1")];
        assert!(held.iter().all(Result::is_ok));
        let source = "192.0.2.1/32".parse().unwrap();
        let refusal = SourceRefusal { reason: RejectReason::SourceConnections, source, limit: 2 };
        assert_eq!(of("192.0.2.1").unwrap_err(), refusal);
        let other = of("192.0.2.2");
        assert!(other.is_ok() && entries(&limit) == (2, 0));
        drop((held, other));
        assert!(of("192.0.2.1").is_ok());
        assert_eq!(entries(&limit), (0, 0));
    }

    #[test]
    fn an_ipv6_network_of_64_bits_is_one_source() {
        let limit = limit(1, 0, 0);
        let held = take(&limit, ip("2001:db8::1"), || 0).unwrap();
        assert_eq!(reason(take(&limit, ip("2001:db8::2"), || 0)), Some(RejectReason::SourceConnections));
        assert_eq!(reason(take(&limit, ip("2001:db8:0:1::1"), || 0)), None);
        drop(held);
    }

    #[test]
    fn the_rate_of_a_source_has_a_burst() {
        let limit = limit(0, 2, 3);
        let at = |ns| reason(take(&limit, ip("192.0.2.1"), || ns));
        let fast = Some(RejectReason::SourceRate);
        assert_eq!([0, 0, 0, 0].map(at), [None, None, None, fast]);
        assert_eq!([SECOND / 2 - 1, SECOND / 2, SECOND / 2].map(at), [fast, None, fast]);
        // After a rest the whole burst.
        assert_eq!([9 * SECOND; 4].map(at), [None, None, None, fast]);
        assert_eq!(entries(&limit), (0, 1));
    }

    #[test]
    fn the_burst_is_the_rate_unless_it_is_set() {
        let limit = limit(0, 5, 0);
        let admitted = (0..20).filter(|_| take(&limit, ip("192.0.2.1"), || 0).is_ok()).count();
        assert_eq!(admitted, 5);
    }

    #[test]
    fn a_connection_that_is_refused_does_not_count() {
        let limit = limit(1, 1, 2);
        let held = take(&limit, ip("192.0.2.1"), || 0).unwrap();
        for _ in 0..10 {
            assert_eq!(reason(take(&limit, ip("192.0.2.1"), || 0)), Some(RejectReason::SourceConnections));
        }
        drop(held);
        assert_eq!(reason(take(&limit, ip("192.0.2.1"), || 0)), None);
    }

    #[test]
    fn allowed_networks_and_limits_that_are_not_set_count_nothing() {
        let limited = limit(1, 1, 1);
        let held: Vec<_> = ["203.0.113.7", "::ffff:203.0.113.7", "2001:db8:a::1"]
            .iter()
            .cycle()
            .take(30)
            .map(|text| limited.try_acquire(ip(text), || true, || 0).unwrap())
            .collect();
        assert_eq!(entries(&limited), (0, 0));
        drop(held);
        let unlimited = limit(0, 0, 0);
        let held: Vec<_> = (0..30)
            .map(|_| {
                unlimited
                    .try_acquire(
                        ip("192.0.2.1"),
                        || panic!("nothing is asked"),
                        || panic!("no clock is read"),
                    )
                    .unwrap()
            })
            .collect();
        assert_eq!(entries(&unlimited), (0, 0));
        drop(held);
    }

    #[test]
    fn by_default_one_source_gets_half_of_all_places_if_they_are_not_few() {
        let of = |limits: PerSource, places| limits.or_half_of(places).limits().connections;
        assert_eq!([15, 16, 41, 10_000].map(|places| of(PerSource::default(), places)), [0, 8, 20, 5000]);
        assert_eq!(of(PerSource { max_connections: NonZeroU32::new(30), ..PerSource::default() }, 40), 30);
        // Without [guard], too.
        let limit = SourceLimit::new(SourceRules::new(None, PerSource::default().or_half_of(16)), None);
        let held = [0; 9].map(|_| take(&limit, ip("192.0.2.1"), || 0));
        assert_eq!(held.iter().filter(|held| held.is_ok()).count(), 8);
        assert!(take(&limit, ip("192.0.2.2"), || 0).is_ok());
    }

    #[test]
    fn a_reload_changes_limits_and_sources_while_sessions_exist() {
        let limit = limit(3, 0, 0);
        let of = |text| take(&limit, ip(text), || 0);
        let held = [of("192.0.2.1").unwrap(), of("192.0.2.1").unwrap()];
        limit.set_rules(rules(1, 0, 0));
        assert_eq!(reason(of("192.0.2.1")), Some(RejectReason::SourceConnections));
        // Other sources: those from before are counted as they were, and leave as they came.
        let wider = SourceRules { prefixes: (24, 64), ..rules(1, 0, 0) };
        limit.set_rules(wider);
        let of_network = of("192.0.2.1").unwrap();
        assert_eq!(reason(of("192.0.2.9")), Some(RejectReason::SourceConnections));
        limit.set_rules(rules(0, 0, 0));
        let uncounted = of("192.0.2.1").unwrap();
        drop((held, of_network, uncounted));
        assert_eq!(entries(&limit), (0, 0));
    }

    #[test]
    fn sessions_and_inline_connections_share_the_limit() {
        let inline = Arc::new(Inline::default());
        let limit = SourceLimit::new(rules(3, 1, 4), Some(Arc::clone(&inline) as Arc<dyn UsageCounts>));
        let another = || take(&limit, ip("192.0.2.1"), || 0);
        // Handshakes prove nothing.
        let counts = SourceCounts { pending: 100, established: 2, sessions: 0 };
        inline.0.lock().unwrap().counts = counts;
        let held = another().unwrap();
        assert_eq!(inline.0.lock().unwrap().counts.sessions, 1);
        assert_eq!(reason(another()), Some(RejectReason::SourceConnections));
        drop(held);
        assert_eq!(inline.0.lock().unwrap().counts.sessions, 0);
        inline.0.lock().unwrap().rate = Rate { arrival_ns: 4 * SECOND };
        assert_eq!(reason(another()), Some(RejectReason::SourceRate));
        let published = || inline.0.lock().unwrap().published.unwrap();
        assert_eq!(published(), (SourceLimits { connections: 3, burst: 4, interval_ns: SECOND }, [32, 64]));
        limit.set_rules(rules(0, 0, 0));
        assert_eq!(published(), (SourceLimits::default(), [32, 64]));
    }

    #[test]
    fn a_million_short_sessions_leave_nothing() {
        let limit = limit(10, 1000, 1000);
        let mut held = std::collections::VecDeque::new();
        for number in 0..1_000_000_u32 {
            let client = IpAddr::from((0x0A00_0000 + number % 300_000).to_be_bytes());
            let now = u64::from(number) * 1000;
            held.push_back(take(&limit, client, || now).unwrap());
            if held.len() > 50 {
                held.pop_front();
            }
        }
        let (sessions, rates) = entries(&limit);
        assert!(sessions <= 51 && rates <= MAX_RATES * SHARDS, "{sessions} {rates}");
        held.clear();
        assert_eq!(entries(&limit).0, 0);
    }

    #[test]
    fn the_memory_of_rates_is_bounded_and_keeps_the_busiest() {
        let (mut rates, busy) = (HashMap::new(), Network::around(ip("192.0.2.1"), 32));
        remember(&mut rates, busy, Rate { arrival_ns: u64::MAX }, 0);
        for number in 0..5 * MAX_RATES {
            let client = IpAddr::from(u32::try_from(number).unwrap().to_be_bytes());
            let rate = Rate { arrival_ns: 1_000_000 + u64::try_from(number).unwrap() };
            remember(&mut rates, Network::around(client, 32), rate, 0);
            assert!(rates.len() <= MAX_RATES);
        }
        assert!(rates.contains_key(&busy) && rates.len() >= MAX_RATES / 2);
        // Those at rest go first.
        let other = Network::around(ip("198.51.100.1"), 32);
        remember(&mut rates, other, Rate { arrival_ns: u64::MAX - 1 }, 0);
        while rates.len() < MAX_RATES {
            let client = IpAddr::from((0xC000_0000 + u32::try_from(rates.len()).unwrap()).to_be_bytes());
            remember(&mut rates, Network::around(client, 32), Rate { arrival_ns: 2 }, 0);
        }
        remember(
            &mut rates,
            Network::around(ip("198.51.100.2"), 32),
            Rate { arrival_ns: u64::MAX },
            u64::MAX - 2,
        );
        assert_eq!(rates.len(), 3);
    }

    #[test]
    fn threads_count_exactly() {
        let limit = limit(4, 0, 0);
        let most = std::sync::atomic::AtomicU32::new(0);
        let open = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        if let Ok(permit) = take(&limit, ip("192.0.2.1"), || 0) {
                            let now = open.fetch_add(1, Ordering::SeqCst) + 1;
                            most.fetch_max(now, Ordering::SeqCst);
                            open.fetch_sub(1, Ordering::SeqCst);
                            drop(permit);
                        }
                    }
                });
            }
        });
        assert!(most.into_inner() <= 4);
        assert_eq!(entries(&limit), (0, 0));
    }

    proptest! {
        /// The counts are those of the permits that exist, whatever opens, ends and is reloaded.
        #[test]
        fn counts_are_those_of_the_sessions(
            steps in prop::collection::vec((0_u8..4, 0_u8..4, 0_u32..4), 1..200),
        ) {
            let limit = limit(2, 0, 0);
            let mut held: Vec<(u8, SourcePermit)> = Vec::new();
            let mut most = 2;
            for (step, client, number) in steps {
                match step {
                    0 | 1 => {
                        let open = held.iter().filter(|(of, permit)| *of == client && permit._counted.is_some());
                        let full = most != 0 && open.count() >= most as usize;
                        let taken = take(&limit, IpAddr::from([192, 0, 2, client]), || 0);
                        prop_assert_eq!(taken.is_err(), full);
                        held.extend(taken.ok().map(|permit| (client, permit)));
                    }
                    2 if !held.is_empty() => drop(held.swap_remove(usize::from(client) % held.len())),
                    _ => {
                        most = number;
                        limit.set_rules(rules(most, 0, 0));
                    }
                }
                let counted: std::collections::BTreeSet<_> =
                    held.iter().filter(|(_, permit)| permit._counted.is_some()).map(|(of, _)| *of).collect();
                prop_assert_eq!(entries(&limit).0, counted.len());
            }
        }
    }
}
