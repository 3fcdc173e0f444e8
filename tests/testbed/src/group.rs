//! Groups of trials that share a stage, such as network namespaces. The trials of one group run one after
//! another, and those of different groups at the same time.

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::netns;

/// Trials that share a `T`, which the first of them creates.
#[derive(Debug)]
pub struct Group<T>(Arc<Shared<T>>);

#[derive(Debug)]
struct Shared<T> {
    name: &'static str,
    create: fn(&'static str) -> anyhow::Result<T>,
    stage: Mutex<Option<T>>,
}

impl<T: Send + 'static> Group<T> {
    /// No trials yet. `create` gets the group's name: namespaces of several groups exist at the same time.
    pub fn new(name: &'static str, create: fn(&'static str) -> anyhow::Result<T>) -> Self {
        Self(Arc::new(Shared { name, create, stage: Mutex::new(None) }))
    }

    /// A trial of this group. It is ignored without root.
    pub fn trial(
        &self,
        name: impl Into<String>,
        run: impl FnOnce(&T) -> anyhow::Result<()> + Send + 'static,
    ) -> Trial {
        let shared = Arc::clone(&self.0);
        Trial::ignorable_test(name, move || {
            if let Some(reason) = netns::unavailable() {
                return Ok(Completion::ignored_with(reason));
            }
            // A trial that panicked has failed; the others go on.
            let mut stage = shared.stage.lock().unwrap_or_else(PoisonError::into_inner);
            let outcome = match stage.take() {
                Some(there) => Ok(there),
                None => (shared.create)(shared.name),
            };
            outcome
                .and_then(|created| run(stage.insert(created)))
                .map(|()| Completion::Completed)
                .map_err(|error| Failed::from(format!("{error:#}")))
        })
    }
}

/// Runs the trials of these groups, first those that run `alone`, one by one: those that count single packets,
/// or measure short times.
#[must_use]
pub fn run(alone: Vec<Vec<Trial>>, together: Vec<Vec<Trial>>) -> ExitCode {
    let arguments = Arguments::from_args();
    let have_failed = |trials: Vec<Trial>, threads: usize| {
        let mut arguments = arguments.clone();
        arguments.test_threads.get_or_insert(threads.max(1));
        libtest_mimic::run(&arguments, trials).has_failed()
    };
    let mut failed = !alone.is_empty() && have_failed(alone.into_iter().flatten().collect(), 1);
    let together = in_turn(together);
    // Trials that wait for their group cost nothing, and must not keep another group idle.
    let threads = together.len();
    failed |= have_failed(together, threads);
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// One of each group after another, so that all groups are busy from the beginning.
fn in_turn<T>(groups: Vec<Vec<T>>) -> Vec<T> {
    let mut groups: Vec<_> = groups.into_iter().map(Vec::into_iter).collect();
    let mut all = Vec::new();
    loop {
        let before = all.len();
        all.extend(groups.iter_mut().filter_map(Iterator::next));
        if all.len() == before {
            return all;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_take_turns() {
        assert_eq!(in_turn(vec![vec![1, 2, 3], vec![], vec![10], vec![20, 21]]), [1, 10, 20, 2, 21, 3]);
        assert!(in_turn::<u8>(Vec::new()).is_empty());
    }
}
