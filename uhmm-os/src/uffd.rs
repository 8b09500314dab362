//! userfaultfd (userfaultfd(2), ioctl_userfaultfd(2), the kernel's admin-guide/mm/userfaultfd): a thread of the process decides what
//! appears in a page that is touched while nothing, or something write-protected, is there.
//!
//! [`open`](Userfaultfd::open) and [`probe`] negotiate rights and features; everything else is one ioctl or one read, and is *Fault
//! path*. Rules:
//! * a descriptor never blocks: [`read`](Userfaultfd::read) returns 0 messages instead;
//! * errors are handed on as the kernel gave them, with what was done before them ([`Partial`]);
//! * `UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES` is not offered: against a concurrent madvise(MADV_DONTNEED) the call can spin in the kernel.
//!
//! Who uses it: `uhmm-core`, for the program's memory; drivers whose page table is made of it.
//!
//! ```no_run
//! use uhmm_os::PAGE;
//! use uhmm_os::mem::{self, Prot, Reserve};
//! use uhmm_os::uffd::{CopyMode, Event, Features, MsgBuf, RegisterMode, Rights, Userfaultfd, poll};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let uffd = Userfaultfd::open(Rights::UserModeOnly, Features::empty())?;
//! let memory = mem::map(&Reserve { hint: 0, len: PAGE, align: PAGE, name: c"example", prot: Prot::ReadWrite, exact: false })?;
//! uffd.register(memory.start(), memory.len(), RegisterMode::MISSING)?;
//!
//! let start = memory.start();
//! // SAFETY: the mapping lives until the thread has been joined.
//! let toucher = std::thread::spawn(move || unsafe { (start as *const u8).read() }); // waits
//! poll(&[uffd.as_fd()], None)?;
//! let mut messages = MsgBuf::new();
//! uffd.read(&mut messages)?;
//! for event in messages.events() {
//!     if let Event::Fault { address, .. } = event {
//!         let page = [7u8; PAGE];
//!         // SAFETY: the page is missing and ours.
//!         let copied = unsafe { uffd.copy(address & !(PAGE - 1), page.as_ptr() as usize, PAGE, CopyMode::empty()) };
//!         copied.map_err(|partial| partial.errno)?; // the toucher goes on
//!     }
//! }
//! assert_eq!(toucher.join().unwrap(), 7);
//! # Ok(())
//! # }
//! ```

mod event;
mod open;

pub use crate::wait::{EventFd, MAX_POLL, poll};
pub use event::{Event, Events, MsgBuf};
pub use open::{Features, OpenError, Rights, probe};

use crate::flush::Flush;
use crate::pagemap::Pagemap;
use crate::syscall::{abi, call, ioctl, iowr};
use crate::{Errno, tasks};
use bitflags::bitflags;
use core::fmt;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

const GROUP: u8 = 0xAA;
const REGISTER: u32 = linux_raw_sys::ioctl::UFFDIO_REGISTER;
const UNREGISTER: u32 = linux_raw_sys::ioctl::UFFDIO_UNREGISTER;
const WAKE: u32 = linux_raw_sys::ioctl::UFFDIO_WAKE;
const COPY: u32 = linux_raw_sys::ioctl::UFFDIO_COPY;
const ZEROPAGE: u32 = linux_raw_sys::ioctl::UFFDIO_ZEROPAGE;
const WRITEPROTECT: u32 = linux_raw_sys::ioctl::UFFDIO_WRITEPROTECT;
// The generated bindings hold these structures, but not their request numbers.
const MOVE: u32 = iowr::<abi::uffdio_move>(GROUP, abi::_UFFDIO_MOVE as u8);
const POISON: u32 = iowr::<abi::uffdio_poison>(GROUP, abi::_UFFDIO_POISON as u8);
const CONTINUE: u32 = iowr::<abi::uffdio_continue>(GROUP, abi::_UFFDIO_CONTINUE as u8);

