//! Multiplies two matrices on a device, with ordinary memory: nothing is allocated on the device, and nothing is copied by hand.
//!
//!     cargo run --release -p uhmm --example mul_mat

use uhmm::{Ctx, Uhmm, args, inp, out};

/// R = A * B for square matrices; each group computes one row.
fn mul_mat(ctx: &Ctx<'_>) {
    let m: usize = ctx.value(3);
    let (a, b) = (ctx.inp::<f32>(1), ctx.inp::<f32>(2));
    let row = &a[ctx.group() * m..][..m];
    let r = ctx.out::<f32>(0).chunk(m);
    r.fill(0.0);
    for (a, b) in row.iter().zip(b.chunks_exact(m)) {
        for (r, b) in r.iter_mut().zip(b) {
            *r += a * b;
        }
    }
}

fn main() -> Result<(), uhmm::Error> {
    let m: usize = 1024;
    let a: Vec<f32> = (0..m * m).map(|i| (i % 7) as f32).collect();
    let b: Vec<f32> = (0..m * m).map(|i| (i % 5) as f32).collect();
    let mut r = vec![0.0f32; m * m];

    let hmm = Uhmm::new()?;
    let dev = hmm.device("soft")?;
    dev.run(&mul_mat, m, args![out(&mut r), inp(&a), inp(&b), m])?;

    println!("{}", r[0]); // the CPU's touch brings the page back
    let expected: f32 = (0..m).map(|k| a[k] * b[k * m]).sum();
    assert_eq!(r[0], expected);
    println!("{:?}", dev.stats());
    Ok(())
}
