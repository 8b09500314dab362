//! One kernel in two forms, on any device: `cargo run --example opencl_add -- opencl`.

use uhmm::{Ctx, Forms, Uhmm, args, inout, inp};

const SOURCE: &str = "
__kernel void add(__global float *r, __global const float *a, float scale) {
    size_t i = get_global_id(0);
    r[i] += scale * a[i];
}";

fn add(ctx: &Ctx<'_>) {
    let from = ctx.group() * 64;
    for (r, a) in ctx.out::<f32>(0).chunk(64).iter_mut().zip(&ctx.inp::<f32>(1)[from..]) {
        *r += ctx.value::<f32>(2) * a;
    }
}

fn main() -> Result<(), uhmm::Error> {
    let dev = Uhmm::new()?.device(&std::env::args().nth(1).unwrap_or("soft".into()))?;
    let kernel = Forms::new(add).opencl(SOURCE, "add", 64);
    let a: Vec<f32> = (0..1 << 20).map(|i| i as f32).collect();
    let mut r = vec![1.0f32; 1 << 20];
    dev.run(&kernel, r.len() / 64, args![inout(&mut r), inp(&a), 0.5f32])?;
    println!("{}: r[10] is {}, {} pages had gone to the device", dev.name(), r[10], dev.stats().pages_to_device);
    assert!(r.iter().zip(&a).all(|(r, a)| *r == 1.0 + 0.5 * a));
    Ok(())
}
