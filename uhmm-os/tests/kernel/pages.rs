//! Each ioctl of a userfaultfd on real memory.

use crate::support::*;
use crate::{Needs, Test};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::Duration;
use uhmm_os::mem::Advice;
use uhmm_os::pagemap::{Category, Pagemap, Region, ScanArgs};
use uhmm_os::uffd::*;
use uhmm_os::{BLOCK, Errno, PAGE};

const NONE: Features = Features::empty();
const MOVE: Features = Features::MOVE;
const WP: Features = Features::PAGEFAULT_FLAG_WP;

pub(crate) const TESTS: &[Test] = &[
    Test("uffd_open_says_what_is_missing", Needs::Uffd(NONE), open_says_what_is_missing),
    Test("uffd_copy_serves_a_fault", Needs::Uffd(NONE), copy_serves_a_fault),
    Test("uffd_copy_partial", Needs::Uffd(NONE), copy_partial),
    Test("uffd_copy_write_protected", Needs::Uffd(WP), copy_write_protected),
    Test("uffd_thread_and_exact_address", Needs::Uffd(Features::THREAD_ID.union(Features::EXACT_ADDRESS)), thread_and_address),
    Test("uffd_zeropage", Needs::Uffd(NONE), zeropage),
    Test("uffd_one_call_one_mapping", Needs::Uffd(NONE), one_call_one_mapping),
    Test("uffd_dontwake_and_wake", Needs::Uffd(NONE), dontwake_and_wake),
    Test("uffd_move_round_trip_small", Needs::Uffd(MOVE), move_round_trip_small),
    Test("uffd_move_round_trip_huge", Needs::Uffd(MOVE), move_round_trip_huge),
    Test("uffd_move_to_what_is_watched_for_writes", Needs::Uffd(MOVE.union(WP)), move_to_what_is_watched_for_writes),
    Test("uffd_move_errors", Needs::Uffd(MOVE), move_errors),
    Test("uffd_move_serves_a_fault", Needs::Uffd(MOVE), move_serves_a_fault),
    Test("uffd_write_protect", Needs::Uffd(WP), write_protect),
    Test("uffd_tells_what_is_registered", Needs::Uffd(WP), tells_what_is_registered),
    Test("uffd_poison", Needs::Uffd(Features::POISON), poison),
    Test("uffd_register_and_unregister", Needs::Uffd(NONE), register_and_unregister),
    Test("uffd_user_mode_only_system_call", Needs::Uffd(NONE), user_mode_only_system_call),
    Test("uffd_full_system_call", Needs::Full(NONE), full_system_call),
];

fn open_says_what_is_missing() {
    let rights = best_rights();
    let offered = probe(rights).unwrap();
    Userfaultfd::open(rights, offered - Features::SIGBUS - Features::WP_ASYNC).unwrap();
    let beyond = Features::from_bits_retain(1 << 60);
    match Userfaultfd::open(rights, offered | beyond) {
        Err(OpenError::MissingFeatures { missing }) => assert_eq!(missing, beyond),
        other => panic!("{other:?}"),
    }
    let fork = Userfaultfd::open(rights, Features::EVENT_FORK);
    match offered.contains(Features::EVENT_FORK) {
        true => assert!(fork.is_ok()),
        false => assert_eq!(fork.unwrap_err(), OpenError::RefusedFeatures { refused: Features::EVENT_FORK }),
    }
}

fn watch(uffd: &Userfaultfd, memory: &uhmm_os::mem::Mapping, mode: RegisterMode) {
    uffd.register(memory.start(), memory.len(), mode).unwrap();
}

fn copy(uffd: &Userfaultfd, to: usize, from: usize, len: usize, mode: CopyMode) -> Result<(), Partial> {
    // SAFETY: memory of the test's own.
    unsafe { uffd.copy(to, from, len, mode) }
}

/// Goes on where a page was locked for a moment (compaction).
fn moved(uffd: &Userfaultfd, to: usize, from: usize, len: usize) -> Result<(), Partial> {
    let mut done = 0;
    loop {
        // SAFETY: memory of the test's own.
        match unsafe { uffd.move_pages(to + done, from + done, len - done, MoveMode::empty()) } {
            Err(partial) if partial.errno == Errno::AGAIN => done += partial.done,
            result => return result.map_err(|partial| Partial { done: done + partial.done, ..partial }),
        }
    }
}

