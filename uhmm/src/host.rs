//! The host as an executor of kernels: the same kernels on host memory, without a device and without uhmm's mechanism.
#![allow(unsafe_code)] // makes kernels' contexts

use core::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use uhmm_core::args::{Args, RawArg};
use uhmm_core::driver::KernelFault;
use uhmm_core::kernel::{Bound, Ctx, Entry, Grid, Kernel, LOCAL_BYTES};
use uhmm_core::{Error, kernel};

/// Runs kernels on threads of the program, in place. Its threads live as long as a run.
///
/// ```no_run
/// # fn main() -> Result<(), uhmm::Error> {
/// # let hmm = uhmm::Uhmm::new()?;
/// # let dev = hmm.device("soft")?;
/// use uhmm::{Ctx, Host, args, out};
///
/// let mut data = vec![0u32; 4096];
/// let fill = |ctx: &Ctx<'_>| ctx.out::<u32>(0).chunk(1024).fill(ctx.group() as u32);
/// Host::new(2).run(&fill, 4, args![out(&mut data)])?; // the same kernel, without a device
/// assert_eq!(data[4095], 3);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Host {
    local: Vec<Mutex<Vec<u128>>>,
}

impl Host {
    /// An executor with `threads` threads (at least one).
    pub fn new(threads: usize) -> Self {
        let local = || Mutex::new(vec![0u128; LOCAL_BYTES / 16 + 4]);
        Host { local: (0..threads.max(1)).map(|_| local()).collect() }
    }

    /// Runs `kernel` once for each group of `grid`.
    ///
    /// # Errors
    /// [`Error::Kernel`] if a group panicked, [`Error::OtherDevice`] if an argument is a device's memory, [`Error::Lent`] if one is [lent](crate::Lent) to a scope, [`Error::Grid`].
    pub fn run<K: Kernel>(&self, kernel: &K, grid: impl Into<Grid>, args: Args<'_>) -> Result<(), Error> {
        let grid = grid.into();
        let groups = grid.groups().filter(|&n| n > 0).ok_or(Error::Grid(grid.size))?;
        if let Some(index) = args.raw().iter().position(|arg| matches!(arg, RawArg::Slice { device: Some(_), .. })) {
            return Err(Error::OtherDevice { index });
        }
        if args.are_lent() {
            return Err(Error::Lent);
        }
        uhmm_core::check::overlap(args.raw())?;
        let bound = Bound::new(args.raw(), grid, 0);
        let entry = Entry::new(kernel);
        let next = AtomicUsize::new(0);
        let failed = Mutex::new(None::<kernel::Message>);
        std::thread::scope(|scope| {
            for local in &self.local {
                scope.spawn(|| {
                    let mut local = local.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    let start = local.as_mut_ptr().cast::<u8>();
                    // SAFETY: at most 63 of the 64 spare bytes.
                    let aligned = unsafe { start.add(start.align_offset(64)) };
                    loop {
                        let group = next.fetch_add(1, Ordering::Relaxed);
                        if group >= groups {
                            return;
                        }
                        // SAFETY: safe arguments are borrowed for the run, written ones exclusively, and were found not to overlap; group numbers are handed out once; the scratch memory is this thread's.
                        let ctx = unsafe { Ctx::new(&bound, group, aligned, LOCAL_BYTES) };
                        // SAFETY: the kernel is borrowed for the run.
                        if let Err(message) = unsafe { entry.call(&ctx) } {
                            failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(message);
                            next.store(groups, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let failed = failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        failed.map_or(Ok(()), |message| Err(Error::Kernel(KernelFault::Panic(message))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uhmm_core::args;
    use uhmm_core::args::{inp, out};

    #[test]
    fn every_group_runs_once_and_a_panic_is_an_error() {
        let host = Host::new(3);
        let a: Vec<u32> = (0..1000).collect();
        let mut r = vec![0u32; 1000];
        let kernel = |ctx: &Ctx<'_>| {
            let base = ctx.group() * 7;
            for (i, r) in ctx.out::<u32>(0).chunk(7).iter_mut().enumerate() {
                *r += ctx.inp::<u32>(1)[base + i] + 1;
            }
        };
        host.run(&kernel, 143, args![out(&mut r), inp(&a)]).unwrap();
        assert!(r.iter().zip(&a).all(|(r, a)| *r == a + 1));
        let failed = host.run(&|ctx: &Ctx<'_>| assert!(ctx.group() != 5, "five"), 10, args![]);
        assert!(failed.unwrap_err().to_string().contains("panicked: five"));
        assert!(matches!(host.run(&kernel, 0, args![]), Err(Error::Grid(_))));
    }
}
