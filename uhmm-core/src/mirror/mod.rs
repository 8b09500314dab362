//! Mirroring without migration: a device that has no memory of its own uses the process's where it is.
//!
//! A [`Mirror`] watches a range of the process. [`Mirror::range_fault`] tells what a device may do with each page and faults in what it wants;
//! [`Mirror::snapshot`] only tells. A [`Notifier`] hears of every change of the mappings in the range, with its [`Reason`], and acknowledges it by returning. The way
//! to use what was looked up without ever acting on what is no longer so is the kernel's (`hmm_range_fault`, `mmu_interval_notifier`):
//!
//! ```text
//! loop {
//!     pages = mirror.range_fault(range, &Request::write(), budget)?;   // contains seq = read_begin()
//!     take the device's lock;
//!     if mirror.read_retry(pages.seq) { release it; continue }
//!     enter the pages into the device's page table;
//!     release it; break
//! }
//! ```
//!
//! [`PageTable`] is such a page table, for devices that a program models; [`Mirror::enter`] is the second half of that loop.
//!
//! # What is announced, and when
//!
//! Of private anonymous memory that no other userfaultfd watches:
//!
//! | change | reason | announced |
//! |---|---|---|
//! | through [`change`] | as it is called | acknowledged before it happens |
//! | `MADV_DONTNEED`, `MADV_FREE`, `MADV_REMOVE` | [`Discard`](Reason::Discard) | before the kernel drops anything, no access through an old entry counts any more |
//! | `munmap`, `mmap` over it, `brk` and `mremap` that shrink | [`Unmap`](Reason::Unmap) | when it has happened and before the call returns |
//! | `mremap` that moves | [`Remap`](Reason::Remap) | when it has happened and before the call returns |
//! | migration to a device and back | [`Migrate`](Reason::Migrate) | acknowledged before it happens |
//! | `fork` of the C library | [`Fork`](Reason::Fork) | acknowledged before it happens, and where the kernel reports forks once more when it has |
//! | `clone`, `_Fork` | [`Fork`](Reason::Fork) | where the kernel reports them (full mode with `CAP_SYS_PTRACE`), when it has happened and before the call returns |
//! | `mprotect` | | never: an access that the protection forbids fails, and asking for the page says why |
//! | a page gets another place in memory, or goes to swap | | never: entries name no place |
//!
//! "Before the call returns" means: the call returns when the monitor has read its event, and from that moment on no access through [`Mirror::read`] or
//! [`Mirror::write`] counts or begins that uses an old entry; the notifier is called right after, maybe a moment after the call has returned. Until then an access goes to whatever is mapped at
//! the address by now, as one of another thread would: who must exclude that uses [`change`], or asks [`Mirror::read_retry_begun`].
//!
//! Of shared and file memory, and of what another userfaultfd watches, only what is made through [`change`] is announced. Entries say so
//! ([`Entry::is_watched`]).
//!
//! # Modes
//! Full and user-mode-only differ in forks only. Without userfaultfd nothing could be announced: [`CoreRef::mirror`] is refused.
//!
//! # Costs
//! A mirror has a thread, which waits for questions. What it has looked at is registered with the program's userfaultfd: about 10 us and up to two mappings for each
//! mapping looked at; from then on `munmap`, `mremap` and `madvise` there wait for the monitor, some 10 us. Reading through a [`PageTable`] makes no system call.
//!
//! # Example
//!
//! A device with a [`PageTable`] reads: a miss is its device fault, which looks the page up and enters it.
//!
//! ```
//! use core::time::Duration;
//! use uhmm_core::mirror::{Fault, HasTable, Mirror, Request};
//!
//! fn read<N: HasTable>(mirror: &Mirror<N>, at: usize, to: &mut [u8]) -> Result<(), Fault> {
//!     while let Err(_miss) = mirror.read(at, to) {
//!         let pages = mirror.range_fault(at..at + to.len(), &Request::read(), Duration::from_secs(1))?;
//!         mirror.enter(&pages); // or the pages have changed since: then the read misses again
//!     }
//!     Ok(())
//! }
//! ```
//!
//! `uhmm/examples/mirror_only.rs` is a whole program. Who uses it: programs that model a device, and runtimes of devices that have no memory of their own.
#![allow(unsafe_code)] // notifiers behind pointers, and the accesses themselves

