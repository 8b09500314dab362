//! Prints every floor of this machine, best of three runs, or median of 51 for a first launch: `cargo run --release -p uhmm-floor
//! --example floor [MiB]`.

use std::time::Duration;
use uhmm_floor::{BLOCK, CleanReturn, Copy, CopyKind, Fault, FirstLaunch, Method, Pages, Reading, Result, RoundTrip, Server};

fn best(mut run: impl FnMut() -> Result<Duration>) -> Result<f64> {
    let mut best = Duration::MAX;
    for _ in 0..3 {
        best = best.min(run()?);
    }
    Ok(best.as_secs_f64())
}

/// The steps of a first launch over three arrays of 4 MiB, and of the same by explicit copies, in microseconds.
fn first_launch() -> Result<()> {
    let mut floor = FirstLaunch::prepare(4 << 20)?;
    let mut steps: [Vec<Duration>; 10] = Default::default();
    for _ in 0..51 {
        let explicit = floor.explicit()?;
        let [by_block, launch] = [floor.launch(Reading::ByBlock)?, floor.launch(Reading::AllAtFirst)?];
        let times = [
            explicit.upload,
            explicit.download,
            explicit.reading,
            launch.protecting,
            launch.copying,
            launch.moving_out,
            launch.zeroing,
            launch.mapping,
            launch.returning,
            by_block.returning,
        ];
        steps.iter_mut().zip(times).for_each(|(times, time)| times.push(time));
    }
    let [upload, download, reading, protecting, copying, moving_out, zeroing, mapping, returning, by_block] = steps.map(|mut times| {
        times.sort();
        times[times.len() / 2].as_secs_f64() * 1e6
    });
    println!("explicit_4k upload {upload:.0} us, download {download:.0} us, reading {reading:.0} us");
    print!(
        "first_launch_4k protecting {protecting:.0} us, copying {copying:.0} us, moving out {moving_out:.0} us, zeroing {zeroing:.0} us, "
    );
    println!("mapping {mapping:.0} us, returning {returning:.0} us or {by_block:.0} us by the block");
    Ok(())
}

fn main() -> Result<()> {
    let size = std::env::args().nth(1).and_then(|mib| mib.parse::<usize>().ok()).unwrap_or(512) << 20;
    let rate = |seconds: f64| size as f64 / seconds / 1e9;
    for (name, kind) in [("memcpy", CopyKind::Memcpy), ("stream", CopyKind::Stream)] {
        let mut floor = Copy::prepare(size, kind)?;
        println!("{name} {:.2} GB/s", rate(best(|| floor.run())?));
    }
    for (name, pages) in [("2m", Pages::Huge), ("4k", Pages::Small)] {
        for (by, threads) in [("", 1), ("_two_threads", 2)] {
            let mut floor = RoundTrip::prepare(size, pages, threads)?;
            let mut home = Duration::MAX;
            let there = best(|| floor.run().map(|time| (time.to_device, home = home.min(time.home)).0))?;
            println!("migrate_to_device_{name}{by} {:.2} GB/s", rate(there));
            println!("migrate_home_{name}{by} {:.2} GB/s", rate(home.as_secs_f64()));
        }
        let mut floor = CleanReturn::prepare(size, pages)?;
        println!("clean_return_{name} {:.2} us per 2 MiB", best(|| floor.run())? * 1e6 / (size / BLOCK) as f64);
    }
    for (who, server) in [
        ("handler", Server::Handler),
        ("handler_same_core", Server::HandlerSameCore),
        ("itself", Server::Itself),
        ("two_themselves", Server::TwoThemselves),
    ] {
        for (how, method) in [("copy", Method::Copy), ("move", Method::Move)] {
            for (chunk, pages) in [(4096, Pages::Small), (65536, Pages::Small), (BLOCK, Pages::Huge)] {
                let mut floor = Fault::prepare(size, server, method, chunk, pages)?;
                let seconds = best(|| floor.run())?;
                let each = seconds * 1e6 / floor.faults() as f64;
                println!("fault_{who}_{how}_{}k {each:.2} us {:.2} GB/s", chunk >> 10, rate(seconds));
            }
        }
    }
    first_launch()
}
