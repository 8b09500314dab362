//! What a kernel may have left in an argument must be a value of its type, whatever the bytes are.
use uhmm::{Ctx, Device, args, out};

fn misuse(dev: &Device, mut data: Vec<bool>) {
    let kernel = |_: &Ctx<'_>| {};
    let _ = dev.run(&kernel, 1, args![out(&mut data)]);
}

fn main() {}