pub mod change;
mod entry;
pub(crate) mod registry;
mod table;
mod walk;

pub use crate::page::Span;
pub use entry::{Entry, Fault, Pages, Request, Want};
pub use table::{HasTable, Miss, PageTable};

use crate::core::Core;
use crate::desk::Desk;
use crate::error::Error;
use crate::mode::Mode;
use crate::own::{self, OwnBox};
use crate::page::Va;
use crate::process::{self, CoreRef};
use crate::sync::*;
use core::mem::ManuallyDrop;
use core::ops::Range;
use registry::Watch;
use std::time::Duration;
use uhmm_os::thread::{self, Thread};
use uhmm_os::{BLOCK, Errno, PAGE, copy};
use walk::Job;

/// Bytes of the stack of a mirror's thread.
const STACK: usize = 256 << 10;
/// How often an unread event is waited for.
const LOOKS: u32 = 1000;
/// The most bytes that are handed to a mirror's thread at once.
const PIECE: usize = 2048;

/// Why entries are no longer so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Reason {
    /// The mapping is gone, or another one takes its place.
    Unmap,
    /// The pages are somewhere else now.
    Remap {
        /// Where the first page of the span is.
        to: Va,
    },
    /// The contents are dropped.
    Discard,
    /// What may be done there changes.
    Protect,
    /// A page leaves for a device, or is about to; or comes home from one.
    Migrate {
        /// The device that it goes to ([`DeviceRef::id`](crate::DeviceRef::id)); `None` if it comes home, or may go somewhere.
        to: Option<u32>,
    },
    /// The process is forked: pages are shared copy-on-write with the child.
    Fork,
    /// The mirror ends.
    Release,
}

impl Reason {
    /// The same, for a part of what is changed.
    fn of_part(self, all: Span, part: Span) -> Self {
        match self {
            Reason::Remap { to } => Reason::Remap { to: to.wrapping_add(part.start - all.start) },
            reason => reason,
        }
    }
}

/// What hears of changes in a mirrored range: an interval notifier.
///
/// It is called on threads that the program's page faults wait for (the monitor, above all), with uhmm's locks held. So [`invalidate`](Self::invalidate)
/// * may touch what lies inside the notifier itself, which is moved to memory that never migrates, a [`PageTable`], and the device; nothing else: not the heap (also
///   not through a pointer of its own), not statics without initial value, not thread-locals, nothing mirrored;
/// * makes no call of uhmm, and none that changes mappings;
/// * waits for nothing but the device, and for that not long: the program's changes of mappings wait meanwhile;
/// * does not panic: the process would be aborted.
///
/// Atomics and device registers are fine. The standard library's locks are not, for they look at thread-local variables.
pub trait Notifier: Send + Sync + 'static {
    /// The device must not use what it knows of these pages, all of the mirrored range, any more. When this returns it does not: the page may change.
    fn invalidate(&self, span: Span, reason: Reason);
}

/// What of a mirror does not depend on the type of its notifier.
struct Head {
    core: *const Core,
    watch: Watch,
    desk: Desk,
}

struct Inner<N> {
    head: Head,
    notifier: N,
}

/// A watched range of the process. It ends with this value: the notifier is told ([`Reason::Release`]) and dropped.
///
/// The range is one of addresses, whatever is mapped there, now or later.
pub struct Mirror<N: Notifier> {
    inner: ManuallyDrop<OwnBox<Inner<N>>>,
    thread: ManuallyDrop<Thread>,
    hold: CoreRef,
}

