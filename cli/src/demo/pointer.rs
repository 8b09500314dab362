//! One pointer, valid on both sides.

use anyhow::{Result, ensure};
use uhmm::{Ctx, Device, args, inp, out};

/// One pointer as the program and as the kernel see it.
pub(super) struct Pointer {
    pub(super) cpu: usize,
    pub(super) device: usize,
}

/// Gives the kernel a pointer as a plain number, and lets it say which number it got and whether data lie there.
pub(super) fn on_both_sides(device: &Device) -> Result<Pointer> {
    let data = vec![42.0f32; 1 << 16];
    let cpu = data.as_ptr() as usize;
    let mut seen = [0usize; 2];
    let look = |ctx: &Ctx<'_>| {
        let number = ctx.value::<usize>(2);
        let data = ctx.inp::<f32>(1);
        let found = core::ptr::eq(ctx.ptr(number as *const f32), data.as_ptr()) && data.iter().all(|&value| value == 42.0);
        ctx.out::<usize>(0).chunk(2).copy_from_slice(&[number, usize::from(found)]);
    };
    device.run(&look, 1, args![out(&mut seen), inp(&data), cpu])?;
    ensure!(seen[1] == 1, "the kernel did not find the data at the program's pointer {cpu:#x}");
    Ok(Pointer { cpu, device: seen[0] })
}

impl Pointer {
    pub(super) fn text(&self) -> String {
        format!("  in the program   {:#x}\n  in the kernel    {:#x}\n", self.cpu, self.device)
    }
}
