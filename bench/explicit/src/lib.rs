//! Programs as one writes them for OpenCL today: memory on the device is allocated, filled, and read back by hand. `uhmm bench opencl` compares uhmm with them.
//!
//! | program | what it does |
//! |---|---|
//! | [`mul_mat`] | a matrix product |
//! | [`vadd`] | the sum of two vectors, scaled |
//! | [`stencil`] | many launches over two images in turn |
//! | [`k_means`] | many launches over the same points, with a little to and fro for each |
//! | [`window`] | launches between which the CPU uses and changes a small part of the arrays |
//! | [`launch`] | a kernel over what lies there already |
//! | [`strided`] | launches between which the CPU changes every so-manieth page |
//! | [`pages`] | single pages that go to the device in several ways |
//!
//! Each is one file on [`cl`], as a good programmer would write it: copies are enqueued without waiting, and waited for once. With [`Buffers::Reused`] a program makes its buffers
//! once, as one who knows what they cost does; with [`Buffers::Fresh`] for each round. No crate of uhmm is used here. The kernels are the ones that uhmm runs, from the same files.

pub mod cl;
pub mod k_means;
pub mod launch;
pub mod mul_mat;
pub mod pages;
pub mod stencil;
pub mod strided;
pub mod vadd;
pub mod window;

pub use cl::{Cl, Error, Result};

/// How a program comes by the device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffers {
    /// It makes its buffers once.
    Reused,
    /// It makes its buffers for each round.
    Fresh,
}

/// The buffers of a program: made once, or for each round.
pub(crate) struct Kept<'c, B> {
    cl: &'c Cl,
    kept: Option<B>,
    how: Buffers,
}

impl<'c, B> Kept<'c, B> {
    pub(crate) fn new(cl: &'c Cl, how: Buffers) -> Self {
        Kept { cl, kept: None, how }
    }

    /// Runs a round with its buffers.
    pub(crate) fn with(&mut self, make: impl FnOnce(&'c Cl) -> Result<B>, round: impl FnOnce(&B) -> Result<()>) -> Result<()> {
        let buffers = match self.kept.take() {
            Some(buffers) => buffers,
            None => make(self.cl)?,
        };
        round(&buffers)?;
        if self.how == Buffers::Reused {
            self.kept = Some(buffers);
        }
        Ok(())
    }
}
