//! Nothing is declared of a bare pointer: who passes one vouches for what the kernel reaches through it.
use uhmm::{Ctx, Device, args, ptr};

fn misuse(dev: &Device, data: &[u32]) {
    let kernel = |_: &Ctx<'_>| {};
    let _ = dev.run(&kernel, 1, args![ptr(data.as_ptr())]);
}

fn main() {}
