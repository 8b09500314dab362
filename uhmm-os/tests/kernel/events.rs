//! Mapping events: who waits for them, and what they say.
//!
//! Each test declares its descriptor last, so that it closes first: unmapping memory that is still watched waits for a reader.

use crate::support::*;
use crate::{Needs, Test};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::scope;
use uhmm_os::mem::{Advice, RemapFlags, madvise, mremap, munmap};
use uhmm_os::uffd::*;
use uhmm_os::{Errno, PAGE};

const UNMAP: Features = Features::EVENT_UNMAP.union(Features::MOVE);

const PROTECTED: Features = UNMAP.union(Features::PAGEFAULT_FLAG_WP);

pub(crate) const TESTS: &[Test] = &[
    Test("event_unmap", Needs::Uffd(UNMAP), unmap),
    Test("event_remap", Needs::Uffd(Features::EVENT_REMAP), remap),
    Test("event_remove", Needs::Uffd(Features::EVENT_REMOVE), remove),
    Test("event_pending_refuses_moves", Needs::Uffd(UNMAP), pending_refuses_moves),
    Test("event_pending_lets_unregister", Needs::Uffd(PROTECTED), pending_lets_unregister),
    Test("fills_end_with_their_mapping", Needs::Uffd(UNMAP), fills_end_with_their_mapping),
    Test(
        "nobody_wakes_who_waits_for_a_page_that_goes",
        Needs::Full(Features::PAGEFAULT_FLAG_WP),
        nobody_wakes_who_waits_for_a_page_that_goes,
    ),
    Test("event_fork", Needs::Full(Features::EVENT_FORK), fork),
];

/// Lets whoever waits for a reader go on when a test fails, so that it fails and does not hang.
struct ReadOnPanic<'a>(&'a Userfaultfd);

impl Drop for ReadOnPanic<'_> {
    fn drop(&mut self) {
        while std::thread::panicking() && poll(&[self.0.as_fd()], Some(500)) == Ok(1) {
            let _ = self.0.read(&mut MsgBuf::new());
        }
    }
}

/// Runs `change` on another thread, sees that it waits for its event to be read, and returns the event.
fn event_of<R: Send + std::fmt::Debug>(uffd: &Userfaultfd, change: impl FnOnce() -> R + Send) -> (Event, R) {
    let done = AtomicBool::new(false);
    scope(|s| {
        let _reader = ReadOnPanic(uffd);
        assert!(!uffd.event_pending());
        let changer = s.spawn(|| {
            let result = change();
            done.store(true, Ordering::SeqCst);
            result
        });
        eventually("an event is pending", || uffd.event_pending());
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert!(!done.load(Ordering::SeqCst), "the caller waits until the event is read");
        let event = next_event(uffd);
        let result = changer.join().unwrap();
        assert!(!uffd.event_pending());
        (event, result)
    })
}

fn unmap() {
    let (memory, uffd) = (pages(4), open(UNMAP));
    uffd.register(memory.start(), memory.len(), RegisterMode::MISSING).unwrap();
    let start = memory.start() + PAGE;
    // SAFETY: pages of the test's own, which are not used again.
    let (event, result) = event_of(&uffd, || unsafe { munmap(start, 2 * PAGE) });
    assert_eq!((event, result), (Event::Unmap { start, end: start + 2 * PAGE }, Ok(())));
    uffd.unregister(memory.start(), PAGE).unwrap();
    uffd.unregister(memory.start() + 3 * PAGE, PAGE).unwrap();
}

