//! Tests in a process of their own: the parent runs this binary again with a test's name in the environment, and looks how it ends.

use crate::{Needs, maps, signals};
use libtest_mimic::{Failed, Trial};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const VARIABLE: &str = "UHMM_OS_TEST_ALONE";
const LIMIT: Duration = Duration::from_secs(60);

/// How a process should end.
#[derive(Clone, Copy)]
pub(crate) enum End {
    /// By itself, with success.
    Well,
    /// By this signal.
    Signal(i32),
}

/// A test: name, what it needs, how it should end, what it runs (in the main thread; there is no other).
pub(crate) struct Alone(pub(crate) &'static str, pub(crate) Needs, pub(crate) End, pub(crate) fn());

fn all() -> impl Iterator<Item = &'static Alone> {
    signals::ALONE.iter().chain(maps::ALONE)
}

/// In a child: runs its test.
pub(crate) fn child() -> Option<ExitCode> {
    let name = std::env::var(VARIABLE).ok()?;
    let test = all().find(|test| test.0 == name).expect("no such test");
    // SAFETY: no core dumps of what is meant to die.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }) };
    (test.3)();
    Some(ExitCode::SUCCESS)
}

pub(crate) fn trials() -> impl Iterator<Item = Trial> {
    all().map(|test| {
        let trial = Trial::test(test.0, || run(test));
        match test.1.unmet() {
            Some(reason) => trial.with_kind(reason).with_ignored_flag(true),
            None => trial,
        }
    })
}

fn run(test: &Alone) -> Result<(), Failed> {
    let mut child = Command::new(std::env::current_exe()?)
        .env(VARIABLE, test.0)
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > LIMIT {
            child.kill()?;
            return Err(format!("still running after {LIMIT:?}").into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output()?;
    if ended(output.status, test.2) {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("ended with {}\n{said}", output.status).into())
}

fn ended(status: ExitStatus, as_expected: End) -> bool {
    match as_expected {
        End::Well => status.success(),
        End::Signal(signal) => status.signal() == Some(signal),
    }
}
