//! Races for a long time.
//!
//! # Rules
//! * Each race is a run of its test's binary of its own, with nothing beside it: what fails is known by its name, and a hang stops no other.
//! * How long it races is `UHMM_TEST_SECONDS`, which the tests know. Those that have another end are done sooner; the time they leave is not given to others.
//! * The test's runner has a limit of its own, and knows more of what hangs. The limit here is above it.

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Where races are: the package and its test.
const PLACES: &[(&str, &str)] = &[("uhmm-kernel-parity", "parity"), ("uhmm", "suite"), ("uhmm-dmirror", "preload")];

/// Nothing races for less: it would lose too seldom.
const LEAST: u64 = 5;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Minutes in total: the races share them evenly, and none gets less than 5 seconds. What it takes to start each, a second or a few, comes on top
    #[arg(long, value_name = "N", default_value_t = 10.0)]
    minutes: f64,
    /// Only the races whose names contain this
    #[arg(long, value_name = "FILTER", default_value = "")]
    only: String,
    /// Says which races there are, and runs none
    #[arg(long)]
    list: bool,
    /// Builds with optimisation
    #[arg(long)]
    release: bool,
}

/// A test that races.
struct Race {
    package: &'static str,
    test: &'static str,
    name: String,
}

/// How one ended.
enum End {
    Passed,
    Ignored,
    Failed(ExitStatus),
    Hung,
}

impl End {
    fn word(&self) -> String {
        match self {
            End::Passed => "ok".into(),
            End::Ignored => "ignored: it needs a right that this user has not".into(),
            End::Failed(status) => format!("FAILED ({status})"),
            End::Hung => "HANGS, killed".into(),
        }
    }

    fn is_bad(&self) -> bool {
        matches!(self, End::Failed(_) | End::Hung)
    }
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    ensure!(options.minutes.is_finite() && options.minutes > 0.0, "--minutes takes a number above 0");
    let mut races = vec![];
    for &(package, test) in PLACES {
        races.extend(races_of(package, test, options)?);
    }
    ensure!(!races.is_empty(), "no race has a name that contains \"{}\": --list shows all", options.only);
    if options.list {
        races.iter().for_each(|race| println!("{} {}", race.package, race.name));
        return Ok(ExitCode::SUCCESS);
    }
    let seconds = ((options.minutes * 60.0) as u64 / races.len() as u64).max(LEAST);
    println!("{} races, {seconds} seconds each", races.len());
    let log = std::env::temp_dir().join(format!("uhmm-stress-{}", std::process::id()));
    let begin = Instant::now();
    let mut bad = vec![];
    let mut ignored = 0;
    for (number, race) in races.iter().enumerate() {
        let started = Instant::now();
        let end = one(race, options, seconds, &log).with_context(|| format!("{} was not run", race.name))?;
        let (number, took) = (number + 1, started.elapsed().as_secs_f64());
        println!("{number:>3}/{} {:<60} {took:>6.1} s  {}", races.len(), race.name, end.word());
        ignored += usize::from(matches!(end, End::Ignored));
        if end.is_bad() {
            println!("{}", String::from_utf8_lossy(&std::fs::read(&log)?));
            bad.push((race, end));
        }
    }
    let _ = std::fs::remove_file(log);
    let minutes = begin.elapsed().as_secs_f64() / 60.0;
    let passed = races.len() - ignored - bad.len();
    println!("{passed} passed, {} failed, {ignored} ignored, in {minutes:.1} minutes", bad.len());
    for (race, end) in &bad {
        println!("{}: {}", race.name, end.word());
        println!("    UHMM_TEST_SECONDS={seconds} cargo test -p {} --test {} -- --exact {}", race.package, race.test, race.name);
    }
    ensure!(passed + bad.len() > 0, "no race could run: `uhmm doctor` says what is missing");
    Ok(if bad.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Cargo, to run a test of a package with these arguments.
fn cargo(package: &str, test: &str, release: bool, arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").map_or("cargo".into(), PathBuf::from));
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    command.args(["test", "--quiet", "--package", package, "--test", test]);
    if release {
        command.arg("--release");
    }
    command.arg("--").args(arguments).stdin(Stdio::null());
    command
}

/// The races of a test, which is built by that.
fn races_of(package: &'static str, test: &'static str, options: &Options) -> anyhow::Result<Vec<Race>> {
    let output = cargo(package, test, options.release, &["--list"]).stderr(Stdio::inherit()).output().context("cargo was not started")?;
    ensure!(output.status.success(), "the tests of {package} were not built, or do not say their names");
    let text = String::from_utf8(output.stdout).context("names of tests are words")?;
    let names = text.lines().filter_map(|line| line.strip_suffix(": test"));
    let wanted = names.filter(|name| name.contains("race") && name.contains(&options.only));
    Ok(wanted.map(|name| Race { package, test, name: name.to_owned() }).collect())
}

/// Runs a race; what it says goes to `log`.
fn one(race: &Race, options: &Options, seconds: u64, log: &Path) -> anyhow::Result<End> {
    // A file, not a pipe: what a killed race leaves behind may have it open, and nobody waits for that.
    let said = File::create(log).with_context(|| format!("{} was not created", log.display()))?;
    let mut command = cargo(race.package, race.test, options.release, &["--exact", &race.name]);
    command.env("UHMM_TEST_SECONDS", seconds.to_string()).stdout(said.try_clone()?).stderr(said);
    // A group of its own, to be killed with all that it started.
    let mut child = command.process_group(0).spawn().context("cargo was not started")?;
    // Some tests race several times, one after another; their runner allows four times as long and two minutes.
    let limit = Instant::now() + Duration::from_secs(5 * seconds + 240);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > limit {
            if let Some(group) = Pid::from_raw(child.id() as i32) {
                let _ = kill_process_group(group, Signal::KILL);
            }
            child.wait()?;
            return Ok(End::Hung);
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    if !status.success() {
        return Ok(End::Failed(status));
    }
    let text = String::from_utf8_lossy(&std::fs::read(log)?).into_owned();
    Ok(if text.contains("1 passed") { End::Passed } else { End::Ignored })
}