// SAFETY: the pointer in the head is to the core, which is Sync and which `hold` keeps; the notifier is Send and Sync.
unsafe impl<N: Notifier> Send for Mirror<N> {}
// SAFETY: as above.
unsafe impl<N: Notifier> Sync for Mirror<N> {}

impl<N: Notifier> core::fmt::Debug for Mirror<N> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Mirror").field("span", &self.span()).finish_non_exhaustive()
    }
}

impl CoreRef {
    /// Mirrors the pages that a range of addresses touches. Nothing is watched or looked at yet.
    ///
    /// ```
    /// use core::time::Duration;
    /// use uhmm_core::mirror::PageTable;
    /// use uhmm_core::{CoreRef, Error};
    ///
    /// fn watch(core: &CoreRef, data: &[u8]) -> Result<(), Error> {
    ///     let range = data.as_ptr() as usize..data.as_ptr() as usize + data.len();
    ///     let mirror = core.mirror(range.clone(), PageTable::new(range.clone())?)?;
    ///     if let Ok(pages) = mirror.snapshot(range.clone(), Duration::from_secs(1)) {
    ///         let there = pages.at(range.start).is_some_and(|entry| entry.is_mapped()); // is not faulted in by that
    ///         println!("its first page is there: {there}");
    ///     }
    ///     Ok(())
    /// }
    /// ```
    ///
    /// # Errors
    /// [`Error::Mirror`] in the mode without userfaultfd, for an empty range, and if there are 2^20 already; [`Error::System`] if a thread or address space is
    /// refused.
    pub fn mirror<N: Notifier>(&self, range: Range<Va>, notifier: N) -> Result<Mirror<N>, Error> {
        let core = self.core();
        if core.space.mode == Mode::None {
            return Err(Error::Mirror { why: "there is no userfaultfd to tell of changes (see `uhmm doctor`)" });
        }
        if range.is_empty() || range.end > 1 << 47 {
            return Err(Error::Mirror { why: "the range is empty, or reaches beyond the address space" });
        }
        let span = Span::touching(range.start, range.end);
        if !span.and(own::PLACE).is_empty() {
            return Err(Error::Mirror { why: "the range holds addresses of uhmm's own memory (0x200000000000 to 0x2fffffffffff)" });
        }
        self.mirror_span(span, notifier)
    }

    /// Mirrors whole pages, in a process with userfaultfd. Who asks keeps off uhmm's own memory.
    pub(crate) fn mirror_span<N: Notifier>(&self, span: Span, notifier: N) -> Result<Mirror<N>, Error> {
        let reserve = |e| Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e);
        let core = self.core();
        let head =
            Head { core: core::ptr::from_ref(core), watch: Watch { span, seq: AtomicU64::new(0) }, desk: Desk::new().map_err(reserve)? };
        let hold = CoreRef::get()?;
        let inner = OwnBox::new(c"uhmm mirror", Inner { head, notifier }).map_err(reserve)?;
        let at = &raw const *inner as usize;
        let started = process::lock()?.ask_keeper(move |core: &Core| {
            let inner = at as *const Inner<N>;
            // SAFETY: the box is there, and its thread is joined before it goes.
            let (head, notifier) = unsafe { (&raw const (*inner).head, &raw const (*inner).notifier) };
            // SAFETY: as above; `end` removes it first.
            unsafe { core.space.mirrors.add(&raw const (*head).watch, notifier) }.map_err(|e| match e {
                Errno::MFILE => Error::Mirror { why: "there are 1048576 mirrors already" },
                e => reserve(e),
            })?;
            // SAFETY: as above.
            unsafe { own::spawn(c"uhmm-mirror", STACK, serve, head.cast_mut().cast()) }.map_err(|e| {
                // SAFETY: the box is there.
                core.space.mirrors.remove(unsafe { &raw const (*head).watch });
                Error::System("start a thread", e)
            })
        });
        let thread = started.unwrap_or(Err(Error::System("reach the keeper", Errno::SRCH)))?;
        Ok(Mirror { inner: ManuallyDrop::new(inner), thread: ManuallyDrop::new(thread), hold })
    }
}

