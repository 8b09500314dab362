//! Steps of heat flow over an image: it goes there, and what it has become comes back.
#![allow(unsafe_code)] // kernels stay within their buffers by what they are given

use crate::cl::{Buffer, Cl, Kernel, Result};
use crate::{Buffers, Kept};

/// The kernel.
pub const SOURCE: &str = include_str!("../../../cli/src/stencil/stencil.cl");

/// The program.
pub struct Stencil<'c> {
    cl: &'c Cl,
    kernel: Kernel<'c>,
    buffers: Kept<'c, [Buffer<'c, f32>; 2]>,
    /// Pixels of a row, rows of a group, the rate.
    values: (u32, u32, f32),
    /// Work items of a group.
    local: usize,
}

impl<'c> Stencil<'c> {
    /// For images with rows of so many pixels, of which a group makes so many, with so many work items; and the rate.
    ///
    /// # Errors
    /// What OpenCL says.
    pub fn new(cl: &'c Cl, how: Buffers, values: (u32, u32, f32), local: usize) -> Result<Self> {
        Ok(Stencil { cl, kernel: cl.kernel(SOURCE, "stencil")?, buffers: Kept::new(cl, how), values, local })
    }

    /// So many steps: `to` is what becomes of `from`.
    ///
    /// # Errors
    /// What OpenCL says.
    ///
    /// # Panics
    /// If the images differ in size.
    pub fn run(&mut self, to: &mut [f32], from: &[f32], steps: usize) -> Result<()> {
        let (cl, kernel, (width, rows, rate), local, len) = (self.cl, &self.kernel, self.values, self.local, from.len());
        assert_eq!(to.len(), len, "images of one size");
        let groups = len.div_ceil((width * rows) as usize);
        let make = |cl: &'c Cl| Ok([cl.buffer(len)?, cl.buffer(len)?]);
        self.buffers.with(make, |images| {
            let step = |step: usize| {
                let (a, r) = (&images[step % 2], &images[(step + 1) % 2]);
                let args = [r.arg(), a.arg(), width.into(), rows.into(), rate.into(), (len as u64).into()];
                // SAFETY: these are its parameters, and it stays within the images.
                unsafe { kernel.enqueue(&args, [groups, 1], [local, 1]) }
            };
            // SAFETY: the image is borrowed until the last one has been read, which waits for all of it.
            let begun = unsafe { images[0].write(0, from) };
            let done = begun.and_then(|()| (0..steps).try_for_each(step)).and_then(|()| images[steps % 2].read(0, to));
            done.or_else(|e| cl.finish().and(Err(e)))
        })
    }
}
