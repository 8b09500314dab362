//! What safe code cannot do: each file of `misuse/` must be refused by the compiler, for the reason that stands beside it.

use std::path::Path;
use std::process::Command;

/// The compiler whose words stand beside the files. Write them anew with `TRYBUILD=overwrite`.
const COMPILER: &str = "rustc 1.95.";

#[test]
fn the_compiler_refuses_misuse() {
    let refuse = |folder: &Path| trybuild::TestCases::new().compile_fail(folder.join("*.rs"));
    let folder = Path::new("tests/misuse");
    if let Some(copy) = std::env::var_os("UHMM_TEST_MISUSE") {
        return refuse(copy.as_ref());
    }
    let version = Command::new("rustc").arg("--version").output().expect("a compiler").stdout;
    if version.starts_with(COMPILER.as_bytes()) {
        return refuse(folder);
    }
    // Another compiler has other words: that it refuses is what counts.
    let copy = tempfile::tempdir().expect("a folder");
    for file in std::fs::read_dir(folder).expect("the files").map(|file| file.expect("a file").path()) {
        if file.extension().is_some_and(|kind| kind == "rs") {
            std::fs::copy(&file, copy.path().join(file.file_name().expect("a name"))).expect("a copy");
        }
    }
    let mut again = Command::new(std::env::current_exe().expect("this test"));
    let ended = again.env("TRYBUILD", "overwrite").env("UHMM_TEST_MISUSE", copy.path()).status().expect("to run again");
    assert!(ended.success(), "some misuse compiles");
}