fn protect(uffd: &Userfaultfd, start: usize, len: usize, on: bool) -> Result<(), Errno> {
    // SAFETY: memory of the test's own, whose faults the test answers.
    unsafe { uffd.write_protect(start, len, on) }
}

fn stopped(done: usize, errno: Errno) -> Result<(), Partial> {
    Err(Partial { done, errno })
}

fn copy_serves_a_fault() {
    let (uffd, memory, source) = (open(NONE), pages(2), pages(1));
    fill(&source);
    watch(&uffd, &memory, RegisterMode::MISSING);
    let at = memory.start() + PAGE;
    scope(|s| {
        let reader = s.spawn(|| peek(at + 5));
        let event = next_event(&uffd);
        assert_eq!(event, Event::Fault { address: at, write: false, wp: false, minor: false, tid: 0 });
        copy(&uffd, at, source.start(), PAGE, CopyMode::empty()).unwrap();
        assert_eq!(reader.join().unwrap(), pattern(5));
        let writer = s.spawn(|| poke(memory.start(), 3));
        let event = next_event(&uffd);
        assert!(matches!(event, Event::Fault { write: true, wp: false, .. }), "{event:?}");
        copy(&uffd, memory.start(), source.start(), PAGE, CopyMode::empty()).unwrap();
        writer.join().unwrap();
    });
    assert_eq!((peek(memory.start()), peek(memory.start() + 1)), (3, pattern(1)));
    assert_eq!(uffd.read(&mut MsgBuf::new()), Ok(0));
}

fn copy_partial() {
    let (uffd, memory, source) = (open(NONE), pages(4), pages(4));
    fill(&source);
    watch(&uffd, &memory, RegisterMode::MISSING);
    let (to, from, none) = (memory.start(), source.start(), CopyMode::empty());
    copy(&uffd, to + 2 * PAGE, from, PAGE, none).unwrap();
    assert_eq!(copy(&uffd, to, from, 4 * PAGE, none), stopped(2 * PAGE, Errno::AGAIN));
    assert_eq!(copy(&uffd, to + 2 * PAGE, from, PAGE, none), stopped(0, Errno::EXIST));
    assert_eq!(copy(&uffd, to + 1, from, PAGE, none), stopped(0, Errno::INVAL));
    assert_eq!(copy(&uffd, source.start(), from, PAGE, none), stopped(0, Errno::NOENT));
    assert!(is_filled(to, 0, 2 * PAGE));
}

fn copy_write_protected() {
    let (uffd, memory, source) = (open(WP), pages(1), pages(1));
    fill(&source);
    watch(&uffd, &memory, RegisterMode::MISSING | RegisterMode::WP);
    copy(&uffd, memory.start(), source.start(), PAGE, CopyMode::WP).unwrap();
    assert!(Pagemap::open().unwrap().entry(memory.start()).unwrap().uffd_wp);
    assert!(is_filled(memory.start(), 0, PAGE));
    scope(|s| {
        let writer = s.spawn(|| poke(memory.start(), 9));
        let event = next_event(&uffd);
        assert!(matches!(event, Event::Fault { write: true, wp: true, .. }), "{event:?}");
        protect(&uffd, memory.start(), PAGE, false).unwrap();
        writer.join().unwrap();
    });
    assert_eq!(peek(memory.start()), 9);
}

fn thread_and_address() {
    let (uffd, memory) = (open(Features::THREAD_ID | Features::EXACT_ADDRESS), pages(1));
    watch(&uffd, &memory, RegisterMode::MISSING);
    let at = memory.start() + 1234;
    scope(|s| {
        let reader = s.spawn(|| {
            peek(at);
            uhmm_os::thread::gettid()
        });
        let Event::Fault { address, tid, .. } = next_event(&uffd) else { panic!("no fault") };
        uffd.zeropage(memory.start(), PAGE).unwrap();
        assert_eq!((address, tid), (at, reader.join().unwrap()));
    });
}

fn zeropage() {
    let (uffd, memory) = (open(NONE), pages(3));
    watch(&uffd, &memory, RegisterMode::MISSING);
    uffd.zeropage(memory.start() + 2 * PAGE, PAGE).unwrap();
    assert_eq!(uffd.zeropage(memory.start(), 3 * PAGE), stopped(2 * PAGE, Errno::AGAIN));
    assert_eq!(uffd.zeropage(memory.start(), PAGE), stopped(0, Errno::EXIST));
    assert!((0..memory.len()).all(|i| peek(memory.start() + i) == 0));
}

