//! `/proc/self/pagemap` (the kernel's admin-guide/mm/pagemap): the state of one page, or of a range at once by the `PAGEMAP_SCAN`
//! ioctl (Linux 6.7).
//!
//! On older kernels a scan without flags is answered from the page entries; what those do not tell (huge, zero page, write
//! protection allowed) is then refused if it was asked for as a condition, and clear in the result. Everything but
//! [`open`](Pagemap::open) is *Fault path*.
//!
//! Who uses it: `uhmm-core`, to see what is there; tests, to see where a page really is.
//!
//! ```
//! use uhmm_os::PAGE;
//! use uhmm_os::mem::{self, Prot, Reserve};
//! use uhmm_os::pagemap::{Category, Pagemap, Region, ScanArgs};
//!
//! let memory = mem::map(&Reserve { hint: 0, len: 8 * PAGE, align: PAGE, name: c"example", prot: Prot::ReadWrite, exact: false })?;
//! let second = memory.start() + PAGE;
//! // SAFETY: it is ours.
//! unsafe { (second as *mut u8).write(1) };
//!
//! let pagemap = Pagemap::open()?;
//! assert!(pagemap.entry(second)?.present && !pagemap.entry(memory.start())?.present);
//!
//! let mut regions = [Region::EMPTY; 4];
//! let scan = pagemap.scan(memory.start(), memory.end(), &ScanArgs::all_of(Category::PRESENT), &mut regions)?;
//! assert_eq!((scan.filled, regions[0].start), (1, second));
//! # Ok::<(), uhmm_os::Errno>(())
//! ```

use crate::syscall::{abi, ioctl, iowr, pread};
use crate::{Errno, PAGE};
use bitflags::bitflags;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};

const SCAN: u32 = iowr::<abi::pm_scan_arg>(b'f', 16);
/// Page entries that the fallback reads at once, into its stack frame.
const CHUNK: usize = 256;
/// Page entries that are told at once.
const MOST: usize = 512;

/// One page's entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// It is in memory and mapped here.
    pub present: bool,
    /// It is in swap (or a migration entry, or a userfaultfd marker).
    pub swapped: bool,
    /// It belongs to a file or to shared memory.
    pub file_or_shared: bool,
    /// Nobody else maps it.
    pub exclusive: bool,
    /// It was written since the soft-dirty bits were cleared.
    pub soft_dirty: bool,
    /// It is write-protected by a userfaultfd.
    pub uffd_wp: bool,
    /// The physical page's number; 0 without `CAP_SYS_ADMIN`, or where the page is not present.
    pub pfn: u64,
}

impl Entry {
    fn from_raw(raw: u64) -> Self {
        let bit = |n: u32| raw & 1 << n != 0;
        let present = bit(63);
        Entry {
            present,
            swapped: bit(62),
            file_or_shared: bit(61),
            exclusive: bit(56),
            soft_dirty: bit(55),
            uffd_wp: bit(57),
            pfn: if present { raw & ((1 << 55) - 1) } else { 0 },
        }
    }

    fn categories(self) -> Category {
        let here = self.present || self.swapped;
        let mut all = Category::empty();
        all.set(Category::WRITTEN, here && !self.uffd_wp);
        all.set(Category::FILE, self.file_or_shared);
        all.set(Category::PRESENT, self.present);
        all.set(Category::SWAPPED, self.swapped);
        all.set(Category::SOFT_DIRTY, self.soft_dirty);
        all
    }
}

