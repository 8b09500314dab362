//! What is lent to a scope cannot be used by the CPU in it.
use uhmm::{Ctx, Device, args, scope};

fn misuse(dev: &Device, mut data: Vec<u32>) {
    let kernel = |_: &Ctx<'_>| {};
    let _ = scope(|s| {
        let lent = s.lend(&mut data);
        s.launch(dev, &kernel, 1, args![lent.out()]);
        println!("{}", data[0]);
    });
}

fn main() {}
