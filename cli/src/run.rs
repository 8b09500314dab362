//! `uhmm run`: a program with uhmm's library preloaded.

use crate::options::Run;
use anyhow::{Context, Result, bail};
use std::env;
use std::ffi::OsString;
use std::fmt;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// The library's file, which lies beside the command.
const LIBRARY: &str = "libuhmm_dmirror.so";

/// The program cannot be run.
#[derive(Debug)]
pub(crate) struct NotRun {
    program: OsString,
    /// What the command ends with, as shells and env(1) do: 127 if it was not found, else 126.
    pub(crate) status: u8,
}

impl fmt::Display for NotRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot run {}", self.program.display())
    }
}

/// Becomes the program. Returns only if that cannot be.
pub(crate) fn run(args: &Run) -> Result<()> {
    let [program, arguments @ ..] = &args.program[..] else { bail!("no program to run: name one behind --") };
    let error = Command::new(program).args(arguments).env("LD_PRELOAD", preload(&library()?)).exec();
    let status = if error.kind() == ErrorKind::NotFound { 127 } else { 126 };
    Err(error).context(NotRun { program: program.clone(), status })
}

fn library() -> Result<PathBuf> {
    let here = env::current_exe().context("cannot tell where this command lies, and so where its library does")?;
    let library = here.with_file_name(LIBRARY);
    if !library.is_file() {
        bail!(
            "{} is missing: build it with `cargo build --release -p uhmm-dmirror`, or put it beside {}",
            library.display(),
            here.display()
        );
    }
    // The loader takes spaces and colons for the end of a name, and cannot be told otherwise.
    if library.to_string_lossy().contains([' ', ':']) {
        bail!("{} cannot be preloaded, for its path has a space or a colon in it: move it", library.display());
    }
    Ok(library)
}

/// The libraries to preload: ours, and behind it what was to be preloaded anyway.
fn preload(library: &std::path::Path) -> OsString {
    let mut all = OsString::from(library);
    if let Some(others) = env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        all.push(":");
        all.push(others);
    }
    all
}