bitflags! {
    /// What a page is (the `PAGE_IS_` constants).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    #[repr(transparent)]
    pub struct Category: u64 {
        /// Its mapping is registered for asynchronous write protection.
        const WPALLOWED = abi::PAGE_IS_WPALLOWED as u64;
        /// It is not write-protected: it may have been written since it was. Holds for many a page that is not there, too: ask for
        /// [`PRESENT`](Self::PRESENT) or [`SWAPPED`](Self::SWAPPED) besides.
        const WRITTEN = abi::PAGE_IS_WRITTEN as u64;
        /// It belongs to a file.
        const FILE = abi::PAGE_IS_FILE as u64;
        /// It is in memory and mapped.
        const PRESENT = abi::PAGE_IS_PRESENT as u64;
        /// It is in swap (or a migration entry, or a userfaultfd marker).
        const SWAPPED = abi::PAGE_IS_SWAPPED as u64;
        /// It is the zero page.
        const PFNZERO = abi::PAGE_IS_PFNZERO as u64;
        /// It is mapped by a whole block.
        const HUGE = abi::PAGE_IS_HUGE as u64;
        /// It was written since the soft-dirty bits were cleared.
        const SOFT_DIRTY = abi::PAGE_IS_SOFT_DIRTY as u64;
    }

    /// What a scan does besides looking.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ScanFlags: u64 {
        /// Write-protect the pages that match, atomically with the look at them.
        const WP_MATCHING = abi::PM_SCAN_WP_MATCHING as u64;
        /// Fail with `EPERM` where the range is not registered for asynchronous write protection.
        const CHECK_WPASYNC = abi::PM_SCAN_CHECK_WPASYNC as u64;
    }
}

/// The categories that page entries do not tell.
const UNKNOWN_TO_ENTRIES: Category = Category::WPALLOWED.union(Category::PFNZERO).union(Category::HUGE);

/// Which pages a scan reports, and what it says of them.
///
/// A page matches if all categories of `mask`, and one of `any_of` unless that is empty, hold for it after those in `inverted` have
/// been negated.
#[derive(Clone, Copy, Debug)]
pub struct ScanArgs {
    /// What to do besides looking.
    pub flags: ScanFlags,
    /// Categories to negate before the comparison.
    pub inverted: Category,
    /// All of these must hold.
    pub mask: Category,
    /// One of these must hold, unless it is empty.
    pub any_of: Category,
    /// What a region says of its pages. A page of which it says nothing is not reported.
    pub return_mask: Category,
    /// Stop after that many pages; 0: no limit.
    pub max_pages: usize,
}

impl ScanArgs {
    /// A plain look for pages with all categories of `mask`, which reports just those.
    pub const fn all_of(mask: Category) -> Self {
        ScanArgs {
            flags: ScanFlags::empty(),
            inverted: Category::empty(),
            mask,
            any_of: Category::empty(),
            return_mask: mask,
            max_pages: 0,
        }
    }

    fn matches(&self, page: Category) -> bool {
        let page = page ^ self.inverted;
        page.contains(self.mask) && (self.any_of.is_empty() || page.intersects(self.any_of))
    }
}

/// Neighbouring pages with the same categories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Region {
    /// First address.
    pub start: usize,
    /// One past the last.
    pub end: usize,
    /// Those of `return_mask` that hold for every page in it, not negated.
    pub categories: Category,
}

impl Region {
    /// A region of nothing, to make room with.
    pub const EMPTY: Region = Region { start: 0, end: 0, categories: Category::empty() };
}

// The kernel writes `page_region` structures into an array of `Region`; any bits are a valid `Category`.
const _: () = assert!(size_of::<Region>() == size_of::<abi::page_region>() && align_of::<Region>() == align_of::<abi::page_region>());

/// How far a scan came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scan {
    /// Regions that were filled in.
    pub filled: usize,
    /// Where to go on: the scan's end if it is done, else where the regions or `max_pages` ran out.
    pub walk_end: usize,
}

/// The page map of this process.
#[derive(Debug)]
pub struct Pagemap {
    fd: OwnedFd,
    entries_only: bool,
}

impl Pagemap {
    /// Opens `/proc/self/pagemap`.
    ///
    /// # Errors
    /// Those of open(2): `ENOENT` without /proc or without `CONFIG_PROC_PAGE_MONITOR`.
    pub fn open() -> Result<Self, Errno> {
        let fd = rustix::fs::open("/proc/self/pagemap", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut pagemap = Pagemap { fd, entries_only: false };
        let mut one = [Region::EMPTY];
        let tried = pagemap.scan_by_ioctl(0, PAGE, &ScanArgs::all_of(Category::PRESENT), &mut one);
        pagemap.entries_only = tried == Err(Errno::NOTTY);
        Ok(pagemap)
    }

    /// The same, but scans read page entries as on kernels without `PAGEMAP_SCAN`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_entries_only() -> Result<Self, Errno> {
        Ok(Pagemap { entries_only: true, ..Self::open()? })
    }

