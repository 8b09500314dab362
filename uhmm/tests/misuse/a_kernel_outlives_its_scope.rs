//! A kernel is borrowed until the scope ends.
use uhmm::{Ctx, Device, args, scope};

fn misuse(dev: &Device) {
    let _ = scope(|s| {
        let kernel = |_: &Ctx<'_>| {};
        s.launch(dev, &kernel, 1, args![1u32]);
    });
}

fn main() {}
