//! One userfaultfd and the few requests that the floors make of it.
//!
//! Sources: `ioctl_userfaultfd(2)`, `userfaultfd(2)`, and `Documentation/admin-guide/mm/userfaultfd.rst`.
//! Rule: whatever runs in the SIGBUS handler ([`Uffd::copy`], [`Uffd::move_pages`], [`Uffd::unregister`]) makes system calls only.

use crate::memory::{PAGE, Region};
use crate::{Error, Result};
use core::ffi::c_int;
use core::mem::MaybeUninit;
use linux_raw_sys::general as raw;
use linux_raw_sys::ioctl;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `UFFDIO_MOVE`, which linux-raw-sys has no number for.
const UFFDIO_MOVE: libc::Ioctl = libc::_IOWR::<raw::uffdio_move>(raw::UFFDIO, raw::_UFFDIO_MOVE);

/// `UFFDIO_WRITEPROTECT_MODE_WP`, which it leaves out, too.
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1;

/// `_IO(0xAA, 0x00)` of /dev/userfaultfd: a new userfaultfd.
const USERFAULTFD_IOC_NEW: libc::Ioctl = libc::_IO(raw::UFFDIO, 0);

/// A userfaultfd that may move pages.
#[derive(Debug)]
pub(crate) struct Uffd {
    fd: OwnedFd,
}

fn owned(fd: libc::c_long) -> Option<OwnedFd> {
    // SAFETY: a successful userfaultfd call returns a descriptor that nobody else owns.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as c_int) })
}

/// A descriptor by the first way that this user has: the system call, /dev/userfaultfd, or one for faults of user mode only.
fn open_any() -> Result<OwnedFd> {
    // SAFETY: userfaultfd(2) takes flags and touches no memory.
    let call = |flags: c_int| unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if let Some(fd) = owned(call(libc::O_CLOEXEC)) {
        return Ok(fd);
    }
    let first = Error::last("userfaultfd");
    if let Ok(device) = std::fs::File::open("/dev/userfaultfd") {
        // SAFETY: this request takes flags and touches no memory.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC) };
        if let Some(fd) = owned(fd.into()) {
            return Ok(fd);
        }
    }
    owned(call(libc::O_CLOEXEC | raw::UFFD_USER_MODE_ONLY as c_int)).ok_or(first)
}

/// Whether a page is mapped here: mincore(2) tells, of private anonymous memory. It neither faults nor allocates.
fn is_there(page: *mut u8) -> bool {
    let mut there = 0u8;
    // SAFETY: the kernel writes one byte, for one page.
    let result = unsafe { libc::mincore(page.cast(), PAGE, &raw mut there) };
    result == 0 && there & 1 != 0
}

impl Uffd {
    /// A userfaultfd with `UFFD_FEATURE_MOVE`, and with faults given as SIGBUS to whoever made them if `sigbus`.
    pub(crate) fn open(sigbus: bool) -> Result<Self> {
        let uffd = Uffd { fd: open_any()? };
        let features = raw::UFFD_FEATURE_MOVE | if sigbus { raw::UFFD_FEATURE_SIGBUS } else { 0 };
        let mut api = raw::uffdio_api { api: raw::UFFD_API.into(), features: features.into(), ioctls: 0 };
        // SAFETY: UFFDIO_API reads and writes one `uffdio_api`.
        match unsafe { uffd.ioctl(ioctl::UFFDIO_API as libc::Ioctl, &raw mut api) } {
            0 => Ok(uffd),
            errno => Err(Error::of("UFFDIO_API", errno)),
        }
    }

