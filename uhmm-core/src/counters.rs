//! Counters: what happened, for people and for policies. Tests ask the kernel where a page is, never these.
//!
//! Who uses it: programs and benchmarks, which compare two moments.
//!
//! ```
//! use uhmm_core::counters::Stats;
//! use uhmm_core::{DeviceRef, Error};
//!
//! fn moved(dev: &DeviceRef, work: impl FnOnce() -> Result<(), Error>) -> Result<Stats, Error> {
//!     let before = dev.stats();
//!     work()?;
//!     Ok(dev.stats() - before)
//! }
//!
//! let (before, after) = (Stats::default(), Stats { kernel_nanos: 1500, ..Stats::default() });
//! assert_eq!((after - before).kernel_time().as_nanos(), 1500);
//! ```

use crate::sync::{AtomicU64, Ordering};
use core::time::Duration;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// The counters as they run.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $($(#[$doc])* pub $name: AtomicU64,)* }

        /// The counters at one moment. All grow only, so that a difference of two tells what happened in between.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Stats { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// All values now.
            pub(crate) fn stats(&self) -> Stats {
                Stats { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }

        impl core::ops::Sub for Stats {
            type Output = Stats;
            fn sub(self, earlier: Stats) -> Stats {
                Stats { $($name: self.$name.wrapping_sub(earlier.$name),)* }
            }
        }

        impl core::ops::Add for Stats {
            type Output = Stats;
            fn add(self, other: Stats) -> Stats {
                Stats { $($name: self.$name.wrapping_add(other.$name),)* }
            }
        }
    };
}

counters! {
    /// Bytes copied to the device.
    bytes_to_device,
    /// Bytes copied from the device, counted before who waits for them is woken.
    bytes_to_cpu,
    /// Bytes copied from another device straight to this one. What passes through host pages on that way is counted as bytes from the one and bytes to the other.
    bytes_between_devices,
    /// Bytes zeroed on the device for pages that the program never touched or only writes.
    bytes_zeroed,
    /// Touches by the CPU that were served.
    cpu_faults,
    /// Touches by the device that were served.
    device_faults,
    /// Launches that ended.
    launches,
    /// Launches that the device began as soon as the one before them had ended, without a wait of the host's.
    launches_chained,
    /// Launches that failed.
    launches_failed,
    /// Pages that moved to the device.
    pages_to_device,
    /// Pages that came back, counted after who waits for them was woken.
    pages_to_cpu,
    /// Pages that came from another device, without having been in the program.
    pages_between_devices,
    /// Pages that were duplicated.
    pages_duplicated,
    /// Pages of which a launch took a snapshot, because they hold other data or cannot move.
    pages_bounced,
    /// Pages whose only copy was lost with the device.
    pages_lost,
    /// Blocks that were evicted to make room.
    evictions,
    /// Mapping changes of the program that were followed: unmap, remap, remove.
    invalidations,
    /// Time that kernels ran, in nanoseconds.
    kernel_nanos,
}

impl Stats {
    /// Time that kernels ran.
    pub fn kernel_time(&self) -> Duration {
        Duration::from_nanos(self.kernel_nanos)
    }
}

/// Adds to a counter.
pub(crate) fn count(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}
