//! Real mail through the edge: senders → {HAProxy, the injector's engines} → Postfix and Dovecot →
//! mailbox → reader.
//!
//! Trials are named `FRONT/FAMILY/PORT→PORT`. All share one set of namespaces and servers, created
//! when the first of them runs. Each front is started when its first trial runs, so that a front
//! that cannot start fails only its own trials.

mod checks;
mod external;
mod intra_cluster;
mod other_receivers;
mod receivers;
mod shutdown;
mod testbed;

use std::sync::Arc;

use anyhow::Context;
use injector_testbed::netns::{self, Family, VIP_HAPROXY, VIP_INLINE, VIP_RELAY, VIP_SPLICE};
use injector_testbed::service::{IMAPS, MATRIX, SMTP, SUBMISSION};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use testbed::{Front, Kind, Shared, Testbed};

/// The columns of the matrix; one line per engine.
const FRONTS: [Front; 4] = [
    Front { name: "haproxy", engine: "", vip: VIP_HAPROXY, kind: Kind::HaProxy },
    Front { name: "splice", engine: "splice", vip: VIP_SPLICE, kind: Kind::Injector { metrics_port: 9145 } },
    Front { name: "relay", engine: "relay", vip: VIP_RELAY, kind: Kind::Injector { metrics_port: 9146 } },
    Front {
        name: "inline",
        engine: "inline",
        vip: VIP_INLINE,
        kind: Kind::Inline { metrics_port: 9147, kube_proxy: false },
    },
];

/// Columns in their own testbed: a host has one inline engine. Beside kube-proxy's rules for the same
/// addresses inline is first.
const KUBE_PROXY: [Front; 1] = [Front {
    name: "inline-kube",
    engine: "inline",
    vip: VIP_INLINE,
    kind: Kind::Inline { metrics_port: 9147, kube_proxy: true },
}];

type Run = fn() -> anyhow::Result<()>;

/// Receivers with a testbed of their own.
const OTHER_RECEIVERS: [(&str, Run); 5] = [
    ("exim", other_receivers::exim),
    ("opensmtpd", other_receivers::opensmtpd),
    ("nginx", other_receivers::nginx),
    ("haproxy", other_receivers::haproxy),
    ("aiosmtpd", other_receivers::aiosmtpd),
];

fn main() {
    let mut arguments = Arguments::from_args();
    // Server logs are read from their position at the start of a trial: one trial at a time.
    arguments.test_threads.get_or_insert(1);
    // A testbed is created by the first trial that needs it, and removed with the last: a process
    // has one at a time.
    let mut trials = shared_trials(&Arc::new(Shared::new(&FRONTS)));
    trials.extend(columns(&Arc::new(Shared::new(&KUBE_PROXY)), &KUBE_PROXY));
    trials.extend(OTHER_RECEIVERS.map(|(name, run)| alone(name, run)));
    libtest_mimic::run(&arguments, trials).exit();
}

/// All trials of the first testbed: the servers alone, and the columns.
fn shared_trials(shared: &Arc<Shared>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for family in Family::ALL {
        let name = family.name();
        trials.push(trial(shared, format!("testbed/{name}/swaks→2525"), move |testbed| {
            receivers::swaks(testbed, family)
        }));
        for service in [SMTP, SUBMISSION] {
            let name = format!("testbed/{name}/{} requires a header", service.proxied);
            trials.push(trial(shared, name, move |testbed| {
                receivers::demands_header(testbed, service, family)
            }));
        }
        for service in MATRIX {
            let name = format!("standard/{name}/{}", service.standard);
            trials.push(trial(shared, name, move |testbed| intra_cluster::direct(testbed, service, family)));
        }
    }
    trials.push(trial(shared, "health checks are harmless".to_owned(), checks::understood));
    trials.extend(columns(shared, &FRONTS));
    trials
}

fn columns(shared: &Arc<Shared>, fronts: &'static [Front]) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (index, front) in fronts.iter().enumerate() {
        for family in Family::ALL {
            for service in MATRIX {
                let name =
                    format!("{}/{}/{}→{}", front.name, family.name(), service.standard, service.proxied);
                trials.push(trial(shared, name, move |testbed| match service {
                    IMAPS => external::imap(testbed, index, family),
                    _ => external::smtp(testbed, index, service, family),
                }));
            }
            let name = format!("{}/{}/both paths at once", front.name, family.name());
            trials.push(trial(shared, name, move |testbed| intra_cluster::at_once(testbed, index, family)));
        }
        if matches!(front.kind, Kind::Injector { .. }) {
            let name = format!("{}/sessions finish after SIGTERM", front.name);
            trials.push(trial(shared, name, |testbed| shutdown::sessions_finish(testbed, *front)));
        }
    }
    trials
}

/// A trial that makes its own testbed.
fn alone(name: &str, run: Run) -> Trial {
    Trial::ignorable_test(format!("receiver/{name}, as documented"), move || {
        if let Some(reason) = netns::unavailable() {
            return Ok(Completion::ignored_with(reason));
        }
        run().map(|()| Completion::Completed).map_err(|error| Failed::from(format!("{error:#}")))
    })
}

/// A trial that is ignored without root; a failure includes what the servers and the injector
/// logged meanwhile.
fn trial(
    shared: &Arc<Shared>,
    name: String,
    run: impl Fn(&Testbed) -> anyhow::Result<()> + Send + 'static,
) -> Trial {
    let shared = Arc::clone(shared);
    Trial::ignorable_test(name, move || {
        if let Some(reason) = netns::unavailable() {
            return Ok(Completion::ignored_with(reason));
        }
        let testbed = shared.testbed()?;
        let start = testbed.mark();
        let outcome =
            run(testbed).with_context(|| format!("logged meanwhile:\n{}", testbed.logged_since(&start)));
        outcome.map(|()| Completion::Completed).map_err(|error| {
            // The cause first, then the logs: `{:#}` would print them in reverse order.
            let causes: Vec<_> = error.chain().skip(1).map(ToString::to_string).collect();
            Failed::from(format!("{}\n\n{error}", causes.join(": ")))
        })
    })
}
