//! A matrix product: both sides go there, the product comes back.
#![allow(unsafe_code)] // kernels stay within their buffers by what they are given

use crate::cl::{Buffer, Cl, Kernel, Result};
use crate::{Buffers, Kept};

/// The kernel.
pub const SOURCE: &str = include_str!("../../../cli/src/mul_mat/mul_mat.cl");

/// The program, for square matrices.
pub struct MulMat<'c> {
    cl: &'c Cl,
    kernel: Kernel<'c>,
    buffers: Kept<'c, [Buffer<'c, f32>; 3]>,
    size: usize,
    /// Rows of one group.
    rows: usize,
}

impl<'c> MulMat<'c> {
    /// For matrices of `size` rows and columns, of which a group makes `rows` rows.
    ///
    /// # Errors
    /// What OpenCL says.
    pub fn new(cl: &'c Cl, how: Buffers, size: usize, rows: usize) -> Result<Self> {
        Ok(MulMat { cl, kernel: cl.kernel(SOURCE, "mul_mat")?, buffers: Kept::new(cl, how), size, rows })
    }

    /// One product.
    ///
    /// # Errors
    /// What OpenCL says.
    ///
    /// # Panics
    /// If a matrix is not of the size.
    pub fn run(&mut self, r: &mut [f32], a: &[f32], b: &[f32]) -> Result<()> {
        let (cl, kernel, size, rows) = (self.cl, &self.kernel, self.size, self.rows);
        let len = size * size;
        assert_eq!([r.len(), a.len(), b.len()], [len; 3], "matrices of {size} x {size}");
        let make = |cl: &'c Cl| Ok([cl.buffer(len)?, cl.buffer(len)?, cl.buffer(len)?]);
        self.buffers.with(make, |[on_r, on_a, on_b]| {
            // SAFETY: both sides are borrowed until the product has been read, which waits for all of it.
            unsafe { on_a.write(0, a).and_then(|()| on_b.write(0, b)) }.or_else(|e| cl.finish().and(Err(e)))?;
            let n = size as u32;
            let args = [on_r.arg(), on_a.arg(), on_b.arg(), n.into(), n.into(), (rows as u32).into(), (len as u64).into()];
            // SAFETY: these are its parameters, and it stays within what the sizes say.
            let enqueued = unsafe { kernel.enqueue(&args, [size.div_ceil(rows), 1], [1, 1]) };
            enqueued.and_then(|()| on_r.read(0, r)).or_else(|e| cl.finish().and(Err(e)))
        })
    }
}