bitflags! {
    /// What a registration reports.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RegisterMode: u64 {
        /// Touches of pages that are not there.
        const MISSING = abi::UFFDIO_REGISTER_MODE_MISSING as u64;
        /// Writes to pages that were write-protected with [`Userfaultfd::write_protect`].
        const WP = abi::UFFDIO_REGISTER_MODE_WP as u64;
        /// Touches of shared pages that are in the page cache, but not mapped.
        const MINOR = abi::UFFDIO_REGISTER_MODE_MINOR as u64;
    }

    /// How [`Userfaultfd::copy`] goes.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CopyMode: u64 {
        /// Do not wake the threads that wait for the pages.
        const DONTWAKE = abi::UFFDIO_COPY_MODE_DONTWAKE as u64;
        /// Let the pages arrive write-protected (needs a registration with [`RegisterMode::WP`]).
        const WP = abi::UFFDIO_COPY_MODE_WP as u64;
    }

    /// How [`Userfaultfd::move_pages`] goes.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct MoveMode: u64 {
        /// Do not wake the threads that wait for the pages.
        const DONTWAKE = 1; // UFFDIO_MOVE_MODE_DONTWAKE, not in the generated bindings
    }
}

/// An operation that stopped on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partial {
    /// Bytes that were done, from the start.
    pub done: usize,
    /// Why it stopped. `EAGAIN` after progress (`done > 0`) says nothing: going on from there shows the real reason.
    pub errno: Errno,
}

impl fmt::Display for Partial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stopped after {} bytes: {}", self.done, self.errno)
    }
}

impl std::error::Error for Partial {}

/// The kernel's count field: bytes done, or a negative error number, or untouched (0) where it stopped before it looked.
fn partial(result: Result<usize, Errno>, count: i64) -> Result<(), Partial> {
    result.map(|_| ()).map_err(|errno| Partial { done: count.max(0) as usize, errno })
}

/// The one unsigned word that the ioctls want.
fn range(start: usize, len: usize) -> abi::uffdio_range {
    abi::uffdio_range { start: start as u64, len: len as u64 }
}

/// A userfaultfd of this process; non-blocking, closed on exec.
///
/// Addresses and lengths must be multiples of [`PAGE`](crate::PAGE) (`EINVAL`), except where it says otherwise. Every ioctl answers
/// `EBADF` on a thread whose descriptor table does not hold the descriptor.
///
/// When the last descriptor closes, all registrations end and missing pages read as zeros.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
    /// With [`Features::MOVE`] only.
    moves: Option<Moves>,
}

/// What it takes to see how far a move came, and to end it as the kernel should have.
#[derive(Debug)]
struct Moves {
    pagemap: Pagemap,
    flush: Flush,
}

