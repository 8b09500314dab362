//! What a launch in a scope writes is borrowed until the scope ends.
use uhmm::{Ctx, Device, args, inout, scope};

fn misuse(dev: &Device, mut data: Vec<u32>) {
    let kernel = |_: &Ctx<'_>| {};
    let _ = scope(|s| {
        s.launch(dev, &kernel, 1, args![inout(&mut data)]);
        data[0] = 1;
    });
}

fn main() {}
