//! Shared memory, which a device uses in place: its page table and the process's name the very same pages.
//!
//! What is mapped MAP_SHARED (anonymous, memfd, files) cannot leave the process, for others have it too. A device that can is given a second mapping of it
//! ([`crate::driver::Driver::share`]), one for each mapping of the program's, made when a launch or a device fault first needs it. Nothing is copied, and a write by the device
//! is at once everybody's.
//!
//! No event tells that such a mapping has changed: each launch looks up whether what it shares is still there as it was. What the program changes while a kernel
//! runs is seen by the next launch.

use crate::bits::Bits;
use crate::core::{Core, Device};
use crate::page::{Span, Va};
use crate::sync::*;
use uhmm_os::Errno;
use uhmm_os::maps::Vma;

/// Mappings that one device shares at a time.
const MOST: usize = 512;

/// What tells one mapping from another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Share {
    span: Span,
    dev: (u32, u32),
    inode: u64,
    offset: u64,
    write: bool,
}

impl Share {
    const NONE: Share = Share { span: Span { start: 0, end: 0 }, dev: (0, 0), inode: 0, offset: 0, write: false };

    fn of(vma: &Vma) -> Self {
        Share { span: Span { start: vma.start, end: vma.end }, dev: vma.dev, inode: vma.inode, offset: vma.offset, write: vma.write }
    }

    /// Whether the mapping is the one that was shared; it may have grown.
    fn is_still(&self, vma: &Vma) -> bool {
        let whole = vma.start <= self.span.start && self.span.end <= vma.end;
        let at = self.span.start.wrapping_sub(vma.start) as u64;
        whole
            && vma.read
            && vma.shared
            && (vma.dev, vma.inode, vma.write) == (self.dev, self.inode, self.write)
            && vma.offset + at == self.offset
    }
}

/// What a device shares.
#[derive(Debug)]
pub(crate) struct Shares {
    list: Mutex<([Share; MOST], usize)>,
}

impl Default for Shares {
    fn default() -> Self {
        Shares { list: Mutex::new(([Share::NONE; MOST], 0)) }
    }
}

impl Shares {
    /// Lets the device see the mapping in place. `again`: it has faulted there, so what was made before may be damaged.
    ///
    /// # Errors
    /// The driver's: such memory is to be copied.
    pub(crate) fn ensure(&self, dev: &Device, vma: &Vma, again: bool) -> Result<(), Errno> {
        let share = Share::of(vma);
        let mut list = self.list.lock();
        let (shares, count) = &mut *list;
        let known = shares[..*count].iter().any(|known| known.is_still(vma) && known.span == share.span);
        if known {
            return if again { dev.driver.share(share.span) } else { Ok(()) };
        }
        let mut at = 0;
        while at < *count {
            // Parts of mappings that have gone or changed, and, when the list is full, any.
            if !shares[at].span.and(share.span).is_empty() || *count == MOST {
                dev.driver.unshare(shares[at].span);
                *count -= 1;
                shares[at] = shares[*count];
            } else {
                at += 1;
            }
        }
        dev.driver.share(share.span)?;
        shares[*count] = share;
        *count += 1;
        Ok(())
    }

    /// Ends what is not as it was, at the start of a launch.
    pub(crate) fn verify(&self, core: &Core, dev: &Device) {
        let mut list = self.list.lock();
        let (shares, count) = &mut *list;
        let mut at = 0;
        while at < *count {
            let vma = core.space.mapping(shares[at].span.start);
            if matches!(vma, Ok(Some(vma)) if shares[at].is_still(&vma)) {
                at += 1;
                continue;
            }
            dev.driver.unshare(shares[at].span);
            *count -= 1;
            shares[at] = shares[*count];
        }
    }

    /// The device got a scratch page somewhere in the mapping at `va`: what was shared is made anew before the next launch.
    pub(crate) fn damaged(&self, va: Va) {
        let mut list = self.list.lock();
        let (shares, count) = &mut *list;
        for share in &mut shares[..*count] {
            if share.span.start <= va && va < share.span.end {
                share.inode = u64::MAX; // no mapping's
            }
        }
    }

    /// Pages of `part`, which lies in one block, that the device sees in place; for writing, those that it may write.
    pub(crate) fn bits(&self, part: Span, write: bool) -> Bits {
        let list = self.list.lock();
        let shared = list.0[..list.1].iter().filter(|share| share.write || !write).map(|share| share.span.and(part));
        shared.filter(|both| !both.is_empty()).fold(Bits::EMPTY, |bits, both| bits | both.bits())
    }
}

/// Lets the device see shared mappings of a byte range in place, as far as it can.
pub(crate) fn open(core: &Core, dev: &Device, start: Va, end: Va) {
    let mut at = start;
    while at < end {
        let Ok(Some(vma)) = core.space.mapping(at) else { return };
        if vma.shared {
            let _ = dev.shares.ensure(dev, &vma, false);
        }
        at = vma.end;
    }
}
