//! Programs in C that speak only the interface of Linux's dummy HMM device (docs/dmirror.md), run with uhmm's library preloaded. Each case is a process of its own, once with private device memory
//! and once with coherent.
//!
//! | environment | |
//! |---|---|
//! | `UHMM_PARITY=native` | without the library, on the kernel's own devices |
//! | `UHMM_DMIRROR=null` | the library's devices do nothing: what passes then tests nothing (docs/kernel-parity.md) |
//! | `UHMM_TEST_SECONDS` | how long each race runs, instead of 5 seconds |

#[path = "../../bindings/dmirror/tests/build/mod.rs"]
mod build;

use build::Unbuilt;
use libtest_mimic::{Arguments, Failed, Trial};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use uhmm_core::CoreRef;
use uhmm_core::mode::Mode;

/// What a case says with its exit status when it cannot be done here.
const SKIPPED: i32 = 77;
/// Each case ends by itself long before; a race runs its seconds longer.
const LIMIT: Duration = Duration::from_secs(30);

/// Cases that the library does not pass, of which memory, and why. They run with `--include-ignored`, and with the kernel's own devices.
const KNOWN: &[(&str, &[&str], &str)] = &[(
    "migrate_moves_written_pages_of_private_files",
    &["private"],
    "such a page stays in the system, and counts as the device's after the CPU's touch too",
)];

fn main() {
    let arguments = Arguments::from_args();
    let native = std::env::var("UHMM_PARITY").is_ok_and(|value| value == "native");
    let null = std::env::var("UHMM_DMIRROR").is_ok_and(|value| value == "null");
    let served = native || null || CoreRef::get().is_ok_and(|core| core.mode() == Mode::Full);
    if !served {
        println!("all cases are ignored: this user may not handle page faults of the kernel (`uhmm doctor` says how to)");
    }
    let program = match build::program("parity", &build::sources("programs").expect("the programs are there")) {
        Ok(program) => program,
        Err(error @ Unbuilt::NoCompiler) => {
            println!("skipped: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let library = if native || !served { None } else { Some(build::library().expect("the library is built")) };

    let listed = Command::new(&program).output().expect("the program that was just built runs");
    let listed = String::from_utf8(listed.stdout).expect("names of cases are words");
    let mut trials = vec![];
    for line in listed.lines() {
        let mut words = line.split(' ').map(str::to_owned);
        let name = words.next().expect("a line has a word");
        for kind in words {
            let known = KNOWN.iter().any(|(case, kinds, _)| *case == name && kinds.contains(&kind.as_str()));
            let (program, library) = (program.clone(), library.clone());
            let case = name.clone();
            let trial = Trial::test(format!("{name}::{kind}"), move || run(&program, library.as_deref(), &case, &kind));
            let trial = trial.with_ignored_flag(known && !native || !served);
            trials.push(if served { trial } else { trial.with_kind("needs the right to handle page faults of the kernel") });
        }
    }
    trials.sort_by(|a, b| a.name().cmp(b.name()));
    let conclusion = libtest_mimic::run(&arguments, trials);
    let _ = std::fs::remove_file(program);
    if served && !native && !null && !arguments.list {
        for (case, kinds, why) in KNOWN {
            println!("known difference: {case} ({}): {why}", kinds.join(", "));
        }
    }
    conclusion.exit();
}

fn run(program: &Path, library: Option<&Path>, case: &str, kind: &str) -> Result<(), Failed> {
    // A file, not a pipe: children that a failed case leaves behind have it open, and nobody waits for them.
    let said = program.with_extension(format!("{case}-{kind}"));
    let output = std::fs::File::create(&said)?;
    let mut command = Command::new(program);
    command.args([case, kind]).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    if let Some(library) = library {
        command.env("LD_PRELOAD", library);
    }
    let mut child = command.spawn()?;
    let status = ended(&mut child)?;
    let text = String::from_utf8_lossy(&std::fs::read(&said)?).into_owned();
    let _ = std::fs::remove_file(&said);
    let Some(status) = status else {
        child.kill()?;
        let _ = child.wait();
        return Err(format!("{case} {kind} hangs\n{text}").into());
    };
    let said = text;
    match status.code() {
        Some(0) if said.is_empty() => Ok(()),
        Some(SKIPPED) => {
            eprintln!("{case}::{kind} {}", said.trim());
            Ok(())
        }
        _ => Err(format!("{status}\n{said}").into()),
    }
}

/// The status of a child that ends in time.
fn ended(child: &mut Child) -> std::io::Result<Option<ExitStatus>> {
    let seconds = std::env::var("UHMM_TEST_SECONDS").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(5);
    let limit = Instant::now() + LIMIT + Duration::from_secs(seconds);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() > limit {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
