//! Launches between which the CPU changes every eighth page of their input, against a program that knows which, and sends them as one rectangle.

use super::{Bench, Measure, Row, Written, timed};
use crate::bench::in_pairs;
use anyhow::{Result, ensure};
use std::cell::RefCell;
use std::time::Duration;
use uhmm::{args, inp, out};
use uhmm_explicit::strided::{EACH, LOCAL, SOURCE, Strided};

/// Pages of the array: 32 MiB.
const PAGES: usize = 8192;
/// Which of them change.
const APART: usize = 8;

/// The arrays of one program.
struct Arrays {
    r: Vec<f32>,
    a: Vec<f32>,
    round: u32,
}

impl Arrays {
    fn new() -> Arrays {
        Arrays { r: vec![0.0; PAGES], a: (0..PAGES * EACH).map(|i| (i / EACH) as f32).collect(), round: 0 }
    }

    /// One round: the CPU changes the pages, the kernel reads them all, and the CPU the result.
    fn round(&mut self, program: impl FnOnce(&mut [f32], &[f32]) -> Result<()>) -> Result<Duration> {
        self.round += 1;
        let Arrays { r, a, round } = self;
        let now = *round as f32;
        let mut right = true;
        let time = timed(|| {
            a.chunks_mut(EACH).step_by(APART).for_each(|page| page.fill(now));
            program(r, a)?;
            right = r.iter().enumerate().all(|(i, x)| *x == 2.0 * if i.is_multiple_of(APART) { now } else { i as f32 });
            Ok(())
        })?;
        ensure!(right, "wrong result");
        Ok(time)
    }
}

pub(super) fn run(bench: &Bench<'_>, print: &mut impl FnMut(Row) -> Result<()>) -> Result<()> {
    let forms = Written::new(SOURCE, "strided", LOCAL);
    let [ours, theirs] = [(); 2].map(|()| RefCell::new(Arrays::new()));
    let mut explicit = Strided::new(bench.cl, PAGES)?;
    explicit.begin(&theirs.borrow().a)?;
    let uhmm = || ours.borrow_mut().round(|r, a| Ok(bench.device.run(&forms, PAGES / LOCAL, args![out(r), inp(a)])?));
    let pairs = in_pairs(bench.pairs, uhmm, || theirs.borrow_mut().round(|r, a| Ok(explicit.run(r, a, APART)?)))?;
    print(Measure { name: "opencl_strided", unit: "ms", work: 1e-3, goal: 1.03 }.row(&pairs))
}
