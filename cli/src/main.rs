//! The `uhmm` command.
//!
//! Results go to standard output, as text for people or as JSON; what went wrong goes to standard error as one line that starts with
//! "error:". Colours are for terminals only.

mod bench;
mod bfs;
mod demo;
mod digits;
mod doctor;
mod k_means;
mod matmul;
mod mul_mat;
mod npy;
mod options;
mod report;
mod run;
mod series;
mod stencil;

use clap::Parser;
use options::{Cli, Command};
use owo_colors::OwoColorize;
use std::io::ErrorKind;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Doctor => doctor::run(cli.json),
        Command::MulMat(args) => mul_mat::run(&args, cli.json),
        Command::Stencil(args) => stencil::run(&args, cli.json),
        Command::KMeans(args) => k_means::run(&args, cli.json),
        Command::Bfs(args) => bfs::run(&args, cli.json),
        Command::Demo(args) => demo::run(&args, cli.json),
        Command::Bench(args) => bench::run(&args, cli.json),
        Command::Run(args) => run::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has enough: `uhmm bench | head -1`.
        Err(error) if error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            anstream::eprintln!("{} {}", "error:".red().bold(), report::message(&error));
            ExitCode::from(error.downcast_ref::<run::NotRun>().map_or(1, |not_run| not_run.status))
        }
    }
}
