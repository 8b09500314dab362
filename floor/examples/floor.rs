//! Prints every floor of this machine, best of three runs: `cargo run --release -p uhmm-floor --example floor [MiB]`.

use std::time::Duration;
use uhmm_floor::{BLOCK, CleanReturn, Copy, CopyKind, Fault, Method, Pages, Result, RoundTrip, Server};

fn best(mut run: impl FnMut() -> Result<Duration>) -> Result<f64> {
    let mut best = Duration::MAX;
    for _ in 0..3 {
        best = best.min(run()?);
    }
    Ok(best.as_secs_f64())
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
    Ok(())
}
