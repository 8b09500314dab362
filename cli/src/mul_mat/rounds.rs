//! The rounds that are timed: the three programs one after the other, in changing order, and then the launches after the first.
//!
//! A slow machine is slow for all three in the same round, so what counts is the ratio within a round.

use super::problem::Problem;
use super::programs::{self, Arrays, Explicit, Shape, launch, read_all};
use crate::report::Figure;
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};
use uhmm::{Device, Host, Stats};

/// Rounds at least and at most, and how long rounds beyond the least may take together.
const LEAST: usize = 9;
const MOST: usize = 51;
const ENOUGH: Duration = Duration::from_millis(4000);

/// The orders of the three in a round, so that each comes after each of the others equally often.
const ORDERS: [[u8; 3]; 6] = [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1], [2, 0, 1], [1, 0, 2]];

/// What was measured.
pub(crate) struct Measured {
    pub(crate) device: String,
    pub(crate) threads: usize,
    pub(crate) shape: Shape,
    pub(crate) rounds: usize,
    pub(crate) native: Figure,
    pub(crate) explicit: Figure,
    pub(crate) uhmm: Figure,
    /// The kernel's own time in uhmm's rounds.
    pub(crate) kernel: Figure,
    /// The same in explicit's rounds: its buffers are whole huge pages, so the kernel itself may be faster there.
    pub(crate) explicit_kernel: Figure,
    pub(crate) ratio: Figure,
    pub(crate) max_rel_error: f64,
    /// What uhmm moved in its last round.
    pub(crate) moved: Stats,
    pub(crate) unchanged: Again,
    pub(crate) one_row: Again,
}

/// A launch after the first.
pub(crate) struct Again {
    pub(crate) explicit: Figure,
    pub(crate) uhmm: Figure,
    /// What uhmm moved in the last of them.
    pub(crate) moved: Stats,
}

/// Runs `call` and says what uhmm did meanwhile.
fn watch<T>(device: &Device, call: impl FnOnce() -> Result<T>) -> Result<(T, Stats)> {
    let before = device.stats();
    let result = call()?;
    Ok((result, device.stats() - before))
}

/// Times everything.
pub(crate) fn measure(device: &Device, problem: &Problem) -> Result<Measured> {
    let mut explicit = Explicit::new(device, problem.shape)?;
    let first = first_launches(device, problem, &mut explicit)?;
    let unchanged = unchanged(device, problem, &mut explicit)?;
    let one_row = one_row(device, problem, &mut explicit)?;
    Ok(Measured {
        device: device.name().to_string(),
        threads: device.threads(),
        shape: problem.shape,
        rounds: first.uhmm.len(),
        native: Figure::of_times(&first.native),
        explicit: Figure::of_times(&first.explicit),
        uhmm: Figure::of_times(&first.uhmm),
        kernel: Figure::of_times(&first.kernel),
        explicit_kernel: Figure::of_times(&first.explicit_kernel),
        ratio: Figure::of_ratios(&first.uhmm, &first.explicit),
        max_rel_error: first.max_rel_error,
        moved: first.moved,
        unchanged,
        one_row,
    })
}

#[derive(Default)]
struct First {
    native: Vec<Duration>,
    explicit: Vec<Duration>,
    uhmm: Vec<Duration>,
    kernel: Vec<Duration>,
    explicit_kernel: Vec<Duration>,
    max_rel_error: f64,
    moved: Stats,
}

