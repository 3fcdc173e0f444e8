//! A peer that did not hear that its bytes arrived sends them once more, together with what comes next: one segment, of
//! which the receiver has the first part already. `verdict` is handed such a segment whole.

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

/// Both sides have said something, and what follows goes through the kernel.
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

/// The words after which the direction is spliced are those that are sent twice.
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

/// It has really happened, and the program has seen it.
fn trimmed(injector: &Injector, engine: &str) -> anyhow::Result<()> {
    finished(injector, 1)?;
    let seen = injector.metrics()?.sum(BPF_EVENTS, &[("event", "trimmed")]);
    ensure!((seen > 0.5) == (engine == "splice"), "{seen} segments were trimmed");
    Ok(())
}

/// Passes `first` such that `from` does not hear of it, and lets it send `second` in the same segment.
fn overlap(
    testbed: &Testbed,
    sender: Sender,
    from: &mut TcpStream,
    to: &mut TcpStream,
    first: &[u8],
    second: &[u8],
) -> anyhow::Result<()> {
    let port = from.local_addr()?.port();
    // What was sent before has been acknowledged then.
    std::thread::sleep(Duration::from_millis(60));
    {
        let _deaf = Cut::new(sender.namespace(testbed), "input", &format!("tcp dport {port}"))?;
        from.write_all(first)?;
        expect(to, first)?;
        {
            // Not where it is sent: TCP is told of that, and takes it for not sent.
            let _mute = Cut::new(&testbed.topology.edge, "prerouting", &format!("tcp sport {port}"))?;
            from.write_all(second)?;
            std::thread::sleep(Duration::from_millis(60));
        }
    }
    // Then the retransmission timer fires, for which the whole is one segment.
    expect(to, second)
}

/// While it exists, what matches does not pass this hook of the namespace.
struct Cut<'a> {
    namespace: &'a Netns,
    hook: &'static str,
}

impl<'a> Cut<'a> {
    fn new(namespace: &'a Netns, hook: &'static str, matching: &str) -> anyhow::Result<Self> {
        let cut = Self { namespace, hook };
        cut.namespace.nft(&format!(
            "add table inet cut-{hook}; \
             add chain inet cut-{hook} all-of-it {{ type filter hook {hook} priority 0; }}; \
             add rule inet cut-{hook} all-of-it {matching} drop"
        ))?;
        Ok(cut)
    }
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.namespace.nft(&format!("delete table inet cut-{}", self.hook)) {
            eprintln!("{error:#}");
        }
    }
}