fn dontwake_and_wake() {
    let (uffd, memory, source) = (open(NONE), pages(1), pages(1));
    fill(&source);
    watch(&uffd, &memory, RegisterMode::MISSING);
    let done = AtomicBool::new(false);
    scope(|s| {
        s.spawn(|| {
            peek(memory.start());
            done.store(true, Ordering::SeqCst);
        });
        next_event(&uffd);
        copy(&uffd, memory.start(), source.start(), PAGE, CopyMode::DONTWAKE).unwrap();
        sleep(Duration::from_millis(100));
        assert!(!done.load(Ordering::SeqCst));
        uffd.wake(memory.start(), PAGE).unwrap();
        eventually("the reader wakes", || done.load(Ordering::SeqCst));
    });
    assert_eq!(uffd.wake(memory.start(), 0), Err(Errno::INVAL));
}

/// To another place and back, page by page and at once.
fn move_round_trip_small() {
    let (uffd, memory, other) = (open(MOVE), pages(64), pages(64));
    fill(&memory);
    watch(&uffd, &memory, RegisterMode::MISSING);
    watch(&uffd, &other, RegisterMode::MISSING);
    let pagemap = Pagemap::open().unwrap();
    let (a, b, len) = (memory.start(), other.start(), memory.len());
    moved(&uffd, b, a, PAGE).unwrap();
    moved(&uffd, b + PAGE, a + PAGE, len - PAGE).unwrap();
    for page in 0..64 {
        assert!(!pagemap.entry(a + page * PAGE).unwrap().present);
    }
    assert!(is_filled(b, 0, len));
    moved(&uffd, a, b, len).unwrap();
    assert!(is_filled(a, 0, len));
}

fn move_round_trip_huge() {
    let (uffd, memory, other) = (open(MOVE), area(2 * BLOCK), area(2 * BLOCK));
    advise(&memory, Advice::Hugepage);
    advise(&other, Advice::Hugepage);
    fill(&memory);
    watch(&uffd, &other, RegisterMode::MISSING);
    watch(&uffd, &memory, RegisterMode::MISSING);
    let huge = |at: usize| crate::scan::categories(at, 2 * BLOCK).iter().all(|r| r.1.contains(Category::HUGE));
    let was_huge = huge(memory.start());
    moved(&uffd, other.start(), memory.start(), 2 * BLOCK).unwrap();
    assert_eq!(huge(other.start()), was_huge);
    assert!(crate::scan::categories(memory.start(), 2 * BLOCK).is_empty());
    moved(&uffd, memory.start(), other.start(), 2 * BLOCK).unwrap();
    assert_eq!(huge(memory.start()), was_huge);
    assert!(is_filled(memory.start(), 0, 2 * BLOCK));
}

/// Any registration makes a destination; where it is not one for missing pages, a place that has lost its page gets a new one by a touch. So it is for huge pages.
fn move_to_what_is_watched_for_writes() {
    for (memory, other) in [(pages(64), pages(64)), (area(BLOCK), area(BLOCK))] {
        let uffd = open(MOVE | WP);
        if memory.len() == BLOCK {
            advise(&memory, Advice::Hugepage);
            advise(&other, Advice::Hugepage);
        }
        fill(&memory);
        watch(&uffd, &other, RegisterMode::MISSING);
        watch(&uffd, &memory, RegisterMode::WP);
        let huge = |at: usize| crate::scan::categories(at, memory.len()).iter().any(|r| r.1.contains(Category::HUGE));
        let was_huge = huge(memory.start());
        let (a, b, len) = (memory.start(), other.start(), memory.len());
        moved(&uffd, b, a, len).unwrap();
        moved(&uffd, a, b, len).unwrap();
        assert!(is_filled(a, 0, len) && huge(a) == was_huge);
        moved(&uffd, b, a, len).unwrap();
        poke(a + 6, 7);
        assert_eq!(peek(a + 5), 0, "a new page");
        assert!(huge(a) == was_huge && is_filled(b, 0, len));
        assert_eq!(moved(&uffd, a, b, PAGE), stopped(0, Errno::EXIST));
    }
}

