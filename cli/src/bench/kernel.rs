//! The matrix kernel on host memory against the known library's product: what explicit code and uhmm both run should not be slow.

use super::{Measure, Row, in_pairs};
use crate::matmul::{mul_mat, rows_per_group};
use crate::npy::Matrix;
use crate::options;
use anyhow::Result;
use std::hint::black_box;
use std::time::Instant;
use uhmm::{Host, args, inp, out};

/// The most threads that the library uses.
const LIBRARY_THREADS: usize = 4;

/// Measures the rows of this group.
pub(super) fn run(args: &options::Bench, print: &mut impl FnMut(Row) -> Result<()>) -> Result<()> {
    let threads = std::thread::available_parallelism()?.get().min(LIBRARY_THREADS);
    for (name, size) in [("mul_mat_1024", 1024), ("mul_mat_2048", 2048)] {
        let measure = Measure { name, unit: "GFLOP/s", work: 2.0 * (size as f64).powi(3) / 1e9, goal: 0.8 };
        let host = Host::new(threads);
        let (a, b) = (Matrix::random(size, size, 1), Matrix::random(size, size, 2));
        let rows = rows_per_group(size, threads);
        let mut r = vec![0f32; size * size];
        let ours = || {
            let start = Instant::now();
            let args = args![out(&mut r), inp(a.as_slice()), inp(b.as_slice()), size as u32, size as u32, rows as u32];
            host.run(&mul_mat, size.div_ceil(rows), args)?;
            Ok(start.elapsed())
        };
        let library = || {
            let (a, b) = (a.view()?, b.view()?);
            let start = Instant::now();
            black_box(a.dot(&b));
            Ok(start.elapsed())
        };
        print(measure.row(&in_pairs(args.pairs, ours, library)?))?;
    }
    Ok(())
}
