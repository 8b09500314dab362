//! Every floor runs on a small size, more than once, and gives a time that is not nothing. Where this user has no userfaultfd, the
//! floors that need it are reported as ignored.

use libtest_mimic::{Arguments, Trial};
use std::time::Duration;
use uhmm_floor::{CleanReturn, Copy, CopyKind, Error, Fault, FirstLaunch, Method, Pages, Reading, RoundTrip, Server};

const SIZE: usize = 8 << 20;

fn main() {
    let missing = match RoundTrip::prepare(SIZE, Pages::Small, 1) {
        Err(error) if error.is_missing_right() => {
            eprintln!("skipping the floors that need userfaultfd: {error}");
            true
        }
        _ => false,
    };
    let mut trials = vec![
        Trial::test("memcpy", || copy(CopyKind::Memcpy)),
        Trial::test("stream", || copy(CopyKind::Stream)),
        Trial::test("a_size_that_is_no_multiple_of_2_mib_is_refused", odd_size),
    ];
    for pages in [Pages::Huge, Pages::Small] {
        for threads in [1, 2] {
            let name = format!("round_trip_{pages:?}_{threads}");
            trials.push(Trial::test(name, move || round_trip(pages, threads)).with_ignored_flag(missing));
        }
        trials.push(Trial::test(format!("clean_return_{pages:?}"), move || clean_return(pages)).with_ignored_flag(missing));
    }
    for reading in [Reading::ByBlock, Reading::AllAtFirst] {
        trials.push(Trial::test(format!("first_launch_{reading:?}"), move || first_launch(reading)).with_ignored_flag(missing));
    }
    for server in [Server::Handler, Server::HandlerSameCore, Server::Itself, Server::TwoThemselves] {
        for method in [Method::Copy, Method::Move] {
            for (chunk, pages) in [(4096, Pages::Small), (65536, Pages::Small), (2 << 20, Pages::Small), (2 << 20, Pages::Huge)] {
                let name = format!("fault_{server:?}_{method:?}_{}k_{pages:?}", chunk >> 10);
                trials.push(Trial::test(name, move || fault(server, method, chunk, pages)).with_ignored_flag(missing));
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

type Outcome = Result<(), libtest_mimic::Failed>;

fn took_time(taken: Duration) -> Outcome {
    if taken > Duration::ZERO { Ok(()) } else { Err("the clock did not move".into()) }
}

fn copy(kind: CopyKind) -> Outcome {
    let mut floor = Copy::prepare(SIZE, kind)?;
    took_time(floor.run()?)?;
    took_time(floor.run()?)
}

fn odd_size() -> Outcome {
    for size in [0, 4096, (2 << 20) + 4096] {
        match Copy::prepare(size, CopyKind::Memcpy) {
            Err(Error::Size(refused)) if refused == size => {}
            other => return Err(format!("{size} bytes: {other:?}").into()),
        }
    }
    Ok(())
}

fn round_trip(pages: Pages, threads: usize) -> Outcome {
    let mut floor = RoundTrip::prepare(SIZE, pages, threads)?;
    for _ in 0..3 {
        let time = floor.run()?;
        took_time(time.to_device)?;
        took_time(time.home)?;
    }
    Ok(())
}

fn clean_return(pages: Pages) -> Outcome {
    let mut floor = CleanReturn::prepare(SIZE, pages)?;
    took_time(floor.run()?)?;
    took_time(floor.run()?)
}

/// Either program checks its result, which other numbers give each time.
fn first_launch(reading: Reading) -> Outcome {
    for size in [2 << 20, 4 << 20] {
        let mut floor = FirstLaunch::prepare(size)?;
        for _ in 0..3 {
            took_time(floor.explicit()?.total())?;
            took_time(floor.launch(reading)?.total())?;
        }
    }
    Ok(())
}

fn fault(server: Server, method: Method, chunk: usize, pages: Pages) -> Outcome {
    let mut floor = Fault::prepare(SIZE, server, method, chunk, pages)?;
    if floor.faults() != SIZE / chunk {
        return Err(format!("{} faults", floor.faults()).into());
    }
    for _ in 0..3 {
        took_time(floor.run()?)?;
    }
    Ok(())
}
