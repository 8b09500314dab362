//! What has happened to a block: numbers beside its lock, for policies to look at.

use crate::sync::*;

/// What has happened to a block since the process's core began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct History {
    /// Touches by the CPU that brought something of it home, or ended copies of it.
    pub cpu_faults: u32,
    /// Touches by devices of pages of it that were not there.
    pub device_faults: u32,
    /// Migrations to a device, of all of it or a part.
    pub migrations: u32,
    /// How often it had to leave a device that was full.
    pub evictions: u32,
    /// The launch or prefetch that used it last, as a number that counts them; 0 for none.
    pub last_use: u64,
}

/// The same, as it runs. All zeros is a block to which nothing has happened.
#[derive(Debug)]
pub(crate) struct Past {
    pub(crate) cpu_faults: AtomicU32,
    pub(crate) device_faults: AtomicU32,
    pub(crate) migrations: AtomicU32,
    pub(crate) evictions: AtomicU32,
    pub(crate) last_use: AtomicU64,
}

impl Past {
    /// Its values now.
    pub(crate) fn now(&self) -> History {
        let of = |number: &AtomicU32| number.load(Ordering::Relaxed);
        History {
            cpu_faults: of(&self.cpu_faults),
            device_faults: of(&self.device_faults),
            migrations: of(&self.migrations),
            evictions: of(&self.evictions),
            last_use: self.last_use.load(Ordering::Relaxed),
        }
    }
}

/// One more.
pub(crate) fn one_more(number: &AtomicU32) {
    number.fetch_add(1, Ordering::Relaxed);
}
