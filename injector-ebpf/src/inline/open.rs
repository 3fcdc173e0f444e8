//! A client's SYN: takes it for a backend, or leaves it to the host's socket.

use core::{ffi::c_void, mem::MaybeUninit};

use aya_ebpf::{
    helpers::generated::{bpf_get_prandom_u32, bpf_loop},
    programs::TcContext,
};
use injector_common::{
    guard,
    inline::{
        Backend, Counter, Entry, Event, Flag, Flow, Key, Listener, OnSyn, Phase, PortRange, Template, Tuple,
        Usage, mix, on_syn, port_hash, port_probe,
    },
};

use super::{
    DROP, NEXT, bans, forward, maps,
    maps::Count,
    mem, options,
    packet::{Link, Packet},
    route, source,
};

/// How many source ports are tried, and then again as ports of connections that have ended.
const PROBES: u32 = 10;

/// A SYN, of which this entry is known.
#[inline(never)]
pub(super) fn syn<L: Link>(skb: &TcContext, packet: &mut Packet, entry: Option<&mut Entry>) -> i32 {
    let Some((listener, any)) = maps::listener(&packet.key.destination, packet.ipv6) else {
        return super::without_connection(packet);
    };
    if any && !route::is_local(skb, &packet.tuple()) {
        return super::without_connection(packet);
    }
    if bans::is_banned(packet.source()) {
        bans::count(guard::Counter::Inline);
        return DROP;
    }
    packet.read_syn(listener.id);
    let syn = &packet.syn;
    let pending = entry.as_ref().map_or(0, |entry| entry.pending);
    let pending = maps::connection(pending);
    let taken = match on_syn(pending.as_deref(), syn, &packet.segment) {
        OnSyn::Socket => match pending {
            Some(flow) if flow.is_of(syn) => {
                // What the backend says now comes too late.
                flow.set(Flag::Refused);
                Err(Counter::Unanswered)
            }
            _ => Err(Counter::BadSyn),
        },
        OnSyn::Repeat => match pending {
            Some(flow) => {
                flow.syn_repeats += 1;
                flow.last_ns = maps::now();
                maps::count(Counter::SynRepeated);
                return send::<L>(skb, packet, flow);
            }
            None => Err(Counter::BadSyn),
        },
        OnSyn::Open => open(skb, packet, entry, &listener),
    };
    match taken {
        Ok(flow) => send::<L>(skb, packet, flow),
        Err(counter) => {
            maps::count(counter);
            leave_to_socket(&packet.key);
            NEXT
        }
    }
}

/// What follows this SYN is the socket's, not that of a connection of the same addresses that has ended.
#[inline(always)]
fn leave_to_socket(key: &Key) {
    if let Some(entry) = maps::entry(key)
        && maps::connection(entry.established).is_some_and(|flow| flow.closed())
    {
        entry.established = 0;
    }
}

/// Opens a connection to a backend, or says why not.
#[inline(always)]
fn open(
    skb: &TcContext,
    packet: &Packet,
    entry: Option<&mut Entry>,
    listener: &Listener,
) -> Result<&'static mut Flow, Counter> {
    if maps::is_translated(listener.id, packet.source()) {
        return Err(Counter::TranslatedSource);
    }
    let settings = maps::settings().ok_or(Counter::NoBackend)?;
    let (own, all) = match (maps::usage(listener.id), maps::usage(Usage::ALL)) {
        (Some(own), Some(all)) => (own, all),
        _ => return Err(Counter::Limit),
    };
    if !own.has_room() || !all.has_room() {
        return Err(Counter::Limit);
    }
    if all.pending >= settings.max_pending {
        return Err(Counter::PendingFull);
    }
    let client = packet.tuple().source;
    let table = if packet.ipv6 { listener.tables[1] } else { listener.tables[0] };
    let backend = maps::backend(table, client, packet.key.source.port).ok_or(Counter::NoBackend)?;
    let template = maps::template(listener.id, packet.ipv6).ok_or(Counter::NoBackend)?;
    let slot = maps::take_slot().ok_or(Counter::Full)?;
    let earlier = entry.as_ref().map_or(0, |entry| entry.established);
    let filled = fill(skb, packet, slot, listener, backend, template).and_then(|flow| {
        if !source::enter(flow, own, all) {
            return Err(Counter::SourceLimit);
        }
        if claim_port(packet, slot, flow, backend, earlier) {
            return Ok(flow);
        }
        source::leave(flow);
        Err(Counter::NoPort)
    });
    match filled {
        Ok(flow) => publish(packet, slot, entry, flow),
        Err(counter) => {
            maps::return_slot(slot);
            Err(counter)
        }
    }
}

