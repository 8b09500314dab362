//! A kernel over a part of large arrays, of which the CPU then uses some and changes some. This program does not keep account of that: it copies everything, every time.
#![allow(unsafe_code)] // kernels stay within their buffers by what they are given

use crate::cl::{Buffer, Cl, Kernel, Result};

/// The kernel.
pub const SOURCE: &str = include_str!("window.cl");
/// Work items of a group, and elements of a work item.
pub const LOCAL: usize = 256;
/// See [`LOCAL`].
pub const EACH: usize = 16;

/// The program.
pub struct Window<'c> {
    cl: &'c Cl,
    kernel: Kernel<'c>,
    r: Buffer<'c, f32>,
    a: Buffer<'c, f32>,
}

impl<'c> Window<'c> {
    /// For arrays of so many elements. The buffers are made once.
    ///
    /// # Errors
    /// What OpenCL says.
    pub fn new(cl: &'c Cl, len: usize) -> Result<Self> {
        Ok(Window { cl, kernel: cl.kernel(SOURCE, "window")?, r: cl.buffer(len)?, a: cl.buffer(len)? })
    }

    /// Sends what `r` is before the first round.
    ///
    /// # Errors
    /// What OpenCL says.
    pub fn begin(&mut self, r: &[f32]) -> Result<()> {
        // SAFETY: it is borrowed until it has been copied.
        unsafe { self.r.write(0, r) }.and(self.cl.finish())
    }

    /// One round over `len` elements from `from` on.
    ///
    /// # Errors
    /// What OpenCL says.
    ///
    /// # Panics
    /// If the arrays are not as long as the buffers, or have no such elements.
    pub fn run(&mut self, r: &mut [f32], a: &[f32], from: usize, len: usize) -> Result<()> {
        assert!(r.len() == self.r.len() && a.len() == self.a.len() && from + len <= a.len(), "elements that are there");
        let args = [self.r.arg(), self.a.arg(), (from as u64).into(), (len as u64).into()];
        // SAFETY: the array is borrowed until the other has been read, which waits for all of it; these are the kernel's parameters, and it stays within the arrays.
        let sent = unsafe { self.a.write(0, a).and_then(|()| self.kernel.enqueue(&args, [len.div_ceil(LOCAL * EACH), 1], [LOCAL, 1])) };
        sent.and_then(|()| self.r.read(0, r)).or_else(|e| self.cl.finish().and(Err(e)))
    }
}