    /// Makes a request; 0 or the errno.
    ///
    /// # Safety
    /// `argument` is what the request takes, and every address in it is memory of this crate that the request may change.
    unsafe fn ioctl<T>(&self, request: libc::Ioctl, argument: *mut T) -> c_int {
        // SAFETY: by the contract.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument) } {
            0 => 0,
            // SAFETY: errno of this thread.
            _ => unsafe { *libc::__errno_location() },
        }
    }

    /// Makes reading faults return at once if there is none, for who would rather spin than sleep.
    pub(crate) fn never_wait(&self) -> Result<()> {
        // SAFETY: changes a flag of our own descriptor; O_CLOEXEC is none of the flags that F_SETFL replaces.
        match unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } {
            0 => Ok(()),
            _ => Err(Error::last("fcntl")),
        }
    }

    /// Watches a region for missing pages.
    pub(crate) fn watch(&self, region: &Region) -> Result<()> {
        self.register(region, raw::UFFDIO_REGISTER_MODE_MISSING)
    }

    /// Watches a region for missing pages, and lets pages of it be write-protected.
    pub(crate) fn watch_writes_too(&self, region: &Region) -> Result<()> {
        self.register(region, raw::UFFDIO_REGISTER_MODE_MISSING | raw::UFFDIO_REGISTER_MODE_WP)
    }

    fn register(&self, region: &Region, mode: u32) -> Result<()> {
        let range = raw::uffdio_range { start: region.at(0) as u64, len: region.size() as u64 };
        let mut request = raw::uffdio_register { range, mode: mode.into(), ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER changes no contents, only who serves the faults of a region that is ours.
        match unsafe { self.ioctl(ioctl::UFFDIO_REGISTER as libc::Ioctl, &raw mut request) } {
            0 => Ok(()),
            errno => Err(Error::of("UFFDIO_REGISTER", errno)),
        }
    }

    /// Stops watching: whoever waits for a page of the range, or touches one later, reads zeros.
    pub(crate) fn unregister(&self, start: *mut u8, len: usize) {
        let mut range = raw::uffdio_range { start: start as u64, len: len as u64 };
        // SAFETY: as for registering. An error leaves the range watched, which the caller cannot better.
        unsafe { self.ioctl(ioctl::UFFDIO_UNREGISTER as libc::Ioctl, &raw mut range) };
    }

    /// Protects pages that are there from writing, or lifts that.
    pub(crate) fn protect(&self, start: *mut u8, len: usize, protected: bool) -> Result<()> {
        let mode = if protected { UFFDIO_WRITEPROTECT_MODE_WP } else { 0 };
        let mut request = raw::uffdio_writeprotect { range: raw::uffdio_range { start: start as u64, len: len as u64 }, mode };
        // SAFETY: protecting changes no contents, and only a range that this descriptor watches.
        match unsafe { self.ioctl(ioctl::UFFDIO_WRITEPROTECT as libc::Ioctl, &raw mut request) } {
            0 => Ok(()),
            errno => Err(Error::of("UFFDIO_WRITEPROTECT", errno)),
        }
    }

    /// Wakes who waits for a page.
    pub(crate) fn wake(&self, page: *mut u8) {
        let mut range = raw::uffdio_range { start: page as u64, len: PAGE as u64 };
        // SAFETY: waking changes no memory.
        unsafe { self.ioctl(ioctl::UFFDIO_WAKE as libc::Ioctl, &raw mut range) };
    }

    /// Moves pages without copying them, retrying as often as the kernel asks.
    ///
    /// # Safety
    /// Both ranges lie in live regions of this crate, `to` in one that this descriptor watches, and nobody relies on `from` keeping
    /// its contents.
    pub(crate) unsafe fn move_pages(&self, mut to: *mut u8, mut from: *mut u8, mut len: usize) -> core::result::Result<(), c_int> {
        while len > 0 {
            let mut request = raw::uffdio_move { dst: to as u64, src: from as u64, len: len as u64, mode: 0, move_: 0 };
            // SAFETY: by the contract.
            let done = match unsafe { self.ioctl(UFFDIO_MOVE, &raw mut request) } {
                0 => return Ok(()),
                libc::EAGAIN => usize::try_from(request.move_).unwrap_or(0).min(len),
                // Linux 6.18 does not count some of what it has moved, in earlier calls or in this very one, and then finds it in its own way. It has
                // woken nobody either.
                libc::EEXIST if is_there(to) && !is_there(from) => {
                    self.wake(to);
                    PAGE
                }
                errno => return Err(errno),
            };
            (to, from, len) = (to.wrapping_add(done), from.wrapping_add(done), len - done);
        }
        Ok(())
    }

    /// Moves a whole region onto another of the same size.
    pub(crate) fn move_region(&self, to: &Region, from: &Region) -> Result<()> {
        assert_eq!(to.size(), from.size(), "regions of one floor have one size");
        // SAFETY: both are live regions; if this descriptor does not watch `to`, the kernel answers with an error.
        unsafe { self.move_pages(to.at(0), from.at(0), to.size()) }.map_err(|errno| Error::of("UFFDIO_MOVE", errno))
    }

    /// Copies pages into place.
    ///
    /// # Safety
    /// Both ranges lie in live regions of this crate, `to` in one that this descriptor watches.
    pub(crate) unsafe fn copy(&self, to: *mut u8, from: *const u8, len: usize) -> core::result::Result<(), c_int> {
        let mut request = raw::uffdio_copy { dst: to as u64, src: from as u64, len: len as u64, mode: 0, copy: 0 };
        // SAFETY: by the contract.
        match unsafe { self.ioctl(ioctl::UFFDIO_COPY as libc::Ioctl, &raw mut request) } {
            0 => Ok(()),
            errno => Err(errno),
        }
    }

    /// Waits for a page fault and returns its address; `None` if the descriptor failed.
    pub(crate) fn next_fault(&self) -> Option<usize> {
        loop {
            match self.read_event() {
                Ok(Some(address)) => return Some(address),
                Ok(None) | Err(libc::EINTR) => {}
                Err(_) => return None,
            }
        }
    }

    /// The address of a page fault, if there is one; of a descriptor that [never waits](Self::never_wait).
    pub(crate) fn poll_fault(&self) -> Result<Option<usize>> {
        match self.read_event() {
            Err(libc::EAGAIN | libc::EINTR) => Ok(None),
            other => other.map_err(|errno| Error::of("reading the userfaultfd", errno)),
        }
    }

    /// Reads one event: its address if it is a page fault, or the errno.
    fn read_event(&self) -> core::result::Result<Option<usize>, c_int> {
        let mut message = MaybeUninit::<raw::uffd_msg>::uninit();
        let size = size_of::<raw::uffd_msg>();
        // SAFETY: `message` has room for `size` bytes.
        let got = unsafe { libc::read(self.fd.as_raw_fd(), message.as_mut_ptr().cast(), size) };
        if got < 0 {
            // SAFETY: errno of this thread.
            return Err(unsafe { *libc::__errno_location() });
        }
        if got != size as isize {
            return Err(libc::EIO);
        }
        // SAFETY: the kernel has written one whole message.
        let message = unsafe { message.assume_init() };
        if u32::from(message.event) != raw::UFFD_EVENT_PAGEFAULT {
            return Ok(None);
        }
        // SAFETY: the event says which member of the union holds.
        Ok(Some(unsafe { message.arg.pagefault.address } as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{BLOCK, Pages};

    /// The story: beside memory compaction the first call already answered EEXIST, for a page that it had moved itself.
    #[test]
    fn what_has_moved_uncounted_is_passed_over_and_what_is_in_the_way_is_not() {
        let uffd = match Uffd::open(false) {
            Ok(uffd) => uffd,
            Err(error) if error.is_missing_right() => return, // nothing moves here
            Err(error) => panic!("{error}"),
        };
        let (to, from) = (Region::empty(BLOCK, Pages::Small).unwrap(), Region::full(BLOCK, Pages::Small).unwrap());
        uffd.watch(&to).unwrap();
        // SAFETY: live regions, and nobody needs what is in them.
        let moves = |start: usize, len: usize| unsafe { uffd.move_pages(to.at(start), from.at(start), len) };
        moves(0, 3 * PAGE).unwrap();
        moves(5 * PAGE, PAGE).unwrap();
        assert_eq!(moves(0, 8 * PAGE), Ok(()));
        assert!((0..8).all(|page| is_there(to.at(page * PAGE)) && !is_there(from.at(page * PAGE))));
        // Something else is there already.
        // SAFETY: as above.
        unsafe { uffd.copy(to.at(8 * PAGE), from.at(9 * PAGE), PAGE) }.unwrap();
        assert_eq!(moves(7 * PAGE, 3 * PAGE), Err(libc::EEXIST));
        assert!(is_there(from.at(8 * PAGE)));
    }
}