/// A mirror's thread.
///
/// # Safety
/// The argument is a `&Head` that outlives the thread, and so does its core.
unsafe extern "C" fn serve(head: *mut ()) {
    // SAFETY: by the contract.
    let head = unsafe { &*head.cast::<Head>() };
    // SAFETY: by the contract.
    head.desk.serve(unsafe { &*head.core });
}

impl<N: Notifier> Mirror<N> {
    /// The notifier.
    ///
    /// # Panics
    /// As every function of a mirror in a forked child, which has no mirror: its uhmm is to be opened again.
    pub fn notifier(&self) -> &N {
        &self.inner().notifier
    }

    /// The mirrored pages.
    pub fn span(&self) -> Span {
        self.inner().head.watch.span
    }

    fn core(&self) -> &Core {
        self.hold.core()
    }

    /// What is not in a forked child: neither the memory nor the thread.
    fn inner(&self) -> &Inner<N> {
        self.core();
        &self.inner
    }

    pub(crate) fn ask<R: Send>(&self, job: impl FnOnce(&Core) -> R + Send) -> Option<R> {
        // SAFETY: the thread serves with the core.
        unsafe { self.inner().head.desk.ask(job) }
    }

    /// The number to compare later. Waits while the monitor follows a change.
    ///
    /// ```
    /// use uhmm_core::mirror::{HasTable, Mirror};
    ///
    /// /// What `look` sees of the range at one moment.
    /// fn at_one_moment<N: HasTable, T>(mirror: &Mirror<N>, mut look: impl FnMut() -> T) -> T {
    ///     loop {
    ///         let seq = mirror.read_begin();
    ///         let seen = look(); // may be the device's whole computation
    ///         if !mirror.read_retry_begun(seq) {
    ///             return seen;
    ///         }
    ///     }
    /// }
    /// ```
    pub fn read_begin(&self) -> u64 {
        self.core().space.mirrors.epoch();
        self.inner().head.watch.seq.load(Ordering::SeqCst)
    }

    /// Whether anything of the range was invalidated since [`read_begin`](Self::read_begin), or since the look that gave `seq`: what was looked up then must not
    /// be used. Of a change made by a system call it says so from the call's return on at the latest.
    ///
    /// It takes two loads, and waits while the monitor follows a change. A device with a lock of its own asks with the lock held, which its notifier takes too.
    pub fn read_retry(&self, seq: u64) -> bool {
        self.core().space.mirrors.epoch();
        self.inner().head.watch.seq.load(Ordering::SeqCst) != seq
    }

    /// As [`read_retry`](Self::read_retry), but also for a change that has begun and not returned: whatever the answer is about was done before any change that is
    /// announced. Asks a thread, some 20 us.
    pub fn read_retry_begun(&self, seq: u64) -> bool {
        let settled = self.ask(|core| {
            // The kernel says that an event is unread from before the mapping changes.
            let settled = (0..LOOKS).any(|times| {
                let read = !core.space.uffd.event_pending();
                if !read {
                    thread::pause(times);
                }
                read
            });
            drop(core.space.hold());
            settled
        });
        settled != Some(true) || self.read_retry(seq)
    }

    /// Looks what a device may do with each page of a range, and faults in what is wanted: as a touch by the CPU would, but that a page which cannot be had is an
    /// error. Nothing migrates to a device.
    ///
    /// If something in the mirrored range is invalidated meanwhile it looks again, until `budget` has passed (it looks once at least). The entries of all pages hold
    /// at the same time, the one when the call ends, unless [`read_retry`](Self::read_retry) says otherwise.
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn range_fault(&self, range: Range<Va>, request: &Request<'_>, budget: Duration) -> Result<Pages, Fault> {
        self.look(range, *request, budget)
    }

