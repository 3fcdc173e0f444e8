//! A peer whose bytes were not acknowledged retransmits them together with the next bytes: one
//! segment, whose first part the receiver already has. `verdict` gets such a segment whole.

use std::io::Write as _;
use std::net::TcpStream;
use std::time::Duration;

use anyhow::ensure;
use injector_testbed::daemon::{BPF_EVENTS, Injector};
use injector_testbed::netns::Netns;

use crate::Run;
use crate::testbed::{Testbed, accept_with_header, expect, finished, pass};
use crate::transfers::joined;

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("retransmission/client, while spliced", |testbed, engine| {
        while_spliced(testbed, engine, Sender::Client)
    }),
    ("retransmission/backend, while spliced", |testbed, engine| {
        while_spliced(testbed, engine, Sender::Backend)
    }),
    ("retransmission/client, of bytes before the enrolment", |testbed, engine| {
        before_enrolment(testbed, engine, Sender::Client)
    }),
    ("retransmission/backend, of bytes before the enrolment", |testbed, engine| {
        before_enrolment(testbed, engine, Sender::Backend)
    }),
    ("retransmission/a long segment", long),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sender {
    Client,
    Backend,
}

impl Sender {
    fn namespace(self, testbed: &Testbed) -> &Netns {
        match self {
            Self::Client => &testbed.topology.client,
            Self::Backend => &testbed.topology.mail,
        }
    }
}

/// Both sides have exchanged data, and the kernel forwards what follows.
fn while_spliced(testbed: &Testbed, engine: &str, sender: Sender) -> anyhow::Result<()> {
    let (injector, mut client, mut server) = joined(testbed, engine, "")?;
    pass(&mut server, &mut client, b"250 hello\r\n")?;
    pass(&mut client, &mut server, b"MAIL FROM:<a@client.test>\r\n")?;
    let (from, to) = match sender {
        Sender::Client => (&mut client, &mut server),
        Sender::Backend => (&mut server, &mut client),
    };
    overlap(testbed, sender, from, to, b"first\r\n", b"second\r\n")?;
    pass(from, to, b"third\r\n")?;
    pass(to, from, b"answer\r\n")?;
    drop((client, server));
    trimmed(&injector, engine)
}

/// The bytes that precede the enrolment are retransmitted.
fn before_enrolment(testbed: &Testbed, engine: &str, sender: Sender) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    if sender == Sender::Backend {
        overlap(testbed, sender, &mut server, &mut client, b"220-hello\r\n", b"220 there\r\n")?;
        pass(&mut client, &mut server, b"EHLO client\r\n")?;
        pass(&mut server, &mut client, b"250 hello\r\n")?;
    } else {
        pass(&mut server, &mut client, b"220 hello\r\n")?;
        overlap(testbed, sender, &mut client, &mut server, b"EHLO client\r\n", b"NOOP\r\n")?;
        pass(&mut server, &mut client, b"250 hello\r\n")?;
        pass(&mut client, &mut server, b"QUIT\r\n")?;
    }
    drop((client, server));
    trimmed(&injector, engine)
}

/// Nearly as long as a segment can be.
fn long(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (injector, mut client, mut server) = joined(testbed, engine, "")?;
    pass(&mut client, &mut server, b"DATA\r\n")?;
    overlap(testbed, Sender::Client, &mut client, &mut server, &[b'a'; 1000], &[b'b'; 400])?;
    pass(&mut client, &mut server, b".\r\n")?;
    drop((client, server));
    trimmed(&injector, engine)
}

/// Checks that the retransmission happened, and that the program counted it.
fn trimmed(injector: &Injector, engine: &str) -> anyhow::Result<()> {
    finished(injector, 1)?;
    let seen = injector.metrics()?.sum(BPF_EVENTS, &[("event", "trimmed")]);
    ensure!((seen > 0.5) == (engine == "splice"), "{seen} segments were trimmed");
    Ok(())
}

/// Passes `first` without an acknowledgement reaching `from`, and makes it send `second` in the
/// same segment.
fn overlap(
    testbed: &Testbed,
    sender: Sender,
    from: &mut TcpStream,
    to: &mut TcpStream,
    first: &[u8],
    second: &[u8],
) -> anyhow::Result<()> {
    let port = from.local_addr()?.port();
    // By then, what was sent before has been acknowledged.
    std::thread::sleep(Duration::from_millis(60));
    {
        let _deaf = DroppedPackets::new(sender.namespace(testbed), "input", &format!("tcp dport {port}"))?;
        from.write_all(first)?;
        expect(to, first)?;
        {
            // Not in the sender's namespace: TCP would be notified and treat it as not sent.
            let _mute =
                DroppedPackets::new(&testbed.topology.edge, "prerouting", &format!("tcp sport {port}"))?;
            from.write_all(second)?;
            std::thread::sleep(Duration::from_millis(60));
        }
    }
    // Then the retransmission timer fires, and sends everything as one segment.
    expect(to, second)
}

/// While it exists, matching packets do not pass this hook of the namespace.
struct DroppedPackets<'a> {
    namespace: &'a Netns,
    hook: &'static str,
}

impl<'a> DroppedPackets<'a> {
    fn new(namespace: &'a Netns, hook: &'static str, matching: &str) -> anyhow::Result<Self> {
        let dropped = Self { namespace, hook };
        dropped.namespace.nft(&format!(
            "add table inet drop-{hook}; \
             add chain inet drop-{hook} all-of-it {{ type filter hook {hook} priority 0; }}; \
             add rule inet drop-{hook} all-of-it {matching} drop"
        ))?;
        Ok(dropped)
    }
}

impl Drop for DroppedPackets<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.namespace.nft(&format!("delete table inet drop-{}", self.hook)) {
            eprintln!("{error:#}");
        }
    }
}
