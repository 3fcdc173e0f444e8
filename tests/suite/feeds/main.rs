//! Bans that come from elsewhere: the decisions of a real CrowdSec LAPI and of one that answers nonsense, and Debian's
//! fail2ban on the log of a real Postfix.

mod crowdsec;
mod fail2ban;
mod lapi_stub;
mod nonsense;
mod testbed;

use std::process::ExitCode;

use injector_testbed::group::{self, Group};
use libtest_mimic::Trial;

use testbed::Testbed;

/// A trial.
type Run = fn(&Testbed) -> anyhow::Result<()>;

fn main() -> ExitCode {
    group::run(
        Vec::new(),
        vec![
            trials("crowdsec", crowdsec::TRIALS),
            trials("nonsense", nonsense::TRIALS),
            trials("fail2ban", fail2ban::TRIALS),
        ],
    )
}

fn trials(group: &'static str, trials: &[(&str, Run)]) -> Vec<Trial> {
    let group = Group::new(group, Testbed::new);
    trials.iter().map(|(name, run)| group.trial(*name, *run)).collect()
}
