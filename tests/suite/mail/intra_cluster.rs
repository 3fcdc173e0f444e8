//! The intra-cluster path: webmail reaches the standard ports directly, without a header, from the
//! same address that is trusted to send one to the other ports.

use std::thread::{self, ScopedJoinHandle};

use anyhow::{anyhow, ensure};
use injector_testbed::mail_client;
use injector_testbed::message::Message;
use injector_testbed::netns::{EDGE_INSIDE, Family, MAIL};
use injector_testbed::service::{IMAPS, MATRIX, SMTP, SUBMISSION, SUBMISSIONS, Service};

use crate::external::{self, LIMIT, Watch};
use crate::testbed::Testbed;

/// One standard port, both directions: messages arrive unchanged, and the server logs the real
/// peer.
pub(crate) fn direct(testbed: &Testbed, service: Service, family: Family) -> anyhow::Result<()> {
    let user = format!("standard-{}-{}", family.name(), service.standard);
    webmail(testbed, service, family, &user)
}

/// All ports of both paths at once: the traffic of one path must not affect the other.
pub(crate) fn at_once(testbed: &Testbed, front: usize, family: Family) -> anyhow::Result<()> {
    let (front, running) = testbed.front(front)?;
    let watch = Watch::start(running)?;
    let user = |path: &str, service: Service| {
        format!("once-{}-{}-{path}-{}", front.name, family.name(), service.standard)
    };
    let external = |service| {
        let user = user("external", service);
        let message = Message::new(&user, &user);
        let sender = external::send(testbed, front, service, family, &message, &user)?;
        Ok([sender, external::fetch(testbed, front, family, &message, &user)?])
    };
    let clients = thread::scope(|scope| {
        let external = [SMTP, SUBMISSIONS, SUBMISSION].map(|service| scope.spawn(move || external(service)));
        let direct = MATRIX
            .map(|service| scope.spawn(move || webmail(testbed, service, family, &user("webmail", service))));
        direct.into_iter().try_for_each(outcome)?;
        external.into_iter().map(outcome).collect::<anyhow::Result<Vec<_>>>()
    })?;
    watch.ensure_ended(front, &clients.concat())
}

fn outcome<T>(thread: ScopedJoinHandle<'_, anyhow::Result<T>>) -> anyhow::Result<T> {
    thread.join().map_err(|_| anyhow!("panicked"))?
}

fn webmail(testbed: &Testbed, service: Service, family: Family, user: &str) -> anyhow::Result<()> {
    let (neighbour, host) = (&testbed.topology.edge, &testbed.host);
    let marks = host.mark();
    let message = Message::new(user, user);
    let append: &[_] = if service == IMAPS {
        &[&message]
    } else {
        let server = testbed.server(MAIL, family, service.standard);
        let queue_id = mail_client::send(neighbour, server, service.security, user, &message)?;
        let sender = host.postfix.client_of(marks.postfix, &queue_id, service.standard, LIMIT)?;
        ensure!(
            sender.ip() == EDGE_INSIDE.of(family),
            "Postfix saw {sender}, not {}",
            EDGE_INSIDE.of(family)
        );
        host.postfix.wait_delivered(marks.postfix, &queue_id, LIMIT)?;
        &[]
    };
    let server = testbed.server(MAIL, family, IMAPS.standard);
    let mailbox = mail_client::read_inbox(neighbour, server, user, append)?;
    let seen = host.dovecot.client_of(marks.dovecot, user, LIMIT)?;
    ensure!(seen == mailbox.client, "Dovecot saw {seen}, the reader was {}", mailbox.client);
    ensure!(
        seen.ip() == EDGE_INSIDE.of(family),
        "the reader was at {seen}, not at {}",
        EDGE_INSIDE.of(family)
    );
    ensure!(mailbox.messages.len() == 1, "{} messages, not one", mailbox.messages.len());
    mailbox.messages.iter().try_for_each(|fetched| message.ensure_unchanged(fetched))
}
