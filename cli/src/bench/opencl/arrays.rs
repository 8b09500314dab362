//! Whole arrays: there, a kernel, and back.

use super::{Bench, Measure, Row, Written, in_turns, rows, timed};
use crate::matmul::{mul_mat, rows_per_group};
use crate::mul_mat::read_all;
use crate::npy::Matrix;
use anyhow::{Result, ensure};
use ndarray::Array2;
use std::hint::black_box;
use std::time::{Duration, Instant};
use uhmm::{Forms, args, inp, out};
use uhmm_explicit::Buffers;
use uhmm_explicit::mul_mat::{self, MulMat};
use uhmm_explicit::vadd::{self, VAdd};

pub(super) fn run(bench: &Bench<'_>, print: &mut impl FnMut(Row) -> Result<()>) -> Result<()> {
    product(bench, ["opencl_mul_mat_1024", "opencl_mul_mat_1024_fresh", "opencl_mul_mat_1024_kernel"], 1024, print)?;
    product(bench, ["opencl_mul_mat_2048", "opencl_mul_mat_2048_fresh", "opencl_mul_mat_2048_kernel"], 2048, print)?;
    sum(bench, print)
}

/// Result and two inputs of one program.
struct Arrays {
    r: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Arrays {
    fn new(len: usize) -> Arrays {
        Arrays { r: vec![f32::NAN; len], a: vec![0.0; len], b: vec![0.0; len] }
    }

    /// Times what makes the result from the inputs, and the reading of all of it.
    fn timed(&mut self, program: impl FnOnce(&mut Self) -> Result<()>) -> Result<Duration> {
        timed(|| {
            program(self)?;
            read_all(&self.r);
            Ok(())
        })
    }
}

/// A product and the answer of the known library.
struct Product {
    a: Matrix,
    b: Matrix,
    want: Array2<f32>,
}

impl Product {
    fn new(size: usize) -> Result<Product> {
        let (a, b) = (Matrix::random(size, size, 1), Matrix::random(size, size, 2));
        let want = a.view()?.dot(&b.view()?);
        Ok(Product { a, b, want })
    }

    /// Writes the inputs anew, and into the result what is no number.
    fn refill(&self, arrays: &mut Arrays) {
        arrays.a.copy_from_slice(self.a.as_slice());
        arrays.b.copy_from_slice(self.b.as_slice());
        arrays.r.fill(f32::NAN);
    }

    fn check(&self, r: &[f32]) -> Result<()> {
        let largest = self.want.iter().fold(0f32, |most, x| most.max(x.abs()));
        // A comparison that what is no number fails too.
        let right = self.want.iter().zip(r).all(|(want, r)| (want - r).abs() <= 1e-5 * largest);
        ensure!(right, "wrong product");
        Ok(())
    }

    /// How long `matrixmultiply` takes for it.
    fn known_answer_time(&self) -> Result<Duration> {
        let (a, b) = (self.a.view()?, self.b.view()?);
        let start = Instant::now();
        black_box(a.dot(&b));
        Ok(start.elapsed())
    }
}

fn product(bench: &Bench<'_>, names: [&'static str; 3], size: usize, print: &mut impl FnMut(Row) -> Result<()>) -> Result<()> {
    let product = Product::new(size)?;
    let (rows_of, n) = (rows_per_group(size, bench.device.threads()), size as u32);
    let [mut ours, mut theirs, mut freshs] = [size * size; 3].map(Arrays::new);
    let program = |how| MulMat::new(bench.cl, how, size, rows_of);
    let (mut reused, mut fresh) = (program(Buffers::Reused)?, program(Buffers::Fresh)?);
    let forms = Forms::new(mul_mat).opencl(mul_mat::SOURCE, "mul_mat", 1);
    let mut kernels = vec![];
    let mut uhmm = || {
        product.refill(&mut ours);
        let before = bench.device.stats();
        let time = ours.timed(|Arrays { r, a, b }| {
            Ok(bench.device.run(&forms, size.div_ceil(rows_of), args![out(r), inp(a), inp(b), n, n, rows_of as u32])?)
        })?;
        kernels.push(((bench.device.stats() - before).kernel_time(), product.known_answer_time()?));
        product.check(&ours.r)?;
        Ok(time)
    };
    let explicit = |arrays: &mut Arrays, program: &mut MulMat<'_>| {
        product.refill(arrays);
        let time = arrays.timed(|Arrays { r, a, b }| Ok(program.run(r, a, b)?))?;
        product.check(&arrays.r)?;
        Ok(time)
    };
    let times = in_turns(bench.pairs, [&mut uhmm, &mut || explicit(&mut theirs, &mut reused), &mut || explicit(&mut freshs, &mut fresh)])?;
    rows([names[0], names[1]], &times).into_iter().try_for_each(&mut *print)?;
    let work = 2.0 * (size as f64).powi(3) / 1e9;
    print(Measure { name: names[2], unit: "GFLOP/s", work, goal: 0.5 }.row(&kernels[1..]))
}

fn sum(bench: &Bench<'_>, print: &mut impl FnMut(Row) -> Result<()>) -> Result<()> {
    let len = (256 << 20) / size_of::<f32>();
    let [mut ours, mut theirs, mut freshs] = [len; 3].map(Arrays::new);
    let (mut reused, mut fresh) = (VAdd::new(bench.cl, Buffers::Reused)?, VAdd::new(bench.cl, Buffers::Fresh)?);
    let forms = Written::new(vadd::SOURCE, "vadd", vadd::LOCAL);
    let turn = std::cell::Cell::new(0f32);
    let refill = |arrays: &mut Arrays| {
        turn.set(turn.get() + 1.0);
        arrays.a.fill(turn.get());
        arrays.b.iter_mut().enumerate().for_each(|(i, x)| *x = (i % 1000) as f32);
        arrays.r.fill(f32::NAN);
    };
    let check = |r: &[f32]| {
        let right = r.iter().enumerate().all(|(i, r)| *r == turn.get() + (i % 1000) as f32);
        ensure!(right, "wrong sum");
        Ok(())
    };
    let mut uhmm = || {
        refill(&mut ours);
        let time =
            ours.timed(|Arrays { r, a, b }| Ok(bench.device.run(&forms, vadd::groups(len), args![out(r), inp(a), inp(b), len as u64])?))?;
        check(&ours.r)?;
        Ok(time)
    };
    let explicit = |arrays: &mut Arrays, program: &mut VAdd<'_>| {
        refill(arrays);
        let time = arrays.timed(|Arrays { r, a, b }| Ok(program.run(r, a, b)?))?;
        check(&arrays.r)?;
        Ok(time)
    };
    let times = in_turns(bench.pairs, [&mut uhmm, &mut || explicit(&mut theirs, &mut reused), &mut || explicit(&mut freshs, &mut fresh)])?;
    rows(["opencl_vadd_256m", "opencl_vadd_256m_fresh"], &times).into_iter().try_for_each(&mut *print)
}