    /// Looks what is there, without faulting or changing anything: as [`range_fault`](Self::range_fault) of nothing. Also holes are no error, their entries are
    /// not [mapped](Entry::is_mapped).
    ///
    /// # Errors
    /// [`Fault::Busy`], [`Fault::Range`], [`Fault::System`].
    pub fn snapshot(&self, range: Range<Va>, budget: Duration) -> Result<Pages, Fault> {
        self.look(range, Request { default: Want::Nothing, each: &[], leave: true, own: 0, wait: true }, budget)
    }

    /// As [`snapshot`](Self::snapshot), for a port.
    pub(crate) fn snapshot_for_port(&self, range: Range<Va>, number: u8, budget: Duration) -> Result<Pages, Fault> {
        self.look(range, Request { default: Want::Nothing, each: &[], leave: true, own: number, wait: true }, budget)
    }

    fn look(&self, range: Range<Va>, request: Request<'_>, budget: Duration) -> Result<Pages, Fault> {
        let bad = Fault::Range { start: range.start, end: range.end };
        let span = Span { start: range.start, end: range.end };
        if span.is_empty() || !(range.start | range.end).is_multiple_of(PAGE) || span.and(self.span()) != span {
            return Err(bad);
        }
        if self.core().has_worker(thread::gettid()) {
            return Err(Fault::Reentrant);
        }
        let mut entries = vec![Entry::default(); span.len() / PAGE];
        let out = &mut entries[..];
        let watch = &self.inner().head.watch;
        let asked = self.ask(move |core| Job { core, watch, span, request }.run(out, budget));
        let (seq, rounds) = asked.unwrap_or(Err(Fault::System(Errno::SRCH)))?;
        Ok(Pages { span, seq, rounds, entries })
    }
}

impl<N: HasTable> Mirror<N> {
    /// Enters pages that were looked up into the device's page table: those that may be read or written. False if they were invalidated since (some may be entered,
    /// as far as they are valid): look again.
    pub fn enter(&self, pages: &Pages) -> bool {
        let seq = &self.inner().head.watch.seq;
        self.notifier().table().enter(pages, || seq.load(Ordering::SeqCst) == pages.seq)
    }

    /// The device reads bytes where they are in the process. They are those of a moment at which the entries allowed it.
    ///
    /// # Errors
    /// [`Miss`] at the first page without such an entry, also if it is invalidated meanwhile; `to` has undefined contents then.
    pub fn read(&self, from: Va, to: &mut [u8]) -> Result<(), Miss> {
        let (table, mirrors) = (self.notifier().table(), &self.core().space.mirrors);
        let mut done = 0;
        while done < to.len() {
            let at = from.wrapping_add(done);
            let len = (PAGE - at % PAGE).min(to.len() - done);
            let miss = Miss { address: at, write: false };
            let word = table.word(at).filter(|word| word & usize::from(Entry::READ) != 0).ok_or(miss)?;
            // SAFETY: what cannot be read is an error, not a crash; the destination is borrowed exclusively.
            let copied = unsafe { copy::guarded(to[done..].as_mut_ptr(), at as *const u8, len) };
            fence(Ordering::SeqCst);
            if copied.is_err() {
                table.refute(at, word);
                return Err(miss);
            }
            // What was read of events until now is followed: of a change that comes later the bytes are from before it.
            mirrors.epoch();
            if table.word(at) != Some(word) {
                return Err(miss);
            }
            done += len;
        }
        Ok(())
    }

