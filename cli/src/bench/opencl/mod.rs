//! An OpenCL device by plain pointers, against programs that are written for OpenCL (`bench/explicit`): the same device, the same kernels, the same input.
//!
//! What is timed is a round: from input that the CPU has written to the CPU having read the result. Three programs take turns in changing order: uhmm; explicit, which made its
//! buffers before the first round; fresh, which makes them for each. Their arrays are ordinary vectors, each program's own, that live through all rounds, and the CPU writes
//! them anew before each.

mod arrays;
mod iterated;
mod launch;
mod pages;
mod sparse;
mod strided;

use super::{Measure, Row};
use crate::options::{self, Group};
use anyhow::Result;
use std::time::{Duration, Instant};
use uhmm::{Ctx, Device, Kernel, OpenCl, Uhmm};
use uhmm_explicit::Cl;

/// What the rows are measured with.
struct Bench<'a> {
    hmm: &'a Uhmm,
    device: &'a Device,
    cl: &'a Cl,
    pairs: u32,
}

/// Measures the rows of this group.
pub(super) fn run(args: &options::Bench, print: &mut impl FnMut(Row) -> Result<()>) -> Result<()> {
    let name = if args.device.starts_with("opencl") { &args.device } else { "opencl" };
    let found = match uhmm::opencl_device(name) {
        Ok(found) => found,
        Err(why) if args.group == Group::All => {
            eprintln!("skipped opencl: {why}");
            return Ok(());
        }
        Err(why) => anyhow::bail!(why),
    };
    let hmm = Uhmm::new()?;
    let device = hmm.device(name)?;
    let bench = Bench { hmm: &hmm, device: &device, cl: &Cl::open(found.number)?, pairs: args.pairs };
    arrays::run(&bench, print)?;
    iterated::run(&bench, print)?;
    sparse::run(&bench, print)?;
    strided::run(&bench, print)?;
    launch::run(&bench, print)?;
    pages::run(&bench, print)
}

/// A kernel that is written in OpenCL C only.
struct Written(OpenCl);

impl Written {
    fn new(source: &'static str, name: &'static str, local: usize) -> Written {
        Written(OpenCl { source: source.into(), name: name.into(), local: [local, 1, 1], options: "".into() })
    }
}

impl Kernel for Written {
    fn run(&self, _: &Ctx<'_>) {
        panic!("this kernel is for OpenCL devices");
    }

    fn opencl_form(&self) -> Option<&OpenCl> {
        Some(&self.0)
    }
}

/// The orders of three programs, so that each comes after each of the others equally often.
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1], [2, 0, 1], [1, 0, 2]];

/// Times three programs in turns, after one turn that does not count.
fn in_turns(turns: u32, programs: [&mut dyn FnMut() -> Result<Duration>; 3]) -> Result<Vec<[Duration; 3]>> {
    let mut all = vec![];
    for turn in 0..=turns as usize {
        let mut times = [Duration::ZERO; 3];
        for who in ORDERS[turn % ORDERS.len()] {
            times[who] = programs[who]()?;
        }
        all.push(times);
    }
    all.remove(0);
    Ok(all)
}

/// The rows of uhmm against the two other programs.
fn rows(names: [&'static str; 2], times: &[[Duration; 3]]) -> [Row; 2] {
    let against = |name, goal, other: usize| {
        let pairs: Vec<_> = times.iter().map(|times| (times[0], times[other])).collect();
        Measure { name, unit: "ms", work: 1e-3, goal }.row(&pairs)
    };
    [against(names[0], 1.03, 1), against(names[1], 1.0, 2)]
}

/// How long `call` takes.
fn timed(call: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let start = Instant::now();
    call()?;
    Ok(start.elapsed())
}
