//! What is done with this workspace now and then, and neither on each build nor by who uses it: `cargo xtask stress`.

mod stress;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Tasks of this workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Runs the tests that are races one after another, for minutes instead of seconds
    ///
    /// A race is a test whose name contains "race": mappings that change (munmap, mremap, mprotect, madvise, fork) against a device that reads, writes and migrates, with private and with coherent
    /// memory, and those of the library. The exit status is 1 if one fails or hangs.
    Stress(stress::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Stress(options) => stress::run(&options),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
