//! A kernel that does nothing over a buffer that lies there already: what a launch costs without memory.
#![allow(unsafe_code)] // the kernel touches nothing

use crate::cl::{Buffer, Cl, Kernel, Result};

/// The kernel.
pub const SOURCE: &str = "__kernel void nothing(__global uchar *data) {}";

/// The program.
pub struct Launch<'c> {
    cl: &'c Cl,
    kernel: Kernel<'c>,
    buffer: Buffer<'c, u8>,
}

impl<'c> Launch<'c> {
    /// Over a buffer of so many bytes.
    ///
    /// # Errors
    /// What OpenCL says.
    pub fn new(cl: &'c Cl, bytes: usize) -> Result<Self> {
        Ok(Launch { cl, kernel: cl.kernel(SOURCE, "nothing")?, buffer: cl.buffer(bytes)? })
    }

    /// One launch, and the wait for its end.
    ///
    /// # Errors
    /// What OpenCL says.
    pub fn run(&mut self) -> Result<()> {
        // SAFETY: this is its parameter, and it touches nothing.
        unsafe { self.kernel.enqueue(&[self.buffer.arg()], [1, 1], [1, 1]) }?;
        self.cl.finish()
    }
}
