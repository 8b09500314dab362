//! A port: what a device does with a process through a page table of its own, in the kernel's words (`hmm_range_fault`, `migrate_vma`, device-exclusive access).
//!
//! A [`Station`] gives a process the memory that ports share; a [`Port`] is one opened device. Its *entries* say which pages the device may access now. Whatever changes
//! the mapping of a page erases its entry; a migration to the port's own device does not.

use crate::page::Va;
use crate::process::{CoreRef, DeviceConfig, OpenDriver};
use core::ops::Range;
use std::time::Duration;
use uhmm_os::Errno;

/// Which device a port belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// Its number, from 1 to [`Owner::MOST`]. Ports of one number see each other's pages as their own.
    pub number: u8,
    /// The CPU uses its memory in place.
    pub coherent: bool,
}

impl Owner {
    /// The largest number.
    pub const MOST: u8 = 14;
}

/// What a command of a port meets.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PortError {
    /// There is no mapping that may be read, or nothing behind it (beyond the end of a file): `EFAULT`.
    #[error("{address:#x} is not mapped, may not be read, or has nothing behind it")]
    Fault {
        /// The first such page.
        address: Va,
    },
    /// The page may be read and not written: `EPERM`.
    #[error("{address:#x} may be read and not written")]
    Denied {
        /// The first such page.
        address: Va,
    },
    /// Invalidated again and again: `EBUSY`.
    #[error("the range was changed again and again while it was looked at")]
    Busy,
    /// Pages there cannot migrate at all: no mapping, no right to read, huge pages of a pool, a device's mapping: `EINVAL`.
    #[error("pages at {address:#x} cannot migrate: no mapping, no right to read it, huge pages of a pool, or a device's")]
    Unfit {
        /// The first such address.
        address: Va,
    },
    /// A page has no entry when all should have one: `ENOENT`.
    #[error("the device has no entry for {address:#x}")]
    Missing {
        /// The first such page.
        address: Va,
    },
    /// Exclusive access is for anonymous memory: `EOPNOTSUPP`.
    #[error("{address:#x} is not anonymous memory")]
    NotAnonymous {
        /// The first such page.
        address: Va,
    },
    /// The system refuses something.
    #[error("system error: {0}")]
    System(Errno),
}

/// What a device finds at one page, without faulting anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sight {
    /// No mapping, no right to read it, or a device's mapping that cannot be looked into.
    pub error: bool,
    /// It may be read.
    pub read: bool,
    /// It may be written without a fault.
    pub write: bool,
    /// It is mapped by an entry of 2 MiB.
    pub huge: bool,
    /// It is the zero page.
    pub zero: bool,
    /// Its place, if that is a device's memory.
    pub place: Place,
}

/// Whose memory a page that can be accessed lies in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Place {
    /// The system's.
    #[default]
    System,
    /// The port's own device's, private.
    Private,
    /// The port's own device's, coherent.
    Coherent,
    /// Another coherent device's.
    OtherCoherent,
}

/// How long a range that is invalidated again and again is looked at.
pub const BUDGET: Duration = Duration::from_secs(1);

/// The memory that all ports of a process share.
#[derive(Debug)]
pub struct Station {
    core: CoreRef,
}

/// One opened device.
#[derive(Debug)]
pub struct Port {
    owner: Owner,
}

impl Station {
    /// Opens the memory, as the device that `config` and `open` describe: a coherent one.
    ///
    /// # Errors
    /// Those of [`CoreRef::get`] and [`CoreRef::device`].
    pub fn open(config: DeviceConfig, open: OpenDriver) -> Result<Self, crate::Error> {
        let _ = (config, open);
        Ok(Station { core: CoreRef::get()? })
    }

    /// A port of a device.
    ///
    /// # Errors
    /// Those of [`CoreRef::mirror`].
    pub fn port(&self, owner: Owner) -> Result<Port, crate::Error> {
        let _ = &self.core;
        Ok(Port { owner })
    }

