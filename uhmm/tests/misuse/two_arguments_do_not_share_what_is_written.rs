//! One launch does not write what it reads under another name.
use uhmm::{Ctx, Device, args, inp, out};

fn misuse(dev: &Device, mut data: Vec<u32>) {
    let kernel = |_: &Ctx<'_>| {};
    let _ = dev.run(&kernel, 1, args![out(&mut data), inp(&data)]);
}

fn main() {}