fn move_errors() {
    let (uffd, memory, other) = (open(MOVE), pages(4), pages(4));
    fill(&memory);
    watch(&uffd, &other, RegisterMode::MISSING);
    let (a, b) = (memory.start(), other.start());
    // SAFETY: memory of the test's own.
    unsafe { uhmm_os::mem::madvise(a + 2 * PAGE, PAGE, Advice::DontNeed) }.unwrap();
    // Two pages go over, then the third is not there.
    assert_eq!(moved(&uffd, b, a, 4 * PAGE), stopped(2 * PAGE, Errno::NOENT));
    assert_eq!(moved(&uffd, b, a + 3 * PAGE, PAGE), stopped(0, Errno::EXIST));
    assert_eq!(moved(&uffd, b + 3 * PAGE, a, PAGE), stopped(0, Errno::NOENT));
    assert_eq!(moved(&uffd, b + 1, a, PAGE), stopped(0, Errno::INVAL));
    assert!(is_filled(b, 0, 2 * PAGE) && is_filled(a + 3 * PAGE, 3 * PAGE, PAGE));
}

fn move_serves_a_fault() {
    let (uffd, memory, pool) = (open(MOVE), pages(1), pages(1));
    fill(&pool);
    watch(&uffd, &memory, RegisterMode::MISSING);
    scope(|s| {
        let reader = s.spawn(|| peek(memory.start() + 7));
        next_event(&uffd);
        moved(&uffd, memory.start(), pool.start(), PAGE).unwrap();
        assert_eq!(reader.join().unwrap(), pattern(7));
    });
    assert_eq!(peek(pool.start() + 7), 0);
}

fn write_protect() {
    let (uffd, memory) = (open(WP), pages(2));
    fill(&memory);
    watch(&uffd, &memory, RegisterMode::WP);
    protect(&uffd, memory.start(), 2 * PAGE, true).unwrap();
    assert!(is_filled(memory.start(), 0, 2 * PAGE), "reading stays allowed");
    scope(|s| {
        let at = memory.start() + PAGE;
        let writer = s.spawn(move || poke(at, 2));
        let event = next_event(&uffd);
        assert_eq!(event, Event::Fault { address: at, write: true, wp: true, minor: false, tid: 0 });
        assert_eq!(peek(at), pattern(PAGE));
        protect(&uffd, at, PAGE, false).unwrap();
        writer.join().unwrap();
    });
    assert_eq!(peek(memory.start() + PAGE), 2);
    let stranger = pages(1);
    assert_eq!(protect(&uffd, stranger.start(), PAGE, true), Err(Errno::NOENT));
}

/// And changes nothing by that: a missing page stays missing, a protected one protected, a huge one whole.
fn tells_what_is_registered() {
    let (uffd, memory) = (open(WP), area(2 * BLOCK));
    advise(&memory, Advice::Hugepage);
    poke(memory.start(), 1);
    let (huge, missing, beyond) = (memory.start(), memory.start() + BLOCK, memory.start() + BLOCK + 8 * PAGE);
    let here = || {
        let mut regions = [Region::EMPTY; 4];
        let wanted = Category::PRESENT | Category::SWAPPED;
        let args =
            ScanArgs { any_of: wanted, return_mask: wanted | Category::HUGE | Category::WRITTEN, ..ScanArgs::all_of(Category::empty()) };
        let scan = Pagemap::open().unwrap().scan(memory.start(), memory.end(), &args, &mut regions).unwrap();
        regions[..scan.filled].iter().map(|region| (region.start, region.end, region.categories)).collect::<Vec<_>>()
    };
    assert_eq!(uffd.watches(huge), Ok(false));
    uffd.register(memory.start(), BLOCK + 8 * PAGE, RegisterMode::MISSING | RegisterMode::WP).unwrap();
    protect(&uffd, huge, BLOCK, true).unwrap();
    let before = here();
    assert_eq!(before.len(), 1, "{before:?}");
    for (at, watched) in
        [(huge, true), (huge + 3 * PAGE, true), (missing, true), (beyond - PAGE, true), (beyond, false), (memory.end() - PAGE, false)]
    {
        assert_eq!(uffd.watches(at), Ok(watched), "{at:#x}");
    }
    assert_eq!(here(), before);
    assert_eq!(uffd.watches(huge + 1), Err(Errno::INVAL));
    uffd.unregister(memory.start(), BLOCK + 8 * PAGE).unwrap();
    assert_eq!(uffd.watches(huge), Ok(false));
}