/// A page can be made writable at any time.
fn pending_lets_unregister() {
    let (memory, uffd) = (pages(4), open(PROTECTED));
    fill(&memory);
    uffd.register(memory.start(), memory.len(), RegisterMode::MISSING | RegisterMode::WP).unwrap();
    // SAFETY: it changes no contents, and nobody writes there meanwhile.
    let protect = |on| unsafe { uffd.write_protect(memory.start(), PAGE, on) };
    protect(true).unwrap();
    let gone = memory.start() + 3 * PAGE;
    scope(|s| {
        let _reader = ReadOnPanic(&uffd);
        // SAFETY: a page of the test's own, which is not used again.
        let changer = s.spawn(|| unsafe { munmap(gone, PAGE) });
        eventually("an event is pending", || uffd.event_pending());
        assert_eq!(protect(false), Err(Errno::AGAIN));
        assert_eq!(uffd.unregister(memory.start(), PAGE), Ok(()));
        poke(memory.start(), pattern(0)); // it would wait for ever
        assert!(uffd.event_pending());
        assert_eq!(next_event(&uffd), Event::Unmap { start: gone, end: gone + PAGE });
        changer.join().unwrap().unwrap();
    });
    assert!(is_filled(memory.start(), 0, 3 * PAGE));
    uffd.unregister(memory.start() + PAGE, 2 * PAGE).unwrap();
}

/// Neighbours that are registered alike are two ranges to COPY and ZEROPAGE if they are two mappings.
fn fills_end_with_their_mapping() {
    let (memory, other, uffd) = (pages(4), pages(4), open(UNMAP));
    fill(&other);
    // SAFETY: pages of the test's own, of which half are treated otherwise: a mapping for itself.
    unsafe { madvise(memory.start() + 2 * PAGE, 2 * PAGE, Advice::Hugepage) }.unwrap();
    uffd.register(memory.start(), memory.len(), RegisterMode::MISSING).unwrap();
    let lost = Err(Partial { done: 0, errno: Errno::NOENT });
    assert_eq!(uffd.zeropage(memory.start(), memory.len()), lost);
    // SAFETY: into empty pages of the test's own.
    let copy = |to, from, len| unsafe { uffd.copy(to, from, len, CopyMode::empty()) };
    assert_eq!(copy(memory.start(), other.start(), other.len()), lost);
    assert_eq!(copy(memory.start(), other.start(), 2 * PAGE), Ok(()));
    assert_eq!(copy(memory.start() + 2 * PAGE, other.start() + 2 * PAGE, 2 * PAGE), Ok(()));
    assert!(is_filled(memory.start(), 0, memory.len()));
    uffd.unregister(memory.start(), memory.len()).unwrap();
}

fn remap() {
    let (memory, place, uffd) = (pages(2), pages(2), open(Features::EVENT_REMAP));
    fill(&memory);
    uffd.register(memory.start(), memory.len(), RegisterMode::MISSING).unwrap();
    let (from, len) = memory.into_raw();
    let (to, _) = place.into_raw();
    let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
    // SAFETY: two mappings of the test's own; the old place is not used again.
    let (event, result) = event_of(&uffd, || unsafe { mremap(from, len, len, flags, to) });
    assert_eq!((event, result), (Event::Remap { from, to, len }, Ok(to)));
    assert!(is_filled(to, 0, len));
    uffd.unregister(to, len).unwrap();
    // SAFETY: mapped there just now.
    drop(unsafe { uhmm_os::mem::Mapping::from_raw(to, len) });
}

fn remove() {
    let (memory, uffd) = (pages(4), open(Features::EVENT_REMOVE));
    fill(&memory);
    uffd.register(memory.start(), memory.len(), RegisterMode::MISSING).unwrap();
    let start = memory.start() + PAGE;
    // SAFETY: the test's own memory.
    let (event, result) = event_of(&uffd, || unsafe { madvise(start, PAGE, Advice::DontNeed) });
    assert_eq!((event, result), (Event::Remove { start, end: start + PAGE }, Ok(())));
    assert!(is_filled(start + PAGE, 2 * PAGE, PAGE));
    uffd.unregister(memory.start(), memory.len()).unwrap();
    assert_eq!(peek(start), 0);
}

