//! Work in pieces that nobody waits for: while the device computes on one piece, the next is on its way there; and a lease, for who works on the device by himself.
//!
//!     cargo run --release -p uhmm --example pipeline
#![allow(unsafe_code)] // works on the device by itself

use std::time::Instant;
use uhmm::{Ctx, Uhmm, args, fence, inout, inp, out, scope};

const PIECES: usize = 8;
const LEN: usize = 2 << 20;

/// Some work for each element.
fn polish(ctx: &Ctx<'_>) {
    let first = ctx.group() * 4096;
    for (to, from) in ctx.out::<f32>(0).chunk(4096).iter_mut().zip(&ctx.inp::<f32>(1)[first..]) {
        *to = (0..40).fold(*from, |x, _| 0.5 * (x + from / x));
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let hmm = Uhmm::new()?;
    let dev = hmm.device("soft")?;
    let make = || -> Vec<(Vec<f32>, Vec<f32>)> {
        (0..PIECES).map(|piece| (vec![0.0; LEN], (0..LEN).map(|i| (piece * LEN + i + 1) as f32).collect())).collect()
    };
    let mut pieces = make();
    let start = Instant::now();
    for (r, a) in &mut pieces {
        dev.run(&polish, LEN / 4096, args![out(r), inp(a)])?;
    }
    println!("one after the other: {:?}", start.elapsed());

    let mut pieces = make();
    let start = Instant::now();
    scope(|scope| {
        for (r, a) in &mut pieces {
            scope.launch(&dev, &polish, LEN / 4096, args![out(r), inp(a)]);
        }
    })?; // all of them have ended, and an error of any comes from here
    println!("in a scope: {:?}", start.elapsed());
    for (r, a) in &pieces {
        assert!(r.iter().zip(a).all(|(r, a)| (r - a.sqrt()).abs() < 1e-2 * a.sqrt()));
    }

    // Memory that stays on the device for another who works there: here a thread of our own, elsewhere a vendor's library.
    let mut data = vec![20u64; LEN];
    let lease = dev.acquire(args![inout(&mut data)])?;
    let at = lease.addr(0);
    let (done, signal) = fence();
    // SAFETY: the vector stays until the signal, and its first and last page are not touched before.
    unsafe { lease.release(done) };
    let worker = std::thread::spawn(move || {
        for i in 0..LEN {
            // SAFETY: leased, and so at this address on the device, until the signal; nobody else uses it.
            unsafe { *(at as *mut u64).add(i) += 1 };
        }
        signal.done();
    });
    println!("{} elements are {}", data.len(), data[LEN / 2]); // this touch waits for the signal
    assert!(data.iter().all(|&x| x == 21));
    worker.join().map_err(|_| "the worker panicked")?;
    Ok(())
}
