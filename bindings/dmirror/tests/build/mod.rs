//! What tests with programs in C need: the library, which a test cannot depend on as it is preloaded, and the programs. Shared with `tests/kernel_parity` by its path.
#![allow(dead_code)] // a test that preloads nothing builds no library

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The library, built as this test was.
pub(crate) fn library() -> Result<PathBuf, String> {
    let here = std::env::current_exe().map_err(|e| e.to_string())?;
    let profile = here.ancestors().nth(2).ok_or("a test lies in deps, in its profile's folder")?;
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "-p", "uhmm-dmirror", "--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")]);
    build.arg("--target-dir").arg(profile.parent().ok_or("a profile's folder lies in the target folder")?);
    if profile.ends_with("release") {
        build.arg("--release");
    }
    let library = profile.join("libuhmm_dmirror.so");
    let output = match build.output() {
        // Another user built the tests, whose cargo this one may not run; and the library beside them.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) && library.is_file() => return Ok(library),
        output => output.map_err(|e| format!("{}, which builds the library: {e}", env!("CARGO")))?,
    };
    if output.status.success() && library.is_file() {
        Ok(library)
    } else {
        Err(format!("the library was not built:\n{}", String::from_utf8_lossy(&output.stderr)))
    }
}

/// Why a program was not built.
#[derive(Debug)]
pub(crate) enum Unbuilt {
    NoCompiler,
    Wrong(String),
}

impl std::fmt::Display for Unbuilt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unbuilt::NoCompiler => f.write_str("there is no C compiler (`cc`), which builds the programs"),
            Unbuilt::Wrong(error) => write!(f, "a program was not built:\n{error}"),
        }
    }
}

/// Files in C, compiled into one program, of which there is one for each process that builds it.
pub(crate) fn program(name: &str, sources: &[PathBuf]) -> Result<PathBuf, Unbuilt> {
    let name = format!("{name}-{}", std::process::id());
    let mut built = Path::new(env!("CARGO_TARGET_TMPDIR")).join(&name);
    if std::fs::File::create(&built).is_err() {
        built = std::env::temp_dir().join(name); // another user built the tests
    }
    let mut compiler = Command::new("cc");
    compiler.args(["-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"]).arg(&built).args(sources);
    match compiler.output() {
        Ok(output) if output.status.success() => Ok(built),
        Ok(output) => Err(Unbuilt::Wrong(String::from_utf8_lossy(&output.stderr).into_owned())),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(Unbuilt::NoCompiler),
        Err(error) => Err(Unbuilt::Wrong(format!("cc: {error}"))),
    }
}

/// The sources in a folder of this package.
pub(crate) fn sources(folder: &str) -> std::io::Result<Vec<PathBuf>> {
    let mut files = vec![];
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder))? {
        files.push(entry?.path());
    }
    files.retain(|file| file.extension().is_some_and(|extension| extension == "c"));
    files.sort();
    Ok(files)
}
