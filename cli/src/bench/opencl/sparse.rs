//! Launches between which the CPU uses 1 % of the output and changes 1 % of the input, against a program that copies everything.

use super::{Bench, Measure, Row, Written, timed};
use crate::bench::in_pairs;
use anyhow::{Result, ensure};
use std::cell::RefCell;
use std::time::Duration;
use uhmm::{Device, args, inout, inp};
use uhmm_explicit::window::{EACH, LOCAL, SOURCE, Window};
use uhmm_floor::PAGE;

/// Elements of each array: 128 MiB.
const LEN: usize = (128 << 20) / size_of::<f32>();
/// Elements that a kernel makes: a tenth, for one that goes over all of them would take longer than the copies.
const MADE: usize = LEN / 10;
/// Elements of a page.
const EACH_PAGE: usize = PAGE / size_of::<f32>();

pub(super) fn run(bench: &Bench<'_>, print: &mut impl FnMut(Row) -> Result<()>) -> Result<()> {
    print(row(bench, "opencl_sparse_1pct", 5.0, false)?)?;
    print(row(bench, "opencl_scattered_1pct", 3.0, true)?)
}

/// Two arrays of one program, and which elements its CPU touches.
struct Arrays {
    r: Vec<f32>,
    a: Vec<f32>,
    round: usize,
    scattered: bool,
    random: fastrand::Rng,
}

impl Arrays {
    fn new(scattered: bool) -> Arrays {
        let a = (0..LEN).map(|i| (i % 1024) as f32).collect();
        Arrays { r: vec![0.0; LEN], a, round: 0, scattered, random: fastrand::Rng::with_seed(7) }
    }

    /// Where this round's window begins: the windows of the first ten rounds are all there is, and so are the next ten.
    fn from(&self) -> usize {
        self.round % 10 * MADE
    }

    /// The pieces that the CPU uses of a window: one run of 1 % of an array, or as many pages.
    fn pieces(&mut self, from: usize) -> Vec<std::ops::Range<usize>> {
        let part = LEN / 100;
        let (pieces, each) = if self.scattered { (part / EACH_PAGE, EACH_PAGE) } else { (1, part) };
        let piece = |_| {
            let at = from + self.random.usize(..(MADE - each) / EACH_PAGE) * EACH_PAGE;
            at..at + each
        };
        (0..pieces).map(piece).collect()
    }

    /// One round: the CPU changes some of the input, the window is made, and the CPU uses some of it.
    fn round(&mut self, program: impl FnOnce(&mut [f32], &[f32], usize) -> Result<()>) -> Result<Duration> {
        let from = self.from();
        let (changed, used) = (self.pieces(from), self.pieces(from));
        let round = self.round as f32;
        self.round += 1;
        let Arrays { r, a, .. } = self;
        let mut right = true;
        let time = timed(|| {
            changed.iter().for_each(|piece| a[piece.clone()].fill(round));
            program(r, a, from)?;
            right = used.iter().all(|piece| r[piece.clone()].iter().fold(true, |all, x| all & (*x >= 1.0)));
            Ok(())
        })?;
        ensure!(right, "a part of the result was not made");
        Ok(time)
    }

    /// Whether all of the last window is right.
    fn check(&self) -> Result<()> {
        let from = (self.round - 1) % 10 * MADE;
        let right = (from..from + MADE).all(|i| self.r[i] == self.a[i] * 2.0 + 1.0);
        ensure!(right, "wrong result");
        Ok(())
    }
}

fn launch(device: &Device, kernel: &Written, r: &mut [f32], a: &[f32], from: usize) -> Result<()> {
    Ok(device.run(kernel, MADE.div_ceil(LOCAL * EACH), args![inout(r), inp(a), from as u64, MADE as u64])?)
}

fn row(bench: &Bench<'_>, name: &'static str, goal: f64, scattered: bool) -> Result<Row> {
    let forms = Written::new(SOURCE, "window", LOCAL);
    let [ours, theirs] = [(); 2].map(|()| RefCell::new(Arrays::new(scattered)));
    let mut explicit = Window::new(bench.cl, LEN)?;
    explicit.begin(&theirs.borrow().r)?;
    // Nothing is advised, also for single pages: a touched block comes as a whole then, and a tenth of its pages is used. With both arrays' preferred location on the device each page is a fault and a copy of
    // its own, eight times as slow.
    let uhmm = || ours.borrow_mut().round(|r, a, from| launch(bench.device, &forms, r, a, from));
    let pairs = in_pairs(bench.pairs, uhmm, || theirs.borrow_mut().round(|r, a, from| Ok(explicit.run(r, a, from, MADE)?)))?;
    ours.borrow().check()?;
    theirs.borrow().check()?;
    // How many times as fast as explicit: a rate.
    let rates: Vec<_> = pairs.iter().map(|(ours, explicit)| (1.0 / ours.as_secs_f64(), 1.0 / explicit.as_secs_f64())).collect();
    Ok(Measure { name, unit: "rounds/s", work: 1.0, goal }.row_of(&rates))
}