/// Enters the connection by the client's addresses, too.
#[inline(always)]
fn publish(
    packet: &Packet,
    slot: u32,
    entry: Option<&mut Entry>,
    flow: &'static mut Flow,
) -> Result<&'static mut Flow, Counter> {
    if !claim_client(slot, entry, packet) {
        let mut key = MaybeUninit::<Key>::uninit();
        maps::leave(maps::reversed_key(&flow.backend_side.tuple, &mut key), slot);
        source::leave(flow);
        // Another processor may have found it meanwhile: the sweep makes it free.
        flow.phase = Phase::Removed as u64;
        return Err(Counter::Full);
    }
    flow.phase = Phase::Pending as u64;
    maps::change(flow.listener, Count::Pending, true);
    maps::count(Counter::Opened);
    Ok(flow)
}

/// Fills the slot in, which no entry names yet: all but the source port.
#[inline(always)]
fn fill(
    skb: &TcContext,
    packet: &Packet,
    slot: u32,
    listener: &Listener,
    backend: &Backend,
    template: &Template,
) -> Result<&'static mut Flow, Counter> {
    let flow = maps::connection(slot).ok_or(Counter::Full)?;
    let now_ns = maps::now();
    // SAFETY: a map value; zeroed, it is a flow.
    unsafe { mem::zero(&raw mut *flow) };
    // SAFETY: takes nothing.
    let offset = unsafe { bpf_get_prandom_u32() };
    let syn = &packet.syn;
    flow.open(syn.first, syn.listener, template, offset, now_ns);
    flow.timeouts = listener.timeouts;
    // SAFETY: map values, of whole words.
    unsafe { mem::copy(&raw mut flow.addresses, &raw const syn.addresses) };
    let Tuple { source: client, destination: local, ipv6, .. } = packet.tuple();
    let (client_port, local_port) = (packet.key.source.port, packet.key.destination.port);
    flow.client_side.tuple =
        Tuple { source: local, destination: client, ports: Tuple::ports(local_port, client_port), ipv6 };
    let source = match backend.sources {
        0 => client,
        count => {
            let which = mix(client[0] ^ client[3] ^ u32::from(client_port)) % u32::from(count);
            maps::source(backend.first_source + which).ok_or(Counter::NoRoute)?
        }
    };
    flow.backend_side.tuple =
        Tuple { source, destination: backend.ip, ports: Tuple::ports(client_port, backend.port), ipv6 };
    for way in [&mut flow.client_side, &mut flow.backend_side] {
        if !route::look_up(skb, &way.tuple, &mut way.hop, now_ns) {
            return Err(Counter::NoRoute);
        }
    }
    Ok(flow)
}

/// Takes the addresses and ports by which the backend answers. `own` is what the client has established before with the addresses
/// and ports that it has now.
#[inline(always)]
fn claim_port(packet: &Packet, slot: u32, flow: &mut Flow, backend: &Backend, own: u32) -> bool {
    // SAFETY: map values.
    unsafe { open_claim_port(packet, slot, flow, backend, own) != 0 }
}

/// The same; a function that the verifier follows once, not at each call, because its linkage is global.
///
/// # Safety
/// The pointers must be null or map values.
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn open_claim_port(
    packet: *const Packet,
    slot: u32,
    flow: *mut Flow,
    backend: *const Backend,
    own: u32,
) -> i64 {
    // SAFETY: by the caller.
    match unsafe { (packet.as_ref(), flow.as_mut(), backend.as_ref()) } {
        (Some(packet), Some(flow), Some(backend)) => search_port(packet, slot, flow, backend, own).into(),
        _ => 0,
    }
}

#[inline(always)]
fn search_port(packet: &Packet, slot: u32, flow: &mut Flow, backend: &Backend, own: u32) -> bool {
    let Some(settings) = maps::settings() else { return false };
    let claimed = Entry { origin: Entry::FROM_BACKEND, established: 0, pending: slot };
    let mut key = MaybeUninit::<Key>::uninit();
    let key = maps::reversed_key(&flow.backend_side.tuple, &mut key);
    let client = packet.tuple().source;
    let port = packet.key.source.port;
    let mut search = Search {
        key,
        claimed: &claimed,
        ports: settings.ports,
        hash: port_hash(client, port),
        keeps_port: (backend.sources == 0).into(),
        own,
        own_port: maps::connection(own).map_or(port, |flow| flow.backend_side.tuple.source_port()).into(),
        client_port: port.into(),
        taken: 0,
        earlier: 0,
    };
    // SAFETY: the function gets the search.
    unsafe { bpf_loop(2 * PROBES, probe as *mut c_void, (&raw mut search).cast(), 0) };
    let (taken, earlier) = (search.taken, search.earlier);
    flow.backend_side.tuple.ports = Tuple::ports(search.key.destination.port, backend.port);
    if let Some(earlier) = maps::connection(earlier) {
        flow.follow(earlier);
    }
    taken != 0
}

