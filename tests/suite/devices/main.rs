//! The devices of the host, as the inline engine reads and follows them, called in this process,
//! inside real network namespaces.

mod testbed;
mod trials;

use injector_testbed::netns;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use testbed::Testbed;

fn main() {
    let mut arguments = Arguments::from_args();
    // A process can have one topology at a time.
    arguments.test_threads = Some(1);
    let all = vec![
        trial("devices/kinds", trials::kinds),
        trial("devices/all that are up", trials::interfaces),
        trial("devices/changes are reported, bursts once", trials::changes),
    ];
    libtest_mimic::run(&arguments, all).exit();
}

fn trial(name: impl Into<String>, run: impl Fn(&Testbed) -> anyhow::Result<()> + Send + 'static) -> Trial {
    Trial::ignorable_test(name, move || {
        if let Some(reason) = netns::unavailable() {
            return Ok(Completion::ignored_with(reason));
        }
        let testbed = Testbed::new().map_err(failed)?;
        run(&testbed).map(|()| Completion::Completed).map_err(failed)
    })
}

fn failed(error: anyhow::Error) -> Failed {
    Failed::from(format!("{error:#}"))
}
