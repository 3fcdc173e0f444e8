//! What the inline engine needs besides its programs, called in this process, inside real network
//! namespaces: the NAT table, the routes to the backends, the kernel's forwarding.

mod forwarding;
mod routes;
mod rules;
mod table;
mod testbed;

use injector_testbed::netns::{self, Family};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use testbed::Testbed;

fn main() {
    let mut arguments = Arguments::from_args();
    // A process can have one topology at a time.
    arguments.test_threads = Some(1);
    let mut trials = vec![
        trial("dnat/every address of the host, single ones first", rules::any_address),
        trial("dnat/connections of the host itself are not translated", rules::own_connections),
        trial("replace/a transfer continues, new connections use the new backend", rules::during_a_transfer),
        trial("replace/no connection is lost", rules::no_gap),
        trial("table/foreign tables stay as they are", table::foreign),
        trial("table/removed, and nothing is left", table::removed),
        trial("table/recognized when it is applied", table::recognized),
        trial("table/another layout is replaced", table::other_layout),
        trial("table/without CAP_NET_ADMIN", table::not_permitted),
        trial("table/with CAP_NET_ADMIN and without root", table::without_root),
        trial("table/chains that drop forwarded packets are named", table::dropping_chains),
        trial("routes/local, unreachable or without Ethernet", routes::kinds),
        trial("routes/all interfaces", routes::interfaces),
        trial("routes/changes are reported, bursts once", routes::changes),
        trial("forwarding/detected, enabled, and effective", forwarding::found_and_set),
        trial("forwarding/strict reverse path", forwarding::reverse_path),
    ];
    for family in Family::ALL {
        let named = |name: &str| format!("{name}, {}", family.name());
        trials.push(trial(named("dnat/reaches the backend"), move |testbed| rules::reaches(testbed, family)));
        trials.push(trial(named("dnat/weights 3 to 1"), move |testbed| rules::weights(testbed, family)));
        trials.push(trial(named("dnat/masquerade"), move |testbed| rules::masquerade(testbed, family)));
        trials.push(trial(named("routes/towards"), move |testbed| routes::towards(testbed, family)));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn trial(name: impl Into<String>, run: impl Fn(&Testbed) -> anyhow::Result<()> + Send + 'static) -> Trial {
    Trial::ignorable_test(name, move || {
        if let Some(reason) = netns::unavailable() {
            return Ok(Completion::ignored_with(reason));
        }
        let testbed = Testbed::new().map_err(failed)?;
        match run(&testbed) {
            Ok(()) => Ok(Completion::Completed),
            Err(error) => Err(Failed::from(format!("{error:#}\n{}", testbed.ruleset().unwrap_or_default()))),
        }
    })
}

fn failed(error: anyhow::Error) -> Failed {
    Failed::from(format!("{error:#}"))
}
