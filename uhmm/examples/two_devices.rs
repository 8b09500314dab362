//! Two devices work on the same `Vec`, one after the other: nobody says where it is.
//!
//!     cargo run --release -p uhmm --example two_devices

use uhmm::{Ctx, Device, Uhmm, args, inout};

const PART: usize = 1 << 16;

fn double(ctx: &Ctx<'_>) {
    ctx.out::<f32>(0).chunk(PART).iter_mut().for_each(|x| *x *= 2.0);
}

fn add_one(ctx: &Ctx<'_>) {
    ctx.out::<f32>(0).chunk(PART).iter_mut().for_each(|x| *x += 1.0);
}

fn report(what: &str, dev: &Device) {
    let stats = dev.stats();
    let (home, out, peer) = (stats.bytes_to_cpu, stats.bytes_to_device, stats.bytes_between_devices);
    println!("{what:<22} {} has got {out} bytes from the program and {peer} from the other, and sent {home} home", dev.name());
}

fn main() -> Result<(), uhmm::Error> {
    let hmm = Uhmm::new()?;
    let left = hmm.soft("left").memory(64 << 20).threads(1).open()?;
    let right = hmm.soft("right").memory(64 << 20).threads(1).open()?;

    let mut data: Vec<f32> = (0..1 << 22).map(|i| (i % 1000) as f32).collect();
    let groups = data.len() / PART;
    left.run(&double, groups, args![inout(&mut data)])?;
    report("left doubles:", &left);
    right.run(&add_one, groups, args![inout(&mut data)])?; // the pages go from the one device to the other, not by way of the program
    report("right adds one:", &left);
    report("", &right);
    data[7] = 100.0; // the CPU's turn: a page comes home
    left.run(&double, groups, args![inout(&mut data)])?;
    report("left doubles again:", &left);

    assert!(data.iter().enumerate().all(|(i, &x)| x == if i == 7 { 200.0 } else { ((i % 1000) * 2 + 1) as f32 * 2.0 }));
    println!("data[8] = (8 * 2 + 1) * 2 = {}", data[8]);
    Ok(())
}