    /// Whether this kernel has the `PAGEMAP_SCAN` ioctl, which write-protecting scans need.
    pub fn has_scan(&self) -> bool {
        !self.entries_only
    }

    /// The entry of the page that holds `va`. *Fault path.*
    ///
    /// # Errors
    /// `EINVAL` for an address beyond the address space.
    pub fn entry(&self, va: usize) -> Result<Entry, Errno> {
        let mut raw = [0; 8];
        match pread(self.fd.as_fd(), &mut raw, (va / PAGE * 8) as u64)? {
            8 => Ok(Entry::from_raw(u64::from_ne_bytes(raw))),
            _ => Err(Errno::INVAL),
        }
    }

    /// The entries of pages from the one that holds `va` on, at most 512, and how many were told. *Fault path.*
    ///
    /// # Errors
    /// Those of read(2).
    pub fn entries(&self, va: usize, entries: &mut [Entry]) -> Result<usize, Errno> {
        let mut raw = [[0u8; 8]; MOST];
        let wanted = entries.len().min(MOST);
        let read = pread(self.fd.as_fd(), raw[..wanted].as_flattened_mut(), (va / PAGE * 8) as u64)? / 8;
        for (entry, raw) in entries.iter_mut().zip(&raw[..read]) {
            *entry = Entry::from_raw(u64::from_ne_bytes(*raw));
        }
        Ok(read)
    }

    /// Looks for pages in `start..end` that match, and reports them in order, neighbours with equal categories as one region.
    /// *Fault path.*
    ///
    /// It stops early when the regions are used up; call it again from [`Scan::walk_end`]. A page that is not there has
    /// neither [`Category::PRESENT`] nor [`Category::SWAPPED`].
    ///
    /// # Errors
    /// `EINVAL`: unaligned addresses, or contradicting arguments; `EPERM`: [`ScanFlags::CHECK_WPASYNC`]; `EOPNOTSUPP`: flags, or
    /// conditions on what page entries do not tell, on a kernel without the ioctl.
    pub fn scan(&self, start: usize, end: usize, args: &ScanArgs, regions: &mut [Region]) -> Result<Scan, Errno> {
        if self.entries_only { self.scan_by_entries(start, end, args, regions) } else { self.scan_by_ioctl(start, end, args, regions) }
    }

    /// Whether the page that holds `va` is none of memory but of a device's, or of the kernel's alone (`VM_PFNMAP` to the kernel: clock pages, registers): a scan passes such mappings by, and says
    /// something of every other page that is mapped. Of one that is not mapped it is true too; without `PAGEMAP_SCAN` never. *Fault path.*
    pub fn is_no_memory(&self, va: usize) -> bool {
        let start = va & !(PAGE - 1);
        // A page that is not there is not PRESENT, wherever else.
        let look = |inverted| {
            let args = ScanArgs { inverted, return_mask: Category::all(), ..ScanArgs::all_of(Category::PRESENT) };
            self.scan_by_ioctl(start, start.checked_add(PAGE)?, &args, &mut [Region::EMPTY]).ok().map(|scan| scan.filled == 0)
        };
        !self.entries_only && look(Category::PRESENT) == Some(true) && look(Category::empty()) == Some(true)
    }

    /// How many bytes from `start` on are there without a gap, in memory or in swap, up to `end`; 0 if that cannot be told. *Fault path.*
    pub(crate) fn present_from(&self, start: usize, end: usize) -> usize {
        let mut at = start;
        while at < end
            && let Some(region) = self.first_present(at, end)
            && region.start == at
        {
            at = region.end;
        }
        at - start
    }

    /// How many bytes from `start` on are missing, up to `end`; 0 if that cannot be told. *Fault path.*
    pub(crate) fn absent_from(&self, start: usize, end: usize) -> usize {
        self.first_present(start, end).map_or(0, |region| region.start - start)
    }

