//! One workload under the policies that come with uhmm: what each moves, and how often somebody waits for a page.
//!
//!     cargo run --release -p uhmm --example policies
//!
//! A table is searched by kernels that touch a little of it, and a result is written by kernels and read by the CPU.

use std::time::Instant;
use uhmm::policy::{Declared, NeverMigrate, OnDemand, Policy, Recording};
use uhmm::{Advice, Ctx, Device, Error, Uhmm, args, inout, inp};

const TABLE: usize = 16 << 20;
const RESULT: usize = 1 << 20;
const PART: usize = 1 << 16;

/// Looks up 16 entries of the table for each part of the result, and adds them to it.
fn search(ctx: &Ctx<'_>) {
    let table = ctx.inp::<u32>(1);
    let round = ctx.value::<u64>(2) as usize;
    // All in one tenth of the table.
    let sum = (0..16).fold(0u32, |sum, i| sum.wrapping_add(table[(ctx.group() * 7919 + i * 104_729 + round) % (TABLE / 10)]));
    ctx.out::<u32>(0).chunk(PART).iter_mut().for_each(|x| *x = x.wrapping_add(sum));
}

fn workload(dev: &Device, table: &[u32], result: &mut [u32]) -> Result<u32, Error> {
    let mut sum = 0u32;
    for round in 0..4u64 {
        dev.run(&search, RESULT / PART, args![inout(&mut result[..]), inp(table), round])?;
        // The CPU looks at one element of each part.
        sum = result.iter().step_by(PART).fold(sum, |sum, &x| sum.wrapping_add(x));
    }
    Ok(sum)
}

fn run<P: Policy + 'static>(name: &str, hmm: &Uhmm, policy: P, advice: Option<Advice>) -> Result<u32, Error> {
    let dev = hmm.soft("soft").memory(256 << 20).open()?;
    let recording = hmm.set_policy(Recording::new(policy, 0)?)?;
    let table: Vec<u32> = (0..TABLE as u32).collect();
    let mut result = vec![0u32; RESULT];
    if let Some(advice) = advice {
        hmm.advise(&result, advice)?;
    }
    let (start, before) = (Instant::now(), dev.stats());
    let sum = workload(&dev, &table, &mut result)?;
    let (time, stats, asked) = (start.elapsed(), dev.stats() - before, recording.totals());
    println!(
        "{name:24} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9.1?}",
        stats.bytes_to_device >> 10,
        stats.bytes_to_cpu >> 10,
        stats.device_faults,
        stats.cpu_faults,
        asked.launches,
        time
    );
    Ok(sum)
}

fn main() -> Result<(), Error> {
    let hmm = Uhmm::new()?;
    println!("{:24} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9}", "", "KiB to", "KiB", "device", "CPU", "launch", "");
    println!("{:24} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9}", "policy", "device", "home", "faults", "faults", "asks", "time");
    let sums = [
        run("Declared", &hmm, Declared, None)?,
        run("OnDemand", &hmm, OnDemand, None)?,
        run("NeverMigrate", &hmm, NeverMigrate, None)?,
        run("Declared, ReadMostly", &hmm, Declared, Some(Advice::ReadMostly))?,
    ];
    assert!(sums.iter().all(|&sum| sum == sums[0]), "a policy changes what is moved, not what is computed");
    Ok(())
}
