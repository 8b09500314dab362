//! A launch over what is on the device already, and unchanged, against the bare enqueue and the wait for its end.

use super::{Bench, Measure, Row, Written};
use crate::bench::in_pairs;
use anyhow::Result;
use std::time::{Duration, Instant};
use uhmm::{args, inout};
use uhmm_explicit::launch::{Launch, SOURCE};
use uhmm_floor::PAGE;

/// Launches of one time: the mean of so many.
const MANY: u32 = 200;

/// The bare launch by another thread than the one that asks for it, above the bare launch: what uhmm, whose threads have descriptors of their own, cannot be below.
fn by_another(bench: &Bench<'_>) -> Result<Row> {
    let mut bare = Launch::new(bench.cl, 1 << 20)?;
    let mut handed = Launch::new(bench.cl, 1 << 20)?;
    let theirs = || {
        let start = Instant::now();
        handed.run_by_another(MANY)?;
        Ok(start.elapsed() / MANY)
    };
    let pairs = in_pairs(bench.pairs, theirs, || each(&mut bare))?;
    Ok(above("opencl_launch_by_another", &pairs))
}

/// The mean time of a bare launch.
fn each(bare: &mut Launch<'_>) -> Result<Duration> {
    let start = Instant::now();
    for _ in 0..MANY {
        bare.run()?;
    }
    Ok(start.elapsed() / MANY)
}

fn above(name: &'static str, pairs: &[(Duration, Duration)]) -> Row {
    let above: Vec<_> = pairs.iter().map(|(ours, bare)| (ours.as_secs_f64() * 1e6, bare.as_secs_f64() * 1e6)).collect();
    Measure { name, unit: "us", work: 1e-6, goal: 5.0 }.row_above(&above)
}

pub(super) fn run(bench: &Bench<'_>, print: &mut impl FnMut(Row) -> Result<()>) -> Result<()> {
    print(by_another(bench)?)?;
    let forms = Written::new(SOURCE, "nothing", 1);
    for (name, megabytes) in [("opencl_launch_resident_1m", 1), ("opencl_launch_resident_1g", 1024)] {
        let mut all = vec![1u8; (megabytes << 20) + PAGE];
        let from = all.as_ptr().align_offset(PAGE);
        let data = &mut all[from..from + (megabytes << 20)];
        let mut bare = Launch::new(bench.cl, megabytes << 20)?;
        let ours = || {
            bench.device.run(&forms, 1, args![inout(data)])?;
            let start = Instant::now();
            for _ in 0..MANY {
                bench.device.run(&forms, 1, args![inout(data)])?;
            }
            Ok(start.elapsed() / MANY)
        };
        let pairs = in_pairs(bench.pairs, ours, || each(&mut bare))?;
        print(above(name, &pairs))?;
    }
    Ok(())
}
