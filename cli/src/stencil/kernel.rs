//! The kernel of the stencil in its two forms, and what a launch of it needs.

use anyhow::Result;
use uhmm::{Arg, Args, Ctx, Device, Forms, Kernel, args, inp, out};

/// The form in OpenCL C.
pub(crate) const SOURCE: &str = include_str!("stencil.cl");
/// The kernel's name in it.
pub(crate) const NAME: &str = "stencil";
/// Work items of a group: 256 times eight pixels, side by side.
pub(crate) const LOCAL: usize = 256;
/// Rows of a group. With more of them a CPU walks down more columns at a time than its nearest cache has room for, if rows are a power of two long.
const ROWS: usize = 2;
/// Which part of a difference flows in one step. A quarter is the most with which nothing oscillates.
pub(crate) const RATE: f32 = 0.2;

/// What a launch needs besides the two images. Its arguments are, in this order: the new image (out), the old one (inp), then [`values`](Self::values).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Pixels of a row.
    pub(crate) width: usize,
    /// Rows.
    pub(crate) height: usize,
}

impl Shape {
    /// Pixels.
    pub(crate) fn len(self) -> usize {
        self.width * self.height
    }

    /// Groups of a launch.
    pub(crate) fn groups(self) -> usize {
        self.height.div_ceil(ROWS)
    }

    /// The values that follow the images: pixels of a row, rows of a group, and the rate. In OpenCL C the number of pixels follows, as a ulong (uhmm gives it).
    pub(crate) fn values(self) -> (u32, u32, f32) {
        (self.width as u32, ROWS as u32, RATE)
    }
}

/// The kernel, in both forms.
pub(crate) fn kernel() -> Forms<impl Kernel> {
    Forms::new(stencil).opencl(SOURCE, NAME, LOCAL)
}

/// One step on the device, by ordinary slices: `to` from `from`.
pub(crate) fn launch(device: &Device, shape: Shape, to: &mut [f32], from: &[f32]) -> Result<()> {
    Ok(device.run(&kernel(), shape.groups(), args(shape, out(to), inp(from)))?)
}

/// The arguments of a launch, of which these are the images.
pub(crate) fn args<'a>(shape: Shape, to: Arg<'a>, from: Arg<'a>) -> Args<'a> {
    let (width, rows, rate) = shape.values();
    args![to, from, width, rows, rate]
}

/// What a pixel becomes: the operations in the order that stencil.cl has, so that the bits are the same.
fn flow(rate: f32, here: f32, [up, down, left, right]: [f32; 4]) -> f32 {
    here + rate * (((up + down) + (left + right)) - 4.0 * here)
}

/// The form in Rust.
fn stencil(ctx: &Ctx<'_>) {
    let a = ctx.inp::<f32>(1);
    let [width, rows] = [2, 3].map(|index| ctx.value::<u32>(index) as usize);
    let rate = ctx.value::<f32>(4);
    let part = ctx.out::<f32>(0).chunk(rows * width);
    let first = ctx.group() * rows;
    for (y, to) in (first..).zip(part.chunks_exact_mut(width)) {
        let row = |y: usize| a.get(y * width..(y + 1) * width);
        let Some(here) = row(y) else { return };
        let up = y.checked_sub(1).and_then(row).unwrap_or(here);
        let down = row(y + 1).unwrap_or(here);
        let (end, ahead) = (width - 1, 1.min(width - 1));
        to[0] = flow(rate, here[0], [up[0], down[0], here[0], here[ahead]]);
        to[end] = flow(rate, here[end], [up[end], down[end], here[end - ahead], here[end]]);
        // Between the edges: slices of one length, so that the loop becomes one over vectors.
        let inner = width.saturating_sub(2);
        let (to, middle) = (&mut to[ahead..][..inner], &here[ahead..][..inner]);
        let (up, down) = (&up[ahead..][..inner], &down[ahead..][..inner]);
        let (left, right) = (&here[..inner], &here[width - inner..][..inner]);
        for x in 0..inner {
            to[x] = flow(rate, middle[x], [up[x], down[x], left[x], right[x]]);
        }
    }
}
