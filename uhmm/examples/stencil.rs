//! Heat flows over a plate, step after step on a device. The two arrays stay there: the CPU says which is which, and reads one row now and then.
//!
//!     cargo run --release -p uhmm --example stencil            # on soft
//!     cargo run --release -p uhmm --example stencil -- opencl  # the same, in OpenCL C

use uhmm::{Ctx, Forms, Uhmm, args, inp, out};

const SIDE: usize = 1024;
/// Rows of a group.
const ROWS: usize = 4;

/// The form in Rust, for `soft`: each group makes ROWS rows of the new plate (argument 0) from the old one (1).
fn step(ctx: &Ctx<'_>) {
    let (old, rate) = (ctx.inp::<f32>(1), ctx.value::<f32>(4));
    let new = ctx.out::<f32>(0).chunk(ROWS * SIDE);
    for (at, new) in (ctx.group() * ROWS * SIDE..).zip(new) {
        let (y, x) = (at / SIDE, at % SIDE);
        let old = |y: usize, x: usize| old[y.min(SIDE - 1) * SIDE + x.min(SIDE - 1)]; // nothing flows over the edges
        let around = (old(y.saturating_sub(1), x) + old(y + 1, x)) + (old(y, x.saturating_sub(1)) + old(y, x + 1));
        *new = old(y, x) + rate * (around - 4.0 * old(y, x));
    }
}

fn main() -> Result<(), uhmm::Error> {
    // The form in OpenCL C, for OpenCL devices: its name, and the work items of a group.
    let step = Forms::new(step).opencl(include_str!("../../cli/src/stencil/stencil.cl"), "stencil", 256);
    let dev = Uhmm::new()?.device(&std::env::args().nth(1).unwrap_or("soft".into()))?;

    // A hot square in the middle of a cold plate.
    let hot = SIDE / 2 - 16..SIDE / 2 + 16;
    let mut plate: Vec<f32> =
        (0..SIDE * SIDE).map(|at| if hot.contains(&(at / SIDE)) && hot.contains(&(at % SIDE)) { 100.0 } else { 0.0 }).collect();
    let mut next = vec![0.0; SIDE * SIDE];
    for steps in 1..=400 {
        dev.run(&step, SIDE / ROWS, args![out(&mut next), inp(&plate), SIDE as u32, ROWS as u32, 0.2f32])?;
        std::mem::swap(&mut plate, &mut next);
        if steps % 100 == 0 {
            // The CPU touches a row, and its pages come home; all others stay on the device.
            let row = &plate[SIDE / 2 * SIDE..][SIDE / 2..];
            println!("{steps} steps: {:5.1} in the middle, {:4.1} and {:4.1} beside it", row[0], row[20], row[40]);
        }
    }
    let heat: f64 = plate.iter().map(|&x| f64::from(x)).sum();
    assert!((heat / (100.0 * 32.0 * 32.0) - 1.0).abs() < 1e-4, "what flows is not lost: {heat}");

    let moved = dev.stats();
    println!("{} launches moved {} bytes there and {} back", moved.launches, moved.bytes_to_device, moved.bytes_to_cpu);
    Ok(())
}