    /// Brings home all that lies in the memory of the device with this number, and revokes what is exclusive to it.
    pub fn release(&self, number: u8) {
        let _ = number;
    }

    /// Pages of files with this inode on this device (major, minor) are a device's: they can be read, and do not migrate.
    pub fn add_device_file(&self, dev: (u32, u32), inode: u64) {
        let _ = (dev, inode);
    }

    /// The process's own userfaultfd is about to watch a range: ends uhmm's watch where nothing is on a device.
    pub fn step_aside(&self, range: Range<Va>) {
        let _ = range;
    }
}

impl Port {
    /// The device reads `out.len()` bytes, whole pages, from `start` on, through its page table: how many rounds of faults that took.
    ///
    /// # Errors
    /// [`PortError::Fault`], [`PortError::Busy`]. `out` has undefined contents then.
    pub fn read(&self, start: Va, out: &mut [u8]) -> Result<u64, PortError> {
        let _ = (start, out, self.owner);
        Err(PortError::System(Errno::NOSYS))
    }

    /// The device writes whole pages from `start` on: how many rounds of faults that took.
    ///
    /// # Errors
    /// [`PortError::Fault`], [`PortError::Denied`], [`PortError::Busy`]. Pages before the one that fails may be written.
    ///
    /// # Safety
    /// As writing by a pointer: the program expects it.
    #[allow(unsafe_code)]
    pub unsafe fn write(&self, start: Va, data: &[u8]) -> Result<u64, PortError> {
        let _ = (start, data);
        Err(PortError::System(Errno::NOSYS))
    }

    /// Moves pages to the device, then reads all of them through its page table.
    ///
    /// # Errors
    /// [`PortError::Unfit`], with what came before it moved; [`PortError::Missing`] if a page has not moved and has no entry.
    pub fn migrate_to_device(&self, start: Va, out: &mut [u8]) -> Result<(), PortError> {
        let _ = (start, out);
        Err(PortError::System(Errno::NOSYS))
    }

    /// Moves this device's pages of a range back to the system: how many entries moved (a block of 2 MiB that moves as one is one).
    ///
    /// # Errors
    /// [`PortError::Unfit`], as above.
    pub fn migrate_to_system(&self, range: Range<Va>) -> Result<u64, PortError> {
        let _ = range;
        Err(PortError::System(Errno::NOSYS))
    }

    /// What the device finds at each page, without faulting anything.
    ///
    /// # Errors
    /// [`PortError::Busy`].
    pub fn snapshot(&self, start: Va, out: &mut [Sight]) -> Result<(), PortError> {
        let _ = (start, out);
        Err(PortError::System(Errno::NOSYS))
    }

    /// Makes pages exclusive to the device, then reads them: any touch by the CPU, a fork or a change of protection revokes that.
    ///
    /// # Errors
    /// [`PortError::Fault`], also for what may not be written; [`PortError::NotAnonymous`]; [`PortError::Missing`] if it was revoked before all was read.
    pub fn exclusive(&self, start: Va, out: &mut [u8]) -> Result<(), PortError> {
        let _ = (start, out);
        Err(PortError::System(Errno::NOSYS))
    }

    /// Whether any page of the range is still exclusive to this port.
    pub fn is_exclusive(&self, range: Range<Va>) -> bool {
        let _ = range;
        false
    }

    /// Whether the port's next allocation of memory, for a block or a page, fails.
    pub fn fail_allocation(&self, fail: bool) {
        let _ = fail;
    }
}

/// Tells ports that mappings of a range change in a way that nothing else announces: a change of protection, above all. To be called before it is made; the change counts as made when
/// the value is dropped.
#[derive(Debug)]
pub struct Change(());

/// Begins a change of a range.
pub fn change(range: Range<Va>) -> Change {
    let _ = range;
    Change(())
}