    /// The first region that is there: an empty one at `end` if none is.
    fn first_present(&self, start: usize, end: usize) -> Option<Region> {
        let wanted = Category::PRESENT | Category::SWAPPED;
        let args = ScanArgs { any_of: wanted, return_mask: wanted, ..ScanArgs::all_of(Category::empty()) };
        let mut first = [Region { start: end, end, ..Region::EMPTY }];
        self.scan(start, end, &args, &mut first).ok().map(|_| first[0])
    }

    fn scan_by_ioctl(&self, start: usize, end: usize, args: &ScanArgs, regions: &mut [Region]) -> Result<Scan, Errno> {
        let mut arg = abi::pm_scan_arg {
            size: size_of::<abi::pm_scan_arg>() as u64,
            flags: args.flags.bits(),
            start: start as u64,
            end: end as u64,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            max_pages: args.max_pages as u64,
            category_inverted: args.inverted.bits(),
            category_mask: args.mask.bits(),
            category_anyof_mask: args.any_of.bits(),
            return_mask: args.return_mask.bits(),
        };
        // SAFETY: `vec` and `vec_len` are a slice of structures laid out as the kernel's (asserted above). Write-protecting, if it is
        // asked for, changes memory only where a registration of the program's own allows it.
        let filled = unsafe { ioctl(self.fd.as_fd(), SCAN, &mut arg) }?;
        Ok(Scan { filled, walk_end: arg.walk_end as usize })
    }

    fn scan_by_entries(&self, start: usize, end: usize, args: &ScanArgs, regions: &mut [Region]) -> Result<Scan, Errno> {
        if !args.flags.is_empty() || (args.mask | args.any_of).intersects(UNKNOWN_TO_ENTRIES) {
            return Err(Errno::OPNOTSUPP);
        }
        if !start.is_multiple_of(PAGE) || start > end {
            return Err(Errno::INVAL);
        }
        let mut out = Output { regions, filled: 0, pages_left: if args.max_pages == 0 { usize::MAX } else { args.max_pages } };
        let mut raw = [[0u8; 8]; CHUNK];
        let mut at = start;
        while at < end {
            let count = (end - at).div_ceil(PAGE).min(CHUNK);
            let wanted = raw.get_mut(..count).ok_or(Errno::INVAL)?;
            let read = pread(self.fd.as_fd(), wanted.as_flattened_mut(), (at / PAGE * 8) as u64)? / 8;
            if read == 0 {
                break; // the end of the address space
            }
            for entry in wanted.iter().take(read) {
                let page = Entry::from_raw(u64::from_ne_bytes(*entry)).categories();
                let told = page & args.return_mask;
                if args.matches(page) && !told.is_empty() && !out.push(at, told) {
                    return Ok(Scan { filled: out.filled, walk_end: at });
                }
                at += PAGE;
            }
        }
        Ok(Scan { filled: out.filled, walk_end: end })
    }
}

/// The regions of a scan under way.
struct Output<'a> {
    regions: &'a mut [Region],
    filled: usize,
    pages_left: usize,
}

impl Output<'_> {
    /// Adds a page, or returns false if there is no room for it.
    fn push(&mut self, at: usize, categories: Category) -> bool {
        if self.pages_left == 0 {
            return false;
        }
        let (done, free) = self.regions.split_at_mut(self.filled.min(self.regions.len()));
        match (done.last_mut(), free.first_mut()) {
            (Some(last), _) if last.end == at && last.categories == categories => last.end += PAGE,
            (_, Some(next)) => {
                *next = Region { start: at, end: at + PAGE, categories };
                self.filled += 1;
            }
            _ => return false,
        }
        self.pages_left -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_number() {
        assert_eq!(SCAN, 0xC060_6610); // from the kernel's fs.h
    }

    #[test]
    fn conditions() {
        let mut args = ScanArgs::all_of(Category::PRESENT);
        assert!(args.matches(Category::PRESENT | Category::FILE) && !args.matches(Category::FILE));
        args.inverted = Category::FILE;
        args.mask = Category::PRESENT | Category::FILE;
        assert!(args.matches(Category::PRESENT) && !args.matches(Category::PRESENT | Category::FILE));
        args.any_of = Category::HUGE | Category::SWAPPED;
        assert!(!args.matches(Category::PRESENT) && args.matches(Category::PRESENT | Category::HUGE));
    }
}