fn first_launches(device: &Device, problem: &Problem, explicit: &mut Explicit<'_>) -> Result<First> {
    let host = Host::new(device.threads());
    let mut first = First::default();
    let start = Instant::now();
    while first.uhmm.len() < LEAST || (first.uhmm.len() < MOST && start.elapsed() < ENOUGH) {
        for who in ORDERS[first.uhmm.len() % ORDERS.len()] {
            let mut arrays = Arrays::fill(problem);
            let who = match who {
                0 => {
                    first.native.push(programs::native(&host, problem.shape, &mut arrays)?);
                    "native"
                }
                1 => {
                    let (time, moved) = watch(device, || explicit.round(&mut arrays))?;
                    first.explicit.push(time);
                    first.explicit_kernel.push(moved.kernel_time());
                    "explicit"
                }
                _ => {
                    let (time, moved) = watch(device, || programs::uhmm(device, problem.shape, &mut arrays))?;
                    first.uhmm.push(time);
                    first.kernel.push(moved.kernel_time());
                    first.moved = moved;
                    "uhmm"
                }
            };
            first.max_rel_error = first.max_rel_error.max(problem.check(who, &arrays.r)?);
        }
    }
    Ok(first)
}

/// Launches after which, and before which, the CPU touches nothing. The explicit program does what it always does: it does not know
/// what has changed.
fn unchanged(device: &Device, problem: &Problem, explicit: &mut Explicit<'_>) -> Result<Again> {
    // Made first, so that noting a time is no touch of a page that ours share.
    let (mut explicit_times, mut uhmm_times) = (Vec::with_capacity(LEAST), Vec::with_capacity(LEAST));
    let (mut theirs, mut ours) = (Arrays::fill_apart(problem), Arrays::fill_apart(problem));
    let mut last = Stats::default();
    let shape = problem.shape;
    launch(device, shape, &mut ours.r, &ours.a, &ours.b)?;
    for _ in 0..LEAST {
        let start = Instant::now();
        explicit.multiply(&mut theirs)?;
        explicit_times.push(start.elapsed());
        let (time, moved) = watch(device, || {
            let start = Instant::now();
            launch(device, shape, &mut ours.r, &ours.a, &ours.b)?;
            Ok(start.elapsed())
        })?;
        uhmm_times.push(time);
        last = moved;
    }
    problem.check("uhmm", &ours.r)?;
    Ok(Again { explicit: Figure::of_times(&explicit_times), uhmm: Figure::of_times(&uhmm_times), moved: last })
}

/// Launches before which the CPU writes one row of A, and after which it reads one row of R.
fn one_row(device: &Device, problem: &Problem, explicit: &mut Explicit<'_>) -> Result<Again> {
    let (mut explicit_times, mut uhmm_times) = (Vec::with_capacity(LEAST), Vec::with_capacity(LEAST));
    let (mut theirs, mut ours) = (Arrays::fill_apart(problem), Arrays::fill_apart(problem));
    let mut last = Stats::default();
    let shape = problem.shape;
    launch(device, shape, &mut ours.r, &ours.a, &ours.b)?;
    for round in 0..LEAST {
        let row = round * shape.m / LEAST;
        let (row_of_a, row_of_r) = (row * shape.k..(row + 1) * shape.k, row * shape.n..(row + 1) * shape.n);
        let start = Instant::now();
        change(&mut theirs.a[row_of_a.clone()]);
        explicit.multiply(&mut theirs)?;
        read_all(&theirs.r[row_of_r.clone()]);
        explicit_times.push(start.elapsed());
        let (time, moved) = watch(device, || {
            let start = Instant::now();
            change(&mut ours.a[row_of_a]);
            launch(device, shape, &mut ours.r, &ours.a, &ours.b)?;
            read_all(&ours.r[row_of_r.clone()]);
            Ok(start.elapsed())
        })?;
        uhmm_times.push(time);
        last = moved;
        ensure!(ours.r[row_of_r.clone()] == theirs.r[row_of_r], "wrong product: row {row} is not that of the row of A that was changed");
    }
    ensure!(ours.r == theirs.r, "wrong product: with single rows changed, uhmm's differs from that of explicit copies");
    Ok(Again { explicit: Figure::of_times(&explicit_times), uhmm: Figure::of_times(&uhmm_times), moved: last })
}

/// Writes every element of a row, so that the row's products change.
fn change(row: &mut [f32]) {
    for value in row {
        *value = -*value;
    }
}