fn pending_refuses_moves() {
    let (memory, staging, uffd) = (pages(4), pages(1), open(UNMAP));
    fill(&staging);
    uffd.register(memory.start(), memory.len(), RegisterMode::MISSING).unwrap();
    let (to, from) = (memory.start(), staging.start());
    scope(|s| {
        let _reader = ReadOnPanic(&uffd);
        let gone = memory.start() + 3 * PAGE;
        // SAFETY: a page of the test's own, which is not used again.
        let changer = s.spawn(move || unsafe { munmap(gone, PAGE) });
        eventually("an event is pending", || uffd.event_pending());
        let again = Err(Partial { done: 0, errno: Errno::AGAIN });
        // SAFETY: pages of the test's own.
        unsafe {
            assert_eq!(uffd.move_pages(to, from, PAGE, MoveMode::empty()), again);
            assert_eq!(uffd.copy(to, from, PAGE, CopyMode::empty()), again);
        }
        assert_eq!(uffd.zeropage(to, PAGE), again);
        assert_eq!(uffd.watches(to), Err(Errno::AGAIN));
        assert!(is_filled(from, 0, PAGE), "nothing was moved");
        assert_eq!(next_event(&uffd), Event::Unmap { start: gone, end: gone + PAGE });
        changer.join().unwrap().unwrap();
        // SAFETY: as above.
        unsafe { uffd.move_pages(to, from, PAGE, MoveMode::empty()) }.unwrap();
    });
    uffd.unregister(memory.start(), 3 * PAGE).unwrap();
}

/// The child touches a page that is missing, and is served through the descriptor of the event.
fn fork() {
    let (memory, source, uffd) = (pages(1), pages(1), open(Features::EVENT_FORK));
    fill(&source);
    advise(&memory, Advice::DoFork);
    uffd.register(memory.start(), PAGE, RegisterMode::MISSING).unwrap();
    scope(|s| {
        let forker = s.spawn(|| {
            // SAFETY: the child looks at a byte and ends.
            unsafe {
                let pid = libc::fork();
                if pid == 0 {
                    libc::_exit(i32::from(peek(memory.start() + 3)));
                }
                pid
            }
        });
        let Event::Fork { fd } = next_event(&uffd) else { panic!("no fork event") };
        // SAFETY: the event's descriptor.
        let child = unsafe { Userfaultfd::from_fork(fd) };
        let pid = forker.join().unwrap();
        let event = next_event(&child);
        assert!(matches!(event, Event::Fault { address, .. } if address == memory.start()), "{event:?}");
        // SAFETY: the child expects these bytes.
        unsafe { child.copy(memory.start(), source.start(), PAGE, CopyMode::empty()) }.unwrap();
        let mut status = 0;
        // SAFETY: our own child.
        unsafe { libc::waitpid(pid, &mut status, 0) };
        assert!(libc::WIFEXITED(status));
        assert_eq!(libc::WEXITSTATUS(status), i32::from(pattern(3)));
    });
}

/// Who waits to write a protected page that is unmapped meanwhile is woken by nobody: not by the unmapping, and not by the call that would let him write.
fn nobody_wakes_who_waits_for_a_page_that_goes() {
    let (memory, uffd) = (pages(1), open(Features::PAGEFAULT_FLAG_WP));
    fill(&memory);
    uffd.register(memory.start(), PAGE, RegisterMode::MISSING | RegisterMode::WP).unwrap();
    // SAFETY: the test's own memory.
    unsafe { uffd.write_protect(memory.start(), PAGE, true) }.unwrap();
    let done = AtomicBool::new(false);
    scope(|scope| {
        scope.spawn(|| {
            // SAFETY: as above; of a page that has gone it says so.
            let _ = unsafe { madvise(memory.start(), PAGE, Advice::PopulateWrite) };
            done.store(true, Ordering::Release);
        });
        assert_eq!(poll(&[uffd.as_fd()], Some(5000)), Ok(1), "it waits");
        // SAFETY: as above.
        unsafe { munmap(memory.start(), PAGE) }.unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { uffd.write_protect(memory.start(), PAGE, false) }, Err(Errno::NOENT));
        std::thread::sleep(std::time::Duration::from_millis(300));
        let woken = done.load(Ordering::Acquire);
        uffd.wake(memory.start(), PAGE).unwrap();
        assert!(!woken, "the kernel wakes it by itself: then uhmm need not");
    });
}
