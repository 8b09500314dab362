//! What a kernel is given is valid while the launch runs.
use std::sync::Mutex;
use uhmm::{Ctx, Device, args, inp};

fn misuse(dev: &Device, data: &[u32]) {
    let kept: Mutex<&'static [u32]> = Mutex::new(&[]);
    let kernel = |ctx: &Ctx<'_>| *kept.lock().unwrap() = ctx.inp::<u32>(0);
    let _ = dev.run(&kernel, 1, args![inp(data)]);
}

fn main() {}
