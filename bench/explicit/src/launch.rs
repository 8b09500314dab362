//! A kernel that does nothing over a buffer that lies there already: what a launch costs without memory.
#![allow(unsafe_code)] // the kernel touches nothing

use crate::cl::{Buffer, Cl, Kernel, Result};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

/// The kernel.
pub const SOURCE: &str = "__kernel void nothing(__global uchar *data) {}";

/// The program.
pub struct Launch<'c> {
    cl: &'c Cl,
    kernel: Kernel<'c>,
    buffer: Buffer<'c, u8>,
}

impl<'c> Launch<'c> {
    /// Over a buffer of so many bytes.
    ///
    /// # Errors
    /// What OpenCL says.
    pub fn new(cl: &'c Cl, bytes: usize) -> Result<Self> {
        Ok(Launch { cl, kernel: cl.kernel(SOURCE, "nothing")?, buffer: cl.buffer(bytes)? })
    }

    /// One launch, and the wait for its end.
    ///
    /// # Errors
    /// What OpenCL says.
    pub fn run(&mut self) -> Result<()> {
        // SAFETY: this is its parameter, and it touches nothing.
        unsafe { self.kernel.enqueue(&[self.buffer.arg()], [1, 1], [1, 1]) }?;
        self.cl.finish()
    }

    /// So many launches, each asked for by this thread and made by another: what a launch costs, at least, where the thread that asks must not be the one that makes it.
    ///
    /// # Errors
    /// What OpenCL says.
    ///
    /// # Panics
    /// If the other thread does.
    pub fn run_by_another(&mut self, many: u32) -> Result<()> {
        let (asked, done) = (AtomicU32::new(0), AtomicU32::new(0));
        let (launch, who_asks) = (Lent(self), thread::current());
        thread::scope(|scope| {
            let other = scope.spawn(|| {
                let Lent(launch) = { launch };
                for n in 1..=many {
                    while asked.load(Ordering::Acquire) < n {
                        thread::park();
                    }
                    let ran = launch.run();
                    done.store(if ran.is_ok() { n } else { many }, Ordering::Release);
                    who_asks.unpark();
                    ran?;
                }
                Ok(())
            });
            for n in 1..=many {
                asked.store(n, Ordering::Release);
                other.thread().unpark();
                while done.load(Ordering::Acquire) < n {
                    thread::park();
                }
            }
            other.join().expect("the thread that launches")
        })
    }
}

struct Lent<'a, 'c>(&'a mut Launch<'c>);
// SAFETY: OpenCL's objects may be used by any thread (specification, appendix A.2), and who lends it waits for its return.
unsafe impl Send for Lent<'_, '_> {}