/// A search for a source port.
struct Search<'a> {
    key: &'a mut Key,
    claimed: &'a Entry,
    ports: PortRange,
    hash: u32,
    /// 1 if only the client's own port will do.
    keeps_port: u32,
    /// The connection that the client has had before with the same port; 0 if none.
    own: u32,
    /// The port that it has towards the backend; the client's own if there is none.
    own_port: u32,
    /// The client's own port.
    client_port: u32,
    /// 1 when a port was found, which is in the key.
    taken: u32,
    /// The connection that had it before; 0 if none.
    earlier: u32,
}

/// Tries one source port: that of the client's earlier connection, then the client's own, then others; 1 ends the search.
extern "C" fn probe(index: u32, search: *mut c_void) -> i64 {
    // SAFETY: the value that `claim_port` gave.
    let search = unsafe { &mut *search.cast::<Search<'_>>() };
    let (port, join) = match index {
        _ if search.keeps_port != 0 => (search.client_port, Join::Any),
        0 if search.ports.contains(search.own_port as u16) => (search.own_port, Join::Own),
        1 if search.ports.contains(search.client_port as u16) => (search.client_port, Join::Never),
        _ => {
            let port = search.ports.port(port_probe(search.hash, index % PROBES));
            (port.into(), if index < PROBES { Join::Never } else { Join::Ended })
        }
    };
    search.key.destination.port = port as u16;
    claim(search, join);
    i64::from(search.taken != 0 || join == Join::Any)
}

/// Which entry that is there already may be joined.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Join {
    /// None.
    Never,
    /// That of the client's own earlier connection, if it has ended.
    Own,
    /// One whose connection has ended, and of which the backend remembers nothing.
    Ended,
    /// Any: the client's own addresses and ports are kept, and it may have begun anew.
    Any,
}

/// Adds an entry, or joins the one that is there.
#[inline(never)]
fn claim(search: &mut Search<'_>, join: Join) {
    if maps::claim(search.key, search.claimed) {
        search.taken = 1;
        return;
    }
    if join == Join::Never {
        return;
    }
    let Some(entry) = maps::entry(search.key) else { return };
    if entry.origin != search.claimed.origin {
        return;
    }
    let earlier = entry.established;
    if join != Join::Any {
        let Some(flow) = maps::connection(earlier) else { return };
        let free = match join {
            Join::Own => earlier == search.own && flow.closed(),
            _ => flow.leaves_no_time_wait(),
        };
        if !free || entry.pending != 0 {
            return;
        }
    }
    entry.pending = search.claimed.pending;
    (search.taken, search.earlier) = (1, earlier);
}

/// Takes the addresses and ports by which the client sends. What it has established under them goes on until the backend's answer to
/// this SYN is answered in turn.
#[inline(always)]
fn claim_client(slot: u32, entry: Option<&mut Entry>, packet: &Packet) -> bool {
    match entry {
        Some(entry) => {
            // An earlier one that was being opened is abandoned.
            if let Some(earlier) = maps::connection(entry.pending) {
                earlier.last_ns = 0;
            }
            entry.pending = slot;
            true
        }
        None => {
            let claimed = Entry { origin: Entry::FROM_CLIENT, established: 0, pending: slot };
            maps::claim(&packet.key, &claimed)
        }
    }
}

/// Sends a SYN to the backend.
#[inline(always)]
fn send<L: Link>(skb: &TcContext, packet: &mut Packet, flow: &mut Flow) -> i32 {
    let now_ns = flow.last_ns;
    let mtu = flow.client_side.hop.mtu.min(flow.backend_side.hop.mtu);
    let sent = forward::check(skb, packet, &mut flow.backend_side, now_ns).and_then(|()| {
        options::rewrite(skb, packet, mtu)
            .and_then(|()| {
                let segment = &packet.segment;
                let sequence = segment.sequence + flow.offset;
                forward::send::<L>(skb, packet, &flow.backend_side, sequence, segment.acknowledgement)
            })
            .map_err(|_| Counter::RewriteFailed)
    });
    sent.unwrap_or_else(|counter| {
        maps::count(counter);
        DROP
    })
}

/// The backend refuses the SYN, or cannot be reached. The client does not see it: its next SYN goes to the host's socket, where another
/// backend is tried.
#[inline(always)]
pub(super) fn refuse(slot: u32, flow: &mut Flow) -> i32 {
    if !flow.is(Flag::Refused) {
        flow.set(Flag::Refused);
        maps::count(Counter::Refused);
        maps::emit_event(Event::REFUSED, slot, flow);
    }
    DROP
}
