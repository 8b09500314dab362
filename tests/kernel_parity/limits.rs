//! What a kernel does that no library can do otherwise: small programs in C, with no code of this project, and what they say. docs/kernel-parity.md rests on it ("What differs"); a kernel that
//! behaves otherwise is noticed here, and what differs may then be gone.

#[path = "../../bindings/dmirror/tests/build/mod.rs"]
mod build;

use libtest_mimic::{Arguments, Failed, Trial};
use std::path::Path;
use std::process::Command;

/// What a program says with its exit status when it cannot show its facts here.
const SKIPPED: i32 = 77;

/// The programs, and what each says.
const LIMITS: &[(&str, &[&str])] = &[
    (
        "private_file",
        &[
            "watch a private file mapping for missing pages: EINVAL",
            "move a written page of it away: EINVAL",
            "move a written page of a private mapping of a file in memory away: EINVAL",
            "move a page of anonymous memory away: done",
        ],
    ),
    (
        "second_userfaultfd",
        &[
            "watch what another userfaultfd watches: EBUSY",
            "watch a part of it, and more: EBUSY",
            "watch what lies beside it: done",
            "watch it when the other has let go: done",
        ],
    ),
    (
        "proc_mem",
        &[
            "read a missing page through /proc/PID/mem: EIO",
            "faults that the userfaultfd heard of: 0",
            "read it by process_vm_readv: done",
            "faults that the userfaultfd heard of: 1",
            "read it through /proc/PID/mem now: done",
            "/proc/PID/cmdline ends at a missing page: yes",
            "faults that the userfaultfd heard of: 1",
            "read a missing page by ptrace: EIO",
        ],
    ),
    (
        "mremap_several",
        &[
            "move two mappings together: done",
            "move two watched mappings together: EFAULT",
            "move one of them: done",
            "move two together of which the second is watched: EFAULT",
        ],
    ),
    (
        "fork",
        &[
            "a child reads 5, which is elsewhere, as: 0",
            "move a page away that a child has too: EBUSY",
            "move it when the child is gone: EBUSY",
            "a child reads a missing page, when the descriptor that came with the event is closed, as: 0",
            "ask to be told of forks without CAP_SYS_PTRACE: EPERM",
        ],
    ),
    ("locked", &["move a locked page away: EINVAL", "move it when it is not locked: done"]),
];

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = vec![];
    for &(name, facts) in LIMITS {
        // They take milliseconds, so what cannot be shown here is known before the list is printed.
        let outcome = shown(name, facts);
        let skipped = outcome.as_ref().err().and_then(|why| why.strip_prefix("skipped: ")).unwrap_or_default().to_owned();
        let trial = Trial::test(name, move || outcome.map_err(Failed::from)).with_ignored_flag(!skipped.is_empty());
        trials.push(trial.with_kind(skipped));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

/// Compiles and runs a program, and compares what it says.
fn shown(name: &str, facts: &[&str]) -> Result<(), String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("limits/{name}.c"));
    let program = match build::program(&format!("limits-{name}"), &[source]) {
        Err(error @ build::Unbuilt::NoCompiler) => return Err(format!("skipped: {error}")),
        program => program.map_err(|e| e.to_string())?,
    };
    // Some of them would wait for ever on a kernel that does what they say it does not.
    let output = Command::new("timeout").args(["-k", "1", "20"]).arg(&program).output().map_err(|e| format!("timeout: {e}"))?;
    std::fs::remove_file(program).map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.code() == Some(SKIPPED) {
        return Err(said.lines().last().unwrap_or_default().to_owned());
    }
    if output.status.success() && said.lines().eq(facts.iter().copied()) {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("{}\nit says:\n{said}{errors}\nexpected:\n{}", output.status, facts.join("\n")))
}
