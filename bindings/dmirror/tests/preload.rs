//! Programs in C, with the library preloaded: what they find without looking at what a device does with memory.
//!
//! The library is built here, for a library that is preloaded is no dependency of a test. What needs the right to handle page faults is reported as ignored where this user has not got it.

mod build;

use libtest_mimic::{Arguments, Failed, Trial};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use uhmm_core::mode::Mode;
use uhmm_core::port::{Owner, PortError, Station};
use uhmm_core::{CoreRef, DeviceConfig};
use uhmm_os::{Errno, PAGE};

type Outcome = Result<(), Failed>;

/// Why tests are ignored, if they are.
const NO_RIGHT: &str = "this user may not handle page faults of the kernel: see `uhmm doctor`";

fn main() {
    let full = CoreRef::get().is_ok_and(|core| core.mode() == Mode::Full);
    let served = full && ports_are_served();
    let trial = |name, may: bool| {
        let trial = Trial::test(name, move || succeeds(name, &[])).with_ignored_flag(!may);
        if may { trial } else { trial.with_kind(NO_RIGHT) }
    };
    let mut trials = vec![];
    trials.extend(["descriptors", "processes", "arguments", "files", "mapping", "gup", "race"].map(|name| trial(name, full)));
    trials.extend(["commands", "userfaults", "traffic"].map(|name| trial(name, served)));
    trials.push(Trial::test("null", || succeeds("null", &[("UHMM_DMIRROR", "null")])));
    trials.push(Trial::test("refused_without_rights", refused));
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// Whether a port does anything.
fn ports_are_served() -> bool {
    let config = DeviceConfig { coherent: true, threads: 1, memory: 2 << 20, ..DeviceConfig::new("probe") };
    let Ok(station) = Station::open(config, uhmm_soft::open) else { return false };
    let page = vec![0u8; 2 * PAGE];
    let start = page.as_ptr().addr().next_multiple_of(PAGE);
    let port = station.port(Owner { number: 1, coherent: false });
    port.is_ok_and(|port| port.read(start, &mut [0; PAGE]) != Err(PortError::System(Errno::NOSYS)))
}

/// The library, built once.
fn library() -> Result<&'static Path, Failed> {
    static LIBRARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    LIBRARY.get_or_init(build::library).as_deref().map_err(|e| e.into())
}

/// Runs a program under the library; one that hangs is an error.
fn run(name: &str, environment: &[(&str, &str)]) -> Result<Output, Failed> {
    let library = library()?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/programs/{name}.c"));
    let program = build::program(&format!("dmirror-{name}"), &[source])?;
    let mut command = Command::new(&program);
    command.env("LD_PRELOAD", library).env_remove("UHMM_DMIRROR").envs(environment.iter().copied());
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let seconds = std::env::var("UHMM_TEST_SECONDS").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(0);
    let limit = Instant::now() + Duration::from_secs(60 + seconds);
    while child.try_wait()?.is_none() {
        if Instant::now() > limit {
            child.kill()?;
            child.wait()?;
            return Err(format!("{name} hangs").into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output()?;
    std::fs::remove_file(program)?;
    Ok(output)
}

fn succeeds(name: &str, environment: &[(&str, &str)]) -> Outcome {
    let output = run(name, environment)?;
    let said = [String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)].concat();
    if output.status.success() && said.is_empty() { Ok(()) } else { Err(format!("{name}: {}\n{said}", output.status).into()) }
}

/// One line on standard error says why, and what to do.
fn refused() -> Outcome {
    let output = run("refused", &[("UHMM_MODE", "none")])?;
    let said = String::from_utf8_lossy(&output.stderr);
    let as_it_should = output.status.success() && said.lines().count() == 1 && said.contains("uhmm doctor");
    if as_it_should { Ok(()) } else { Err(format!("{}: {said}", output.status).into()) }
}