fn poison() {
    let (uffd, memory) = (open(Features::POISON), pages(2));
    crate::signals::install_for_this_process();
    watch(&uffd, &memory, RegisterMode::MISSING);
    uffd.poison(memory.start() + PAGE, PAGE).unwrap();
    uffd.zeropage(memory.start(), PAGE).unwrap();
    let mut buffer = [1u8; 2 * PAGE];
    // SAFETY: the destination is large enough; the source may be anything.
    let reached = unsafe { uhmm_os::copy::guarded(buffer.as_mut_ptr(), memory.as_ptr(), 2 * PAGE) };
    assert_eq!(reached, Err(memory.start() + PAGE));
    assert_eq!(uffd.poison(memory.start() + PAGE, PAGE), stopped(0, Errno::EXIST));
}

fn register_and_unregister() {
    let (uffd, other, memory) = (open(NONE), open(NONE), pages(2));
    watch(&uffd, &memory, RegisterMode::MISSING);
    assert_eq!(other.register(memory.start(), PAGE, RegisterMode::MISSING), Err(Errno::BUSY));
    assert_eq!(uffd.register(memory.start() + 1, PAGE, RegisterMode::MISSING), Err(Errno::INVAL));
    scope(|s| {
        let reader = s.spawn(|| peek(memory.start()));
        next_event(&uffd);
        uffd.unregister(memory.start(), memory.len()).unwrap();
        assert_eq!(reader.join().unwrap(), 0, "the reader is woken and finds zeros");
    });
    assert_eq!(uffd.read(&mut MsgBuf::new()), Ok(0));
    other.register(memory.start(), PAGE, RegisterMode::MISSING).unwrap();
}

/// read(2) from a pipe that holds a byte into `at`.
fn read_call(at: usize) -> Result<usize, i32> {
    let mut ends = [0; 2];
    // SAFETY: a pipe of our own; the byte goes to memory of the test's own.
    unsafe {
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
        assert_eq!(libc::write(ends[1], [77u8].as_ptr().cast(), 1), 1);
        let got = libc::read(ends[0], at as *mut libc::c_void, 1);
        let error = std::io::Error::last_os_error().raw_os_error().unwrap();
        libc::close(ends[0]);
        libc::close(ends[1]);
        usize::try_from(got).map_err(|_| error)
    }
}

fn user_mode_only_system_call() {
    let (uffd, memory) = (Userfaultfd::open(Rights::UserModeOnly, NONE).unwrap(), pages(1));
    watch(&uffd, &memory, RegisterMode::MISSING);
    assert_eq!(read_call(memory.start()), Err(libc::EFAULT));
    uffd.zeropage(memory.start(), PAGE).unwrap();
    assert_eq!(read_call(memory.start()), Ok(1));
}

fn full_system_call() {
    let (uffd, memory) = (Userfaultfd::open(Rights::Full, NONE).unwrap(), pages(1));
    watch(&uffd, &memory, RegisterMode::MISSING);
    scope(|s| {
        let caller = s.spawn(|| read_call(memory.start()));
        next_event(&uffd);
        uffd.zeropage(memory.start(), PAGE).unwrap();
        assert_eq!(caller.join().unwrap(), Ok(1));
    });
    assert_eq!(peek(memory.start()), 77);
}

/// A range that goes on into another mapping is answered as if nothing were there.
fn one_call_one_mapping() {
    let (uffd, memory, source) = (open(NONE), pages(8), pages(8));
    fill(&source);
    watch(&uffd, &memory, RegisterMode::MISSING);
    let border = memory.start() + 3 * PAGE;
    // SAFETY: memory of the test's own.
    unsafe { uhmm_os::mem::madvise(border, 5 * PAGE, Advice::DoFork) }.unwrap();
    let none = Err(Partial { done: 0, errno: Errno::NOENT });
    assert_eq!(copy(&uffd, memory.start(), source.start(), 8 * PAGE, CopyMode::empty()), none);
    assert_eq!(uffd.zeropage(memory.start(), 8 * PAGE), none);
    assert_eq!(copy(&uffd, memory.start(), source.start(), 3 * PAGE, CopyMode::empty()), Ok(()));
    assert_eq!(uffd.zeropage(border, 5 * PAGE), Ok(()));
    assert!(is_filled(memory.start(), 0, 3 * PAGE) && peek(border) == 0);
}
