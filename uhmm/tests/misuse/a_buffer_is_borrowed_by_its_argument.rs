//! A buffer that a launch in a scope writes is read when the scope has ended.
use uhmm::{Ctx, Device, args, scope};

fn misuse(dev: &Device) {
    let kernel = |_: &Ctx<'_>| {};
    let mut buffer = dev.alloc::<u32>(100).unwrap();
    let mut data = vec![0; 100];
    let _ = scope(|s| {
        s.launch(dev, &kernel, 1, args![buffer.out()]);
        buffer.download(&mut data).unwrap();
    });
}

fn main() {}
