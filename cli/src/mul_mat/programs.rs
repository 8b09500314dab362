//! The same product by three programs: native, explicit and uhmm.
//!
//! All three run one kernel function in the same groups on the same number of threads. Their clocks run from filled ordinary vectors
//! to the CPU having read every element of R; filling and freeing is outside.

use super::Problem;
use crate::matmul::mul_mat;
use anyhow::Result;
use std::hint::black_box;
use std::time::{Duration, Instant};
use uhmm::{Buffer, Device, Forms, Host, Kernel, args, inp, out};

/// The kernel, in all its forms.
fn kernel() -> Forms<impl Kernel> {
    Forms::new(mul_mat).opencl(include_str!("mul_mat.cl"), "mul_mat", 1)
}

/// Sizes as the kernel takes them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Rows of A and R.
    pub(crate) m: usize,
    /// Columns of A, rows of B.
    pub(crate) k: usize,
    /// Columns of B and R.
    pub(crate) n: usize,
    /// Rows of R in a group.
    pub(crate) rows: usize,
}

impl Shape {
    /// Groups of a launch.
    pub(crate) fn groups(self) -> usize {
        self.m.div_ceil(self.rows)
    }

    /// Bytes of A and B together.
    pub(crate) fn bytes_in(self) -> u64 {
        ((self.m * self.k + self.k * self.n) * size_of::<f32>()) as u64
    }

    /// Bytes of R.
    pub(crate) fn bytes_out(self) -> u64 {
        (self.m * self.n * size_of::<f32>()) as u64
    }
}

/// R, A and B in ordinary vectors, freshly filled; R with what is no number, so that an element that nobody wrote is noticed.
pub(crate) struct Arrays {
    /// The product.
    pub(crate) r: Vec<f32>,
    /// The left side.
    pub(crate) a: Vec<f32>,
    /// The right side.
    pub(crate) b: Vec<f32>,
}

impl Arrays {
    /// New vectors with the matrices of `problem`.
    pub(crate) fn fill(problem: &Problem) -> Arrays {
        Self::fill_with_room(problem, 0)
    }

    /// The same, with two pages of room after each array, so that no two of them share a page: when the explicit program copies its arrays, it touches
    /// no page of uhmm's.
    pub(crate) fn fill_apart(problem: &Problem) -> Arrays {
        Self::fill_with_room(problem, 2 * 4096 / size_of::<f32>())
    }

    fn fill_with_room(problem: &Problem, room: usize) -> Arrays {
        let copy = |data: &[f32]| {
            let mut copy = Vec::with_capacity(data.len() + room);
            copy.extend_from_slice(data);
            copy
        };
        let Shape { m, n, .. } = problem.shape;
        let mut r = Vec::with_capacity(m * n + room);
        r.resize(m * n, f32::NAN);
        Arrays { r, a: copy(problem.a.as_slice()), b: copy(problem.b.as_slice()) }
    }
}

/// Reads every element.
pub(crate) fn read_all(data: &[f32]) {
    black_box(data.iter().fold(0u32, |sum, value| sum.wrapping_add(value.to_bits())));
}

/// uhmm: one launch with ordinary slices.
pub(crate) fn launch(device: &Device, shape: Shape, r: &mut [f32], a: &[f32], b: &[f32]) -> Result<()> {
    let [n, k, rows] = [shape.n, shape.k, shape.rows].map(|size| size as u32);
    Ok(device.run(&kernel(), shape.groups(), args![out(r), inp(a), inp(b), n, k, rows])?)
}

/// One round of uhmm.
pub(crate) fn uhmm(device: &Device, shape: Shape, arrays: &mut Arrays) -> Result<Duration> {
    let start = Instant::now();
    launch(device, shape, &mut arrays.r, &arrays.a, &arrays.b)?;
    read_all(&arrays.r);
    Ok(start.elapsed())
}

/// One round of the kernel on host memory.
pub(crate) fn native(host: &Host, shape: Shape, arrays: &mut Arrays) -> Result<Duration> {
    let [n, k, rows] = [shape.n, shape.k, shape.rows].map(|size| size as u32);
    let start = Instant::now();
    host.run(&kernel(), shape.groups(), args![out(&mut arrays.r), inp(&arrays.a), inp(&arrays.b), n, k, rows])?;
    read_all(&arrays.r);
    Ok(start.elapsed())
}

/// The program that allocates device memory and copies for itself. Its allocations are made once and reused.
pub(crate) struct Explicit<'d> {
    device: &'d Device,
    r: Buffer<'d, f32>,
    a: Buffer<'d, f32>,
    b: Buffer<'d, f32>,
    shape: Shape,
}

impl<'d> Explicit<'d> {
    /// Allocates on the device.
    pub(crate) fn new(device: &'d Device, shape: Shape) -> Result<Self> {
        let Shape { m, k, n, .. } = shape;
        Ok(Explicit { device, r: device.alloc(m * n)?, a: device.alloc(m * k)?, b: device.alloc(k * n)?, shape })
    }

    /// Copies both sides there, multiplies, and copies the product back.
    pub(crate) fn multiply(&mut self, arrays: &mut Arrays) -> Result<()> {
        let [n, k, rows] = [self.shape.n, self.shape.k, self.shape.rows].map(|size| size as u32);
        self.a.upload(&arrays.a)?;
        self.b.upload(&arrays.b)?;
        self.device.run(&kernel(), self.shape.groups(), args![self.r.out(), self.a.inp(), self.b.inp(), n, k, rows])?;
        self.r.download(&mut arrays.r)?;
        Ok(())
    }

    /// One round.
    pub(crate) fn round(&mut self, arrays: &mut Arrays) -> Result<Duration> {
        let start = Instant::now();
        self.multiply(arrays)?;
        read_all(&arrays.r);
        Ok(start.elapsed())
    }
}
