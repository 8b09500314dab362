//! A kernel over an array of which the CPU changes every so-manieth page in between. The program knows which, and sends just those, as one rectangle.
#![allow(unsafe_code)] // the kernel stays within its buffers by what it is given

use crate::cl::{Buffer, Cl, Kernel, Result};

/// The kernel.
pub const SOURCE: &str = include_str!("strided.cl");
/// Work items of a group.
pub const LOCAL: usize = 64;
/// Elements of a page.
pub const EACH: usize = 1024;

/// The program.
pub struct Strided<'c> {
    cl: &'c Cl,
    kernel: Kernel<'c>,
    r: Buffer<'c, f32>,
    a: Buffer<'c, f32>,
}

impl<'c> Strided<'c> {
    /// For arrays of so many pages, a multiple of [`LOCAL`]. The buffers are made once.
    ///
    /// # Errors
    /// What OpenCL says.
    pub fn new(cl: &'c Cl, pages: usize) -> Result<Self> {
        Ok(Strided { cl, kernel: cl.kernel(SOURCE, "strided")?, r: cl.buffer(pages)?, a: cl.buffer(pages * EACH)? })
    }

    /// Sends all of the array before the first round.
    ///
    /// # Errors
    /// What OpenCL says.
    pub fn begin(&mut self, a: &[f32]) -> Result<()> {
        // SAFETY: it is borrowed until it has been copied.
        unsafe { self.a.write(0, a) }.and(self.cl.finish())
    }

    /// One round: every `apart`th page of the array has changed, from the first on.
    ///
    /// # Errors
    /// What OpenCL says.
    ///
    /// # Panics
    /// If the arrays are not as long as the buffers.
    pub fn run(&mut self, r: &mut [f32], a: &[f32], apart: usize) -> Result<()> {
        assert!(r.len() == self.r.len() && a.len() == self.a.len(), "the first array's length");
        let args = [self.r.arg(), self.a.arg()];
        // SAFETY: the array is borrowed until the other has been read, which waits for all of it; these are the kernel's parameters, and it stays within the arrays.
        let sent = unsafe {
            self.a
                .write_rows(0, a, EACH, r.len().div_ceil(apart), apart * EACH)
                .and_then(|()| self.kernel.enqueue(&args, [r.len() / LOCAL, 1], [LOCAL, 1]))
        };
        sent.and_then(|()| self.r.read(0, r)).or_else(|e| self.cl.finish().and(Err(e)))
    }
}
