//! The sum of two vectors: nothing but copies and a kernel that is one more.
#![allow(unsafe_code)] // kernels stay within their buffers by what they are given

use crate::cl::{Buffer, Cl, Kernel, Result};
use crate::{Buffers, Kept};

/// The kernel.
pub const SOURCE: &str = include_str!("vadd.cl");
/// Work items of a group, and elements of a work item.
pub const LOCAL: usize = 256;
/// See [`LOCAL`].
pub const EACH: usize = 16;

/// Groups for so many elements.
pub fn groups(len: usize) -> usize {
    len.div_ceil(LOCAL * EACH)
}

/// The program.
pub struct VAdd<'c> {
    cl: &'c Cl,
    kernel: Kernel<'c>,
    buffers: Kept<'c, [Buffer<'c, f32>; 3]>,
}

impl<'c> VAdd<'c> {
    /// # Errors
    /// What OpenCL says.
    pub fn new(cl: &'c Cl, how: Buffers) -> Result<Self> {
        Ok(VAdd { cl, kernel: cl.kernel(SOURCE, "vadd")?, buffers: Kept::new(cl, how) })
    }

    /// One sum.
    ///
    /// # Errors
    /// What OpenCL says.
    ///
    /// # Panics
    /// If the vectors have not one length, or not that of the first sum.
    pub fn run(&mut self, r: &mut [f32], a: &[f32], b: &[f32]) -> Result<()> {
        let (cl, kernel, len) = (self.cl, &self.kernel, r.len());
        assert_eq!([a.len(), b.len()], [len; 2], "vectors of one length");
        let make = |cl: &'c Cl| Ok([cl.buffer(len)?, cl.buffer(len)?, cl.buffer(len)?]);
        self.buffers.with(make, |[on_r, on_a, on_b]| {
            assert_eq!(on_r.len(), len, "the length of the first sum");
            // SAFETY: both are borrowed until the sum has been read, which waits for all of it.
            unsafe { on_a.write(0, a).and_then(|()| on_b.write(0, b)) }.or_else(|e| cl.finish().and(Err(e)))?;
            let args = [on_r.arg(), on_a.arg(), on_b.arg(), (len as u64).into()];
            // SAFETY: these are its parameters, and it stays within the length.
            let enqueued = unsafe { kernel.enqueue(&args, [groups(len), 1], [LOCAL, 1]) };
            enqueued.and_then(|()| on_r.read(0, r)).or_else(|e| cl.finish().and(Err(e)))
        })
    }
}
