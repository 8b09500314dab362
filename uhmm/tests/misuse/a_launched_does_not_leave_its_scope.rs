//! What a scope returned is of no use outside it.
use uhmm::{Ctx, Device, args, scope};

fn misuse(dev: &Device) {
    let kernel = |_: &Ctx<'_>| {};
    let launched = scope(|s| s.launch(dev, &kernel, 1, args![1u32])).unwrap();
    launched.wait().unwrap();
}

fn main() {}
