//! The boundary against the running kernel.
//!
//! What this machine does not grant (kernel faults as an ordinary user, say) is reported as ignored, with the reason in brackets.
//! Tests that need a process of their own run this binary again, see [`alone`].
#![allow(unsafe_code)] // what is tested is raw memory

mod alone;
mod events;
mod maps;
mod pages;
mod scan;
mod signals;
mod support;

use libtest_mimic::{Arguments, Conclusion, Failed, Trial};
use std::process::ExitCode;
use uhmm_os::uffd::{Features, Rights, probe};

/// What a test needs of the machine.
#[derive(Clone, Copy)]
enum Needs {
    /// Nothing but /proc.
    Nothing,
    /// A userfaultfd, if only for faults of user code, with these features.
    Uffd(Features),
    /// A userfaultfd that handles kernel faults, with these features.
    Full(Features),
}

impl Needs {
    /// Why it cannot run here.
    fn unmet(self) -> Option<String> {
        let (rights, features) = match self {
            Needs::Nothing => return None,
            Needs::Uffd(features) => (support::best_rights(), features),
            Needs::Full(features) => (Rights::Full, features),
        };
        match probe(rights) {
            Err(e) => Some(e.to_string()),
            Ok(offered) if offered.contains(features) => None,
            Ok(offered) => {
                let missing: Vec<_> = (features - offered).names().collect();
                Some(format!("userfaultfd without {} here", missing.join(", ")))
            }
        }
    }
}

/// A test: name, what it needs, what it runs.
struct Test(&'static str, Needs, fn());

fn trial(test: &Test) -> Trial {
    let run = test.2;
    let trial = Trial::test(test.0, move || {
        run();
        Ok::<(), Failed>(())
    });
    match test.1.unmet() {
        Some(reason) => trial.with_kind(reason).with_ignored_flag(true),
        None => trial,
    }
}

fn main() -> ExitCode {
    if let Some(code) = alone::child() {
        return code;
    }
    let mut arguments = Arguments::from_args();
    if arguments.include_ignored || arguments.ignored {
        // What is ignored here cannot run here.
        (arguments.include_ignored, arguments.ignored) = (false, false);
    }
    let tests = [pages::TESTS, events::TESTS, scan::TESTS, maps::TESTS, signals::TESTS];
    let mut trials: Vec<Trial> = tests.into_iter().flatten().map(trial).collect();
    trials.extend(alone::trials());
    let conclusion: Conclusion = libtest_mimic::run(&arguments, trials);
    conclusion.exit_code()
}
