//! What is made in the scope's own function does not live until the scope has waited.
use uhmm::{Ctx, Device, args, inout, scope};

fn misuse(dev: &Device) {
    let kernel = |_: &Ctx<'_>| {};
    let _ = scope(|s| {
        let mut data = vec![1u32; 100];
        s.launch(dev, &kernel, 1, args![inout(&mut data)]);
    });
}

fn main() {}