impl Userfaultfd {
    /// A descriptor that watches nothing, where there is no userfaultfd: it never has a message, and every ioctl answers `ENOTTY`.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn none() -> Result<Self, Errno> {
        let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK)?;
        Ok(Userfaultfd { fd, moves: None })
    }

    /// Takes over the descriptor of an [`Event::Fork`]: the child's userfaultfd, with the parent's features and registrations.
    ///
    /// # Safety
    /// `fd` must be such a descriptor, open, and owned by nobody else.
    pub unsafe fn from_fork(fd: RawFd) -> Self {
        // SAFETY: the caller's promise.
        Userfaultfd { fd: unsafe { OwnedFd::from_raw_fd(fd) }, moves: None }
    }

    /// Watches a range. *Fault path.*
    ///
    /// # Errors
    /// `EBUSY`: another userfaultfd watches part of it; `EINVAL`: part of it is not mapped, or of a kind that cannot be watched, or
    /// the mode needs a feature; `EPERM`: a shared mapping of a file that the process may not write; `ENOMEM`: too many mappings
    /// (each registered range splits its mapping).
    pub fn register(&self, start: usize, len: usize, mode: RegisterMode) -> Result<(), Errno> {
        let mut arg = abi::uffdio_register { range: range(start, len), mode: mode.bits(), ioctls: 0 };
        // SAFETY: registering changes no byte of memory; the kernel checks the range.
        unsafe { ioctl(self.as_fd(), REGISTER, &mut arg) }.map(|_| ())
    }

    /// Ends the watch on a range and wakes all who wait in it: missing pages read as zeros from now on. *Fault path.*
    ///
    /// # Errors
    /// `EINVAL`: part of the range is not mapped, or of a kind that cannot be watched, or (newer kernels) watched by another
    /// userfaultfd.
    pub fn unregister(&self, start: usize, len: usize) -> Result<(), Errno> {
        let mut arg = range(start, len);
        // SAFETY: only ends what `register` began; the kernel checks the range.
        unsafe { ioctl(self.as_fd(), UNREGISTER, &mut arg) }.map(|_| ())
    }

    /// Allocates pages at `dst`, fills them from `src` (any alignment) and maps them, atomically for the threads that wait for
    /// them. *Fault path.*
    ///
    /// # Errors
    /// In [`Partial`]: `EEXIST`: a page is there; `ENOENT`: the range went away or is not registered; `EAGAIN`: a mapping event is
    /// unread, or stopped after progress; `EFAULT`: `src` cannot be read; `ESRCH`: the process is exiting.
    ///
    /// # Safety
    /// The program must expect the bytes of `src` at `dst`; the kernel reads `src` while other threads may write it.
    pub unsafe fn copy(&self, dst: usize, src: usize, len: usize, mode: CopyMode) -> Result<(), Partial> {
        let mut arg = abi::uffdio_copy { dst: dst as u64, src: src as u64, len: len as u64, mode: mode.bits(), copy: 0 };
        // SAFETY: the kernel checks both ranges; the caller vouches for the contents.
        let result = unsafe { ioctl(self.as_fd(), COPY, &mut arg) };
        partial(result, arg.copy)
    }

    /// Moves the pages themselves from `src` to `dst`: nothing is copied, `src` is empty afterwards, each page goes over
    /// atomically and arrives writable. *Fault path.* Linux 6.8.
    ///
    /// Only `dst` needs to be registered, with this descriptor. Both must be private anonymous memory with equal permissions. A page that is at `dst` and not at
    /// `src` counts as moved.
    ///
    /// ```no_run
    /// use uhmm_os::PAGE;
    /// use uhmm_os::mem::{self, Prot, Reserve};
    /// use uhmm_os::uffd::{Features, MoveMode, RegisterMode, Rights, Userfaultfd};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let uffd = Userfaultfd::open(Rights::UserModeOnly, Features::MOVE)?;
    /// let map = |name| mem::map(&Reserve { hint: 0, len: PAGE, align: PAGE, name, prot: Prot::ReadWrite, exact: false });
    /// let (from, to) = (map(c"from")?, map(c"to")?);
    /// uffd.register(to.start(), PAGE, RegisterMode::MISSING)?;
    /// // SAFETY: both are ours.
    /// unsafe {
    ///     from.as_ptr().write(7);
    ///     uffd.move_pages(to.start(), from.start(), PAGE, MoveMode::empty()).map_err(|partial| partial.errno)?;
    ///     assert_eq!((to.as_ptr().read(), from.as_ptr().read()), (7, 0));
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// In [`Partial`]: `EAGAIN`: a mapping event is unread (it never succeeds before that is read), or stopped after progress;
    /// `EEXIST`: something is at `dst`; `ENOENT`: nothing at `src`, or `dst` is not registered; `EBUSY`: the page is pinned or
    /// shared with a child; `EINVAL`: not private anonymous, not writable, unequally locked; `ESRCH`: the process is exiting.
    ///
    /// # Safety
    /// Nobody may rely on the bytes at `src` from now on.
    pub unsafe fn move_pages(&self, dst: usize, src: usize, len: usize, mode: MoveMode) -> Result<(), Partial> {
        let mut arg = abi::uffdio_move { dst: dst as u64, src: src as u64, len: len as u64, mode: mode.bits(), move_: 0 };
        // SAFETY: the kernel checks both ranges; the caller gives the source up.
        let result = unsafe { ioctl(self.as_fd(), MOVE, &mut arg) };
        let Err(counted) = partial(result, arg.move_) else { return Ok(()) };
        self.really_moved(dst, src, len, mode, counted)
    }

    /// How far a move came that ended early.
    ///
    /// Linux 6.18 does not count some of the pages that it has moved when it had to wait for one that was locked (by memory compaction, say). It wakes nobody who
    /// waits for them, and other cores may go on using their old addresses. What has moved is at the destination, and not at the source.
    fn really_moved(&self, dst: usize, src: usize, len: usize, mode: MoveMode, counted: Partial) -> Result<(), Partial> {
        let Some(Moves { pagemap, flush }) = &self.moves else { return Err(counted) };
        let (to, from, rest) = (dst + counted.done, src + counted.done, len.saturating_sub(counted.done));
        let more = pagemap.present_from(to, to + rest).min(pagemap.absent_from(from, from + rest));
        if more == 0 {
            return Err(counted);
        }
        // Through a translation that lasts, another core goes on writing to a page that is somewhere else by now. Neither can that be told to who asked for the
        // move, for it has happened, nor be left to some later flush. `Flush` has all that it needs; what remains is a process that may not call mprotect.
        if flush.all().is_err() {
            tasks::write_stderr(b"uhmm: old translations of pages that were moved cannot be flushed; stopping before data is lost\n");
            std::process::abort();
        }
        if !mode.contains(MoveMode::DONTWAKE) {
            let _ = self.wake(to, more);
        }
        // The error may be about a page that has moved.
        if more == rest { Ok(()) } else { Err(Partial { done: counted.done + more, errno: Errno::AGAIN }) }
    }

    /// Maps the zero page in a range of missing pages and wakes those who wait. *Fault path.*
    ///
    /// # Errors
    /// In [`Partial`], as [`copy`](Self::copy).
    pub fn zeropage(&self, start: usize, len: usize) -> Result<(), Partial> {
        let mut arg = abi::uffdio_zeropage { range: range(start, len), mode: 0, zeropage: 0 };
        // SAFETY: only pages that are missing appear, as zeros, which is what a missing page of such a mapping holds.
        let result = unsafe { ioctl(self.as_fd(), ZEROPAGE, &mut arg) };
        partial(result, arg.zeropage)
    }

    /// Write-protects a range, or lifts that and wakes those who wait to write. *Fault path.*
    ///
    /// # Errors
    /// `ENOENT`: part of the range is not registered with [`RegisterMode::WP`]; `EAGAIN`: a mapping event is unread.
    ///
    /// # Safety
    /// Somebody must answer the faults of a protected range, and system calls that write there must be expected to fail where the
    /// descriptor handles no kernel faults. Lifting the protection lets writes through that its owner will not see.
    pub unsafe fn write_protect(&self, start: usize, len: usize, protect: bool) -> Result<(), Errno> {
        let mode = u64::from(protect); // UFFDIO_WRITEPROTECT_MODE_WP, not in the generated bindings
        let mut arg = abi::uffdio_writeprotect { range: range(start, len), mode };
        // SAFETY: the kernel checks the range; the caller vouches for the effect.
        unsafe { ioctl(self.as_fd(), WRITEPROTECT, &mut arg) }.map(|_| ())
    }

    /// Marks missing pages as lost: a touch raises SIGBUS, as for a hardware memory error. *Fault path.* Linux 6.6.
    ///
    /// # Errors
    /// In [`Partial`], as [`copy`](Self::copy).
    pub fn poison(&self, start: usize, len: usize) -> Result<(), Partial> {
        let mut arg = abi::uffdio_poison { range: range(start, len), mode: 0, updated: 0 };
        // SAFETY: only pages that are missing change; what was there cannot be read through this process any more anyway.
        let result = unsafe { ioctl(self.as_fd(), POISON, &mut arg) };
        partial(result, arg.updated)
    }

    /// Wakes the threads that wait in a range; they try again. *Fault path.*
    ///
    /// # Errors
    /// `EINVAL` for a range that is not page-aligned or empty.
    pub fn wake(&self, start: usize, len: usize) -> Result<(), Errno> {
        let mut arg = range(start, len);
        // SAFETY: waking changes no memory.
        unsafe { ioctl(self.as_fd(), WAKE, &mut arg) }.map(|_| ())
    }

    /// Whether a mapping event (fork, mremap, munmap, madvise) waits to be read. *Fault path.*
    ///
    /// The caller of munmap and the like waits until its event has been read, while every move and copy is refused.
    pub fn event_pending(&self) -> bool {
        // An empty move is never carried out, but the kernel looks for pending events before it looks at the length: EAGAIN against
        // EINVAL.
        let mut arg = abi::uffdio_move { dst: 0, src: 0, len: 0, mode: 0, move_: 0 };
        // SAFETY: a move of no bytes.
        let answer = unsafe { ioctl(self.as_fd(), MOVE, &mut arg) };
        answer == Err(Errno::AGAIN)
    }

    /// Whether a page of private anonymous memory lies in a registered range, this descriptor's or another's. *Fault path.* Linux 5.13.
    ///
    /// # Errors
    /// `EAGAIN`: a mapping event is unread; `EINVAL` for an address that is not page-aligned.
    pub fn watches(&self, at: usize) -> Result<bool, Errno> {
        // UFFDIO_CONTINUE is for shared memory. The kernel looks for a registered range first (ENOENT), and then at the kind of memory (EINVAL).
        let mut arg = abi::uffdio_continue { range: range(at, crate::PAGE), mode: 0, mapped: 0 };
        if !at.is_multiple_of(crate::PAGE) {
            return Err(Errno::INVAL);
        }
        // SAFETY: it is refused for private memory; in shared memory it would map a page that is in the file.
        match unsafe { ioctl(self.as_fd(), CONTINUE, &mut arg) } {
            Ok(_) | Err(Errno::INVAL) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Reads the messages that are there, at most [`MsgBuf::CAPACITY`], and returns how many; 0 if there is none. *Fault path.*
    ///
    /// # Errors
    /// Those of read(2).
    pub fn read(&self, buffer: &mut MsgBuf) -> Result<usize, Errno> {
        buffer.clear();
        let (at, len) = buffer.space();
        // SAFETY: the buffer is valid for writes of `len` bytes.
        match unsafe { call(abi::__NR_read, [self.as_raw_fd() as usize, at as usize, len]) } {
            Ok(bytes) => Ok(buffer.set_bytes(bytes)),
            Err(Errno::AGAIN) => Ok(0),
            Err(e) => Err(e),
        }
    }

    /// The descriptor, to poll.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The descriptor's number.
    pub fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE;

    #[test]
    fn request_numbers() {
        // From the kernel's userfaultfd.h: the numbers are part of its interface and do not change.
        assert_eq!(MOVE, 0xC028_AA05);
        assert_eq!(POISON, 0xC020_AA08);
        assert_eq!(CONTINUE, 0xC020_AA07);
    }

    /// The story: under memory compaction Linux 6.18 answered EAGAIN with a count of 0 to a move that had moved everything. Whoever believed it took the pages
    /// for lost, and gave their new place to something else.
    #[test]
    fn what_was_moved_is_looked_at_and_not_believed() {
        let Ok(uffd) = Userfaultfd::open(Rights::UserModeOnly, Features::MOVE) else { return }; // nothing moves here
        let reserve = crate::mem::Reserve {
            hint: 0,
            len: 16 * PAGE,
            align: PAGE,
            name: c"uhmm-os-test",
            prot: crate::mem::Prot::ReadWrite,
            exact: false,
        };
        let memory = crate::mem::map(&reserve).unwrap();
        // SAFETY: memory of the test's own.
        unsafe { crate::mem::madvise(memory.start(), memory.len(), crate::mem::Advice::NoHugepage) }.unwrap();
        let (src, dst) = (memory.start(), memory.start() + 8 * PAGE);
        for page in 0..8 {
            // SAFETY: memory of the test's own.
            unsafe { ((src + page * PAGE) as *mut u8).write(1) };
        }
        uffd.register(dst, 8 * PAGE, RegisterMode::MISSING).unwrap();
        let look = |counted, pages: usize| {
            let counted = Partial { done: counted * PAGE, errno: Errno::EXIST };
            uffd.really_moved(dst, src, pages * PAGE, MoveMode::empty(), counted).map_err(|left| {
                assert_eq!(left.errno == Errno::AGAIN, left != counted, "the error is of a page that has moved");
                left.done / PAGE
            })
        };
        assert_eq!((look(0, 8), look(0, 1)), (Err(0), Err(0)));
        // SAFETY: nobody relies on the source.
        unsafe { uffd.move_pages(dst, src, 5 * PAGE, MoveMode::empty()) }.unwrap();
        assert_eq!((look(0, 8), look(2, 8), look(5, 8)), (Err(5), Err(5), Err(5)));
        assert_eq!((look(0, 5), look(4, 5)), (Ok(()), Ok(())));
        // Both there: somebody filled the destination, and nothing was moved.
        uffd.zeropage(dst + 5 * PAGE, PAGE).unwrap();
        assert_eq!((look(0, 8), look(5, 6)), (Err(5), Err(5)));
        uffd.unregister(dst, 8 * PAGE).unwrap();
    }

    #[test]
    fn counts_become_progress() {
        assert_eq!(partial(Ok(0), 4096), Ok(()));
        assert_eq!(partial(Err(Errno::AGAIN), 4096), Err(Partial { done: 4096, errno: Errno::AGAIN }));
        assert_eq!(partial(Err(Errno::EXIST), -17), Err(Partial { done: 0, errno: Errno::EXIST }));
    }
}
