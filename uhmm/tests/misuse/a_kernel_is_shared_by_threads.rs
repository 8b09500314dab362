//! A kernel runs on several threads at once.
use std::cell::Cell;
use uhmm::{Ctx, Device, args};

fn misuse(dev: &Device) {
    let count = Cell::new(0);
    let kernel = |_: &Ctx<'_>| count.set(count.get() + 1);
    let _ = dev.run(&kernel, 1, args![1u32]);
}

fn main() {}
