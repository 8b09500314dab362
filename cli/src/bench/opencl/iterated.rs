//! Many launches over the same data: steps of a stencil over an image, rounds of k-means.

use super::{Bench, Row, in_turns, rows, timed};
use crate::k_means::kernel::{self as k_means, Centroids};
use crate::k_means::points::points as digits;
use crate::stencil::image::Image;
use crate::stencil::kernel as stencil;
use anyhow::{Result, ensure};
use std::time::Duration;
use uhmm::scope;
use uhmm_explicit::Buffers;
use uhmm_explicit::k_means::{KMeans, Sizes};
use uhmm_explicit::stencil::Stencil;

pub(super) fn run(bench: &Bench<'_>, print: &mut impl FnMut(Row) -> Result<()>) -> Result<()> {
    steps(bench, print)?;
    rounds(bench, print)
}

/// Pixels of a side, and steps.
const SIDE: usize = 2048;
const STEPS: usize = 20;

fn steps(bench: &Bench<'_>, print: &mut impl FnMut(Row) -> Result<()>) -> Result<()> {
    let image = Image::digits(SIDE)?;
    let shape = stencil::Shape { width: SIDE, height: SIDE };
    let mut want: Option<Vec<f32>> = None;
    let mut check = |now: &[f32]| {
        let want = want.get_or_insert_with(|| now.to_vec());
        ensure!(want == now, "two programs have not made the same image of the heat");
        Ok(())
    };
    let check = std::cell::RefCell::new(&mut check);
    let mut ours = [image.pixels.clone(), vec![0.0; shape.len()]];
    let kernel = stencil::kernel();
    let mut uhmm = || {
        ours[0].copy_from_slice(&image.pixels);
        ours[1].fill(f32::NAN);
        let time = timed(|| {
            let [from, to] = ours.each_mut();
            scope(|scope| {
                let (mut from, mut to) = (scope.lend(from), scope.lend(to));
                let mut queue = scope.queue(bench.device);
                for _ in 0..STEPS {
                    queue.launch(&kernel, shape.groups(), stencil::args(shape, to.out(), from.inp()));
                    std::mem::swap(&mut from, &mut to);
                }
            })?;
            crate::mul_mat::read_all(&ours[STEPS % 2]);
            Ok(())
        })?;
        check.borrow_mut()(&ours[STEPS % 2])?;
        Ok(time)
    };
    let explicit = |program: &mut Stencil<'_>, [from, to]: &mut [Vec<f32>; 2]| -> Result<Duration> {
        from.copy_from_slice(&image.pixels);
        to.fill(f32::NAN);
        let time = timed(|| {
            program.run(to, from, STEPS)?;
            crate::mul_mat::read_all(to);
            Ok(())
        })?;
        check.borrow_mut()(to)?;
        Ok(time)
    };
    let program = |how| Stencil::new(bench.cl, how, shape.values(), stencil::LOCAL);
    let (mut reused, mut fresh) = (program(Buffers::Reused)?, program(Buffers::Fresh)?);
    let [mut theirs, mut freshs] = [(); 2].map(|()| [image.pixels.clone(), vec![0.0; shape.len()]]);
    let programs: [&mut dyn FnMut() -> Result<Duration>; 3] =
        [&mut uhmm, &mut || explicit(&mut reused, &mut theirs), &mut || explicit(&mut fresh, &mut freshs)];
    let times = in_turns(bench.pairs, programs)?;
    rows(["opencl_stencil", "opencl_stencil_fresh"], &times).into_iter().try_for_each(&mut *print)
}

/// Points, clusters, and rounds.
const POINTS: usize = 200_000;
const CLUSTERS: usize = 10;
const ROUNDS: usize = 10;

fn rounds(bench: &Bench<'_>, print: &mut impl FnMut(Row) -> Result<()>) -> Result<()> {
    let all = digits(POINTS)?;
    let shape = k_means::Shape::new(POINTS, CLUSTERS, bench.device.threads());
    let first = Centroids::of_points(all.chunks(k_means::DIM).take(CLUSTERS));
    let mut want: Option<(Centroids, Vec<u8>)> = None;
    let mut check = |centroids: Centroids, labels: &[u8]| {
        let now = (centroids, labels.to_vec());
        ensure!(*want.get_or_insert_with(|| now.clone()) == now, "two programs have not found the same clusters");
        Ok(())
    };
    let check = std::cell::RefCell::new(&mut check);
    let (mut points, mut round) = (all.clone(), k_means::Round::new(shape));
    let mut uhmm = || {
        points.copy_from_slice(&all);
        round.labels.fill(u8::MAX);
        let mut centroids = first.clone();
        let time = timed(|| {
            for _ in 0..ROUNDS {
                k_means::launch(bench.device, shape, &mut round, &points, &centroids)?;
                centroids.update(shape, &round);
            }
            std::hint::black_box(round.labels.iter().fold(0u8, |sum, label| sum ^ label));
            Ok(())
        })?;
        check.borrow_mut()(centroids, &round.labels)?;
        Ok(time)
    };
    let explicit = |program: &mut KMeans<'_>, points: &mut [f32], round: &mut k_means::Round| -> Result<Duration> {
        points.copy_from_slice(&all);
        round.labels.fill(u8::MAX);
        let mut centroids = first.clone();
        let time = timed(|| {
            program.begin(points, &round.labels)?;
            for _ in 0..ROUNDS {
                program.round(&mut round.sums, &mut round.counts, &centroids.all, &centroids.halves)?;
                centroids.update(shape, round);
            }
            program.labels(&mut round.labels)?;
            std::hint::black_box(round.labels.iter().fold(0u8, |sum, label| sum ^ label));
            Ok(())
        })?;
        check.borrow_mut()(centroids, &round.labels)?;
        Ok(time)
    };
    let sizes = Sizes { points: [POINTS, k_means::DIM], clusters: CLUSTERS, part: shape.part, local: k_means::LOCAL };
    let (mut reused, mut fresh) = (KMeans::new(bench.cl, Buffers::Reused, sizes)?, KMeans::new(bench.cl, Buffers::Fresh, sizes)?);
    let [(mut points_a, mut round_a), (mut points_b, mut round_b)] = [(); 2].map(|()| (all.clone(), k_means::Round::new(shape)));
    let programs: [&mut dyn FnMut() -> Result<Duration>; 3] =
        [&mut uhmm, &mut || explicit(&mut reused, &mut points_a, &mut round_a), &mut || explicit(&mut fresh, &mut points_b, &mut round_b)];
    let times = in_turns(bench.pairs, programs)?;
    rows(["opencl_kmeans", "opencl_kmeans_fresh"], &times).into_iter().try_for_each(&mut *print)
}
