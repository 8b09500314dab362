//! What can be typed after `uhmm`.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;

/// Heterogeneous memory management in user space: ordinary pointers, valid on a device too.
#[derive(Debug, Parser)]
#[command(name = "uhmm", version, after_help = "Exit status: 0 if all went well, 1 if not, 2 if the command line is wrong.")]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Print JSON: one object, or one a line for bench.
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Say what this machine and this user can do, what is missing, and how to get it.
    Doctor,
    /// Multiply two matrices on a device by their ordinary pointers, check the product, and time it against explicit copies.
    MulMat(MulMat),
    /// Let heat flow over an image, launch after launch over the same two arrays, and check every pixel.
    Stencil(Stencil),
    /// Find clusters of handwritten digits, round after round over the same points, and check every label.
    KMeans(KMeans),
    /// Search a graph breadth first, a launch for each level, and check every distance.
    Bfs(Bfs),
    /// Show what uhmm is for, in a few seconds.
    Demo(Demo),
    /// Measure uhmm against the fewest system calls that could do each job.
    Bench(Bench),
    /// Run a program in which uhmm serves the kernel's dummy HMM device. The output is the program's: --json does nothing.
    Run(Run),
}

/// Arguments of `uhmm mul-mat`.
#[derive(Debug, Args)]
pub(crate) struct MulMat {
    /// The left matrix, a .npy file of f32 in C order; it must not change meanwhile. Without files: 1797 handwritten digits times
    /// their transpose.
    #[arg(value_name = "A.npy", requires = "b", conflicts_with = "size")]
    pub(crate) a: Option<PathBuf>,
    /// The right matrix.
    #[arg(value_name = "B.npy")]
    pub(crate) b: Option<PathBuf>,
    /// Write the product to this file; one that is there already is replaced.
    #[arg(short, long, value_name = "R.npy")]
    pub(crate) output: Option<PathBuf>,
    /// Multiply two random matrices of N rows and N columns.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=32768))]
    pub(crate) size: Option<u32>,
    /// The device.
    #[arg(long, value_name = "NAME", default_value = "soft")]
    pub(crate) device: String,
}

/// Arguments of `uhmm stencil`.
#[derive(Debug, Args)]
pub(crate) struct Stencil {
    /// The image, a PNG file; colours become grey. Without one: handwritten digits, tiled.
    #[arg(value_name = "IMAGE.png", conflicts_with = "size")]
    pub(crate) image: Option<PathBuf>,
    /// Pixels of a row, and of a column, of the tiled digits.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=32768))]
    pub(crate) size: u32,
    /// Steps: launches over the whole image.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) steps: u32,
    /// Write the result to this file; one that is there already is replaced.
    #[arg(short, long, value_name = "RESULT.png")]
    pub(crate) output: Option<PathBuf>,
    /// The device.
    #[arg(long, value_name = "NAME", default_value = "soft")]
    pub(crate) device: String,
}

/// Arguments of `uhmm k-means`.
#[derive(Debug, Args)]
pub(crate) struct KMeans {
    /// How many points: the 1797 handwritten digits, then all of them over and over with noise.
    #[arg(long, value_name = "N", default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(1..=16_000_000))]
    pub(crate) points: u32,
    /// How many clusters.
    #[arg(long, value_name = "K", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=crate::k_means::kernel::MOST_CLUSTERS as i64))]
    pub(crate) clusters: u32,
    /// The most rounds; it ends with the first that changes no label.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) rounds: u32,
    /// The device.
    #[arg(long, value_name = "NAME", default_value = "soft")]
    pub(crate) device: String,
}

/// Arguments of `uhmm bfs`.
#[derive(Debug, Args)]
#[command(after_help = "\
A line of a graph's file has a node and, behind it, the nodes that edges lead to from it, with blanks between them; what follows a # is a comment.
The file may be compressed with gzip.")]
pub(crate) struct Bfs {
    /// The graph, an adjacency list. Without one: the packages of Debian 12 and what they depend on.
    #[arg(value_name = "GRAPH")]
    pub(crate) graph: Option<PathBuf>,
    /// Begin at this node. Without it: at the file's first; of Debian's packages at libc6, backwards, to all that needs it.
    #[arg(long, value_name = "NODE")]
    pub(crate) from: Option<String>,
    /// Follow edges backwards.
    #[arg(long)]
    pub(crate) reverse: bool,
    /// The device.
    #[arg(long, value_name = "NAME", default_value = "soft")]
    pub(crate) device: String,
}

/// Arguments of `uhmm demo`.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// The device.
    #[arg(long, value_name = "NAME", default_value = "soft")]
    pub(crate) device: String,
}

/// Arguments of `uhmm bench`.
#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// What to measure.
    #[arg(value_enum, default_value = "all")]
    pub(crate) group: Group,
    /// MiB that each row moves; first_launch_4k has sizes of its own.
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..=65536))]
    pub(crate) size: u32,
    /// Pairs of runs for each row; those of first_launch_4k have 7 rounds each.
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) pairs: u32,
    /// The device.
    #[arg(long, value_name = "NAME", default_value = "soft")]
    pub(crate) device: String,
}

/// Arguments of `uhmm run`.
#[derive(Debug, Args)]
#[command(after_help = "\
The program finds /dev/hmm_dmirror0 and 1, whose memory is private, 2 and 3, whose memory is coherent, and /sys/kernel/debug/gup_test.
With UHMM_DMIRROR=null in the environment they do nothing and say that they did everything.
Programs that are linked statically, and those that change their user or group (setuid), load no such library.
The exit status is the program's; 127 if there is no such program, 126 if it cannot be run.")]
pub(crate) struct Run {
    /// Preload the library that serves /dev/hmm_dmirror*; it lies beside this command, as libuhmm_dmirror.so.
    #[arg(long, required = true)]
    pub(crate) dmirror: bool,
    /// The program, looked for in PATH, and its arguments.
    #[arg(value_name = "PROGRAM", last = true, required = true)]
    pub(crate) program: Vec<OsString>,
}

/// The groups of measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Group {
    /// Moving pages to the device and home, by prefetch and by faults.
    Memory,
    /// The matrix kernel against the library that the product is checked with.
    Kernel,
    /// An OpenCL device by plain pointers against programs written for OpenCL, with buffers and copies of their own.
    #[value(name = "opencl")]
    OpenCl,
    /// Everything.
    All,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_stands_behind_the_dashes_is_the_programs() {
        let run = Cli::try_parse_from(["uhmm", "run", "--dmirror", "--", "prog", "--json", "-x"]);
        assert!(matches!(run, Ok(Cli { command: Command::Run(run), json: false }) if run.program == ["prog", "--json", "-x"]));
        assert!(Cli::try_parse_from(["uhmm", "run", "--", "prog"]).is_err());
        assert!(Cli::try_parse_from(["uhmm", "run", "--dmirror"]).is_err());
    }

    #[test]
    fn a_file_needs_a_second_one_and_excludes_a_size() {
        assert!(Cli::try_parse_from(["uhmm", "mul-mat", "a.npy"]).is_err());
        assert!(Cli::try_parse_from(["uhmm", "mul-mat", "a.npy", "b.npy", "--size", "3"]).is_err());
        assert!(Cli::try_parse_from(["uhmm", "mul-mat", "a.npy", "b.npy", "-o", "r.npy", "--json"]).is_ok());
    }
}