    /// The device writes bytes where they are in the process. No change of a [watched](Entry::is_watched) page happens, or returns, between the look at the entry and the write.
    ///
    /// It is made by the mirror's thread, some 20 us for 2 KiB.
    ///
    /// # Errors
    /// [`Miss`] at the first page without an entry that allows it; bytes before it are written.
    ///
    /// # Safety
    /// As writing by a pointer: what is there may be written by this, and nobody minds that it changes; other threads use it as memory that is shared.
    pub unsafe fn write(&self, to: Va, bytes: &[u8]) -> Result<(), Miss> {
        let mut done = 0;
        while done < bytes.len() {
            let at = to.wrapping_add(done);
            let len = (PAGE - at % PAGE).min(bytes.len() - done).min(PIECE);
            let mut piece = [0u8; PIECE];
            piece[..len].copy_from_slice(&bytes[done..done + len]);
            let table = self.notifier().table();
            // SAFETY: the caller's promise, for a page that the entry names.
            let written = self.ask(move |core| unsafe { write_page(core, table, at, &piece[..len]) });
            if written != Some(true) {
                return Err(Miss { address: at, write: true });
            }
            done += len;
        }
        Ok(())
    }
}

/// Writes bytes of one page, if its entry allows it. On a mirror's thread.
///
/// # Safety
/// As [`Mirror::write`].
unsafe fn write_page(core: &Core, table: &PageTable, at: Va, bytes: &[u8]) -> bool {
    let (write, watched) = (usize::from(Entry::WRITE), usize::from(Entry::WATCHED));
    let allowed = || table.word(at).filter(|word| word & write != 0);
    let Some(word) = allowed() else { return false };
    // No event is read while this is held, so nobody who has changed the mapping goes on. A watched page that may be written does not wait for the monitor
    // (walk.rs); another may wait for whoever serves it, and is written without.
    let hold = (word & watched != 0).then(|| core.space.hold());
    let block = core.dir.get(at).filter(|_| hold.is_some());
    let locked = block.map(|block| block.lock()); // nor does it leave
    let Some(word) = allowed().filter(|word| hold.is_some() || word & watched == 0) else { return false };
    // SAFETY: the source is the caller's; what cannot be written is an error, not a crash; for what is, the caller vouches.
    let done = unsafe { copy::guarded(at as *mut u8, bytes.as_ptr(), bytes.len()) }.is_ok();
    drop((locked, hold));
    if !done {
        table.refute(at, word);
    }
    done
}

impl<N: Notifier> Drop for Mirror<N> {
    fn drop(&mut self) {
        if !self.hold.is_ours() {
            return; // a child of a fork has neither the thread nor the memory
        }
        let watch = &self.inner.head.watch;
        self.ask(move |core| {
            core.space.mirrors.remove(watch);
            unwatch(core, watch.span);
        });
        self.inner.head.desk.close();
        // SAFETY: dropped once; nobody uses either any more.
        unsafe {
            ManuallyDrop::take(&mut self.thread).join();
            ManuallyDrop::drop(&mut self.inner);
        }
    }
}

/// Ends the watch on what no other mirror and no device needs.
fn unwatch(core: &Core, span: Span) {
    let mut at = span.start;
    while at < span.end {
        let Ok(Some(vma)) = core.space.maps.find(at) else { return };
        let mapped = Span { start: vma.start, end: vma.end }.and(Span { start: at, end: span.end });
        let ours = !mapped.and(own::PLACE).is_empty();
        at = if ours { own::PLACE.end } else { vma.end }; // of which there are some for each mirror
        if ours || !vma.is_private_anonymous() || core.space.uffd.watches(mapped.start) == Ok(false) {
            continue;
        }
        for part in mapped.blocks() {
            let _hold = core.space.hold();
            let Ok(block) = core.dir.get_or_make(part.start) else { return };
            let state = block.lock();
            for run in (part.bits() - state.reg).runs() {
                let span = crate::ranges::pages(Span::block(part.start), run);
                if !core.space.mirrors.meet(span) {
                    let _ = core.space.uffd.unregister(span.start, span.len());
                }
            }
        }
    }
}

const _: () = assert!(BLOCK.is_multiple_of(PAGE) && PIECE <= PAGE);
