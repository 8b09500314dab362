//! Faults: what is repaired, what is handed on, and what still kills.

use crate::alone::{Alone, End};
use crate::support::*;
use crate::{Needs, Test};
use core::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering::SeqCst};
use uhmm_os::copy::guarded;
use uhmm_os::mem::{Prot, mprotect};
use uhmm_os::signal::{FaultInfo, block_all_but_faults, install, keep, uninstall};
use uhmm_os::uffd::{CopyMode, Features, RegisterMode, Userfaultfd};
use uhmm_os::{BLOCK, PAGE, thread};

const SIGBUS: Features = Features::SIGBUS;

pub(crate) const TESTS: &[Test] = &[
    Test("guarded_copies_what_is_there", Needs::Nothing, guarded_copies_what_is_there),
    Test("guarded_stops_at_a_hole", Needs::Nothing, guarded_stops_at_a_hole),
    Test("guarded_stops_beyond_a_file", Needs::Nothing, guarded_stops_beyond_a_file),
    Test("guarded_bears_any_address", Needs::Nothing, guarded_bears_any_address),
];

pub(crate) const ALONE: &[Alone] = &[
    Alone("null_still_kills", Needs::Nothing, End::Signal(libc::SIGSEGV), null_still_kills),
    Alone("null_still_kills_by_default", Needs::Nothing, End::Signal(libc::SIGSEGV), null_still_kills_by_default),
    Alone("null_still_kills_if_ignored", Needs::Nothing, End::Signal(libc::SIGSEGV), null_still_kills_if_ignored),
    Alone("file_end_still_kills", Needs::Nothing, End::Signal(libc::SIGBUS), file_end_still_kills),
    Alone("a_sent_signal_kills", Needs::Nothing, End::Signal(libc::SIGSEGV), a_sent_signal_kills),
    Alone("a_sent_signal_is_ignored", Needs::Nothing, End::Well, a_sent_signal_is_ignored),
    Alone("handler_repairs", Needs::Nothing, End::Well, handler_repairs),
    Alone("earlier_handler_repairs", Needs::Nothing, End::Well, earlier_handler_repairs),
    Alone("earlier_plain_handler_once", Needs::Nothing, End::Signal(libc::SIGSEGV), earlier_plain_handler_once),
    Alone("uninstall_puts_back", Needs::Nothing, End::Well, uninstall_puts_back),
    Alone("what_is_put_over_ours_meanwhile_goes", Needs::Nothing, End::Well, what_is_put_over_ours_meanwhile_goes),
    Alone("install_again_exchanges", Needs::Nothing, End::Well, install_again_exchanges),
    Alone("threads_serve_themselves", Needs::Uffd(SIGBUS), End::Well, threads_serve_themselves),
    Alone("fork_in_the_main_thread", Needs::Nothing, End::Well, fork_in_the_main_thread),
    Alone("setuid_does_not_hang", Needs::Nothing, End::Well, setuid_does_not_hang),
];

/// For tests that only need guarded copies.
pub(crate) fn install_for_this_process() {
    install(|_| false).unwrap();
}

fn copy_guarded(to: usize, from: usize, len: usize) -> Result<(), usize> {
    // SAFETY: installed by the caller; the destination is the test's own, or out of reach.
    unsafe { guarded(to as *mut u8, from as *const u8, len) }
}

fn set_prot(start: usize, len: usize, prot: Prot) {
    // SAFETY: memory of the test's own.
    unsafe { mprotect(start, len, prot) }.unwrap();
}

fn guarded_copies_what_is_there() {
    install_for_this_process();
    let (from, to) = (area(BLOCK), area(BLOCK));
    fill(&from);
    copy_guarded(to.start(), from.start(), BLOCK).unwrap();
    assert!(is_filled(to.start(), 0, BLOCK));
}

/// From and to, with lengths and offsets that let every kind of instruction in the loop meet the edge.
fn guarded_stops_at_a_hole() {
    install_for_this_process();
    let (memory, other) = (pages(4), pages(4));
    fill(&memory);
    let edge = memory.start() + 2 * PAGE;
    set_prot(edge, PAGE, Prot::None);
    for before in [0, 1, 7, 16, 63, 64, 100, 128, 200, 1000, PAGE, PAGE + 3] {
        for to in [other.start(), other.start() + 1, other.start() + 63] {
            assert_eq!(copy_guarded(to, edge - before, before), Ok(()));
            assert_eq!(copy_guarded(to, edge - before, before + 1), Err(edge), "reading, {before} before");
            assert_eq!(copy_guarded(to, edge - before, before + 700), Err(edge), "reading, {before} before");
            assert_eq!(copy_guarded(edge - before, to, before + 700), Err(edge), "writing, {before} before");
        }
    }
    set_prot(edge, PAGE, Prot::Read);
    assert_eq!(copy_guarded(other.start(), edge - 5, 10), Ok(()));
    assert_eq!(copy_guarded(edge - 5, other.start(), 10), Err(edge));
    // A real hole.
    let (start, len) = pages(2).into_raw();
    // SAFETY: a page of the test's own; nothing that matters is mapped there later, as its neighbour stays.
    unsafe {
        uhmm_os::mem::munmap(start + PAGE, PAGE).unwrap();
        assert_eq!(len, 2 * PAGE);
    }
    assert_eq!(copy_guarded(other.start(), start + PAGE - 200, 400), Err(start + PAGE));
}

/// A page of a file that ends before it: SIGBUS.
fn beyond_a_file() -> usize {
    // SAFETY: a file of our own, mapped, left to the process.
    unsafe {
        let fd = libc::memfd_create(c"short".as_ptr(), libc::MFD_CLOEXEC);
        assert_eq!(libc::ftruncate(fd, PAGE as i64), 0);
        let at = libc::mmap(std::ptr::null_mut(), 2 * PAGE, libc::PROT_READ, libc::MAP_SHARED, fd, 0);
        assert_ne!(at, libc::MAP_FAILED);
        at as usize + PAGE
    }
}

fn guarded_stops_beyond_a_file() {
    install_for_this_process();
    let (at, to) = (beyond_a_file(), pages(2));
    assert_eq!(copy_guarded(to.start(), at - 100, 300), Err(at));
}

fn guarded_bears_any_address() {
    install_for_this_process();
    let memory = pages(1);
    assert_eq!(copy_guarded(memory.start(), 8, 64), Err(8));
    assert_eq!(copy_guarded(8, memory.start(), 300), Err(8));
    assert_eq!(copy_guarded(memory.start(), 1 << 62, 200), Err(0), "not canonical: the processor does not tell");
    assert_eq!(copy_guarded(memory.start(), usize::MAX - 4095, 200), Err(usize::MAX - 4095));
    assert_eq!(copy_guarded(0, 0, 0), Ok(()));
}

/// The tests of their own process.
static ASKED: AtomicU32 = AtomicU32::new(0);

fn never(_: &FaultInfo) -> bool {
    ASKED.fetch_add(1, SeqCst);
    false
}

fn null_still_kills() {
    install(never).unwrap();
    peek(8);
}

fn set_plain(signal: c_int, action: usize) {
    // SAFETY: one of the two constants, or a handler of this form.
    unsafe { libc::signal(signal, action) };
}

fn null_still_kills_by_default() {
    set_plain(libc::SIGSEGV, libc::SIG_DFL);
    install(never).unwrap();
    peek(8);
}

fn null_still_kills_if_ignored() {
    set_plain(libc::SIGSEGV, libc::SIG_IGN);
    install(never).unwrap();
    peek(8);
}

fn file_end_still_kills() {
    set_plain(libc::SIGBUS, libc::SIG_DFL);
    install(never).unwrap();
    peek(beyond_a_file());
}

fn a_sent_signal_kills() {
    set_plain(libc::SIGSEGV, libc::SIG_DFL);
    install(never).unwrap();
    // SAFETY: to ourselves.
    unsafe { libc::kill(libc::getpid(), libc::SIGSEGV) };
}

fn a_sent_signal_is_ignored() {
    set_plain(libc::SIGSEGV, libc::SIG_IGN);
    install(never).unwrap();
    // SAFETY: to ourselves.
    unsafe { libc::kill(libc::getpid(), libc::SIGSEGV) };
    assert_eq!(ASKED.load(SeqCst), 0, "a signal that was sent is no fault");
}

static AT: AtomicUsize = AtomicUsize::new(0);
static WROTE: AtomicBool = AtomicBool::new(false);
static SIGNAL: AtomicI32 = AtomicI32::new(0);

fn note_and_repair(fault: &FaultInfo) -> bool {
    AT.store(fault.address, SeqCst);
    WROTE.store(fault.write, SeqCst);
    SIGNAL.store(fault.signal, SeqCst);
    ASKED.fetch_add(1, SeqCst);
    set_prot(fault.address / PAGE * PAGE, PAGE, Prot::ReadWrite);
    true
}

fn handler_repairs() {
    install(note_and_repair).unwrap();
    let memory = pages(1);
    let at = memory.start() + 100;
    for write in [true, false] {
        set_prot(memory.start(), PAGE, Prot::None);
        if write {
            poke(at, 5);
        } else {
            assert_eq!(peek(at), 5);
        }
        assert_eq!((AT.load(SeqCst), WROTE.load(SeqCst), SIGNAL.load(SeqCst)), (at, write, libc::SIGSEGV));
    }
    assert_eq!(ASKED.load(SeqCst), 2);
    // A guarded copy asks nobody.
    set_prot(memory.start(), PAGE, Prot::None);
    let mut byte = 0u8;
    assert_eq!(copy_guarded(&raw mut byte as usize, at, 1), Err(at));
    assert_eq!(ASKED.load(SeqCst), 2);
}

static BLOCKED: AtomicU64 = AtomicU64::new(0);

fn blocked() -> u64 {
    let mut mask = 0u64;
    // SAFETY: only asks; eight bytes are written.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, 0, &raw mut mask, 8) };
    mask
}

extern "C" fn earlier(signal: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: a fault has an address.
    let at = unsafe { (*info).si_addr() } as usize;
    AT.store(at, SeqCst);
    SIGNAL.store(signal, SeqCst);
    BLOCKED.store(blocked(), SeqCst);
    set_prot(at / PAGE * PAGE, PAGE, Prot::ReadWrite);
}

fn set_earlier(flags: c_int) {
    // SAFETY: a handler of the form that the flags say.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = earlier as *const () as usize;
        action.sa_flags = flags;
        libc::sigaddset(&mut action.sa_mask, libc::SIGUSR1);
        assert_eq!(libc::sigaction(libc::SIGSEGV, &action, std::ptr::null_mut()), 0);
    }
}

fn earlier_handler_repairs() {
    set_earlier(libc::SA_SIGINFO);
    install(never).unwrap();
    let memory = pages(1);
    set_prot(memory.start(), PAGE, Prot::None);
    let before = blocked();
    poke(memory.start() + 9, 1);
    assert_eq!((AT.load(SeqCst), SIGNAL.load(SeqCst)), (memory.start() + 9, libc::SIGSEGV));
    assert_eq!(ASKED.load(SeqCst), 1, "ours is asked first");
    let bits = 1 << (libc::SIGUSR1 - 1) | 1 << (libc::SIGSEGV - 1);
    assert_eq!(BLOCKED.load(SeqCst), before | bits, "the mask that it asked for");
    assert_eq!(blocked(), before);
    set_earlier(libc::SA_SIGINFO | libc::SA_NODEFER);
}

extern "C" fn plain(_: c_int) {
    ASKED.fetch_add(1, SeqCst);
}

/// A handler for one time only that repairs nothing: it is called once, then the fault kills.
fn earlier_plain_handler_once() {
    // SAFETY: a handler of this form.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = plain as *const () as usize;
        action.sa_flags = libc::SA_RESETHAND;
        assert_eq!(libc::sigaction(libc::SIGSEGV, &action, std::ptr::null_mut()), 0);
    }
    install(|_| {
        // At the second fault the plain handler must have been called, and once.
        if AT.fetch_add(1, SeqCst) == 1 && ASKED.load(SeqCst) != 1 {
            // SAFETY: ends the process, which the parent takes for a failure.
            unsafe { libc::_exit(1) };
        }
        false
    })
    .unwrap();
    peek(8);
}

fn current(signal: c_int) -> (usize, c_int) {
    // SAFETY: only asks.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut now);
        (now.sa_sigaction, now.sa_flags & !0x0400_0000) // without SA_RESTORER
    }
}

fn uninstall_puts_back() {
    set_earlier(libc::SA_SIGINFO | libc::SA_NODEFER);
    let before = [current(libc::SIGSEGV), current(libc::SIGBUS)];
    uninstall();
    assert_eq!([current(libc::SIGSEGV), current(libc::SIGBUS)], before);
    for _ in 0..2 {
        install(never).unwrap();
        let ours = current(libc::SIGSEGV);
        assert_ne!(ours, before[0]);
        assert_eq!(ours.1, libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER);
        uninstall();
        assert_eq!([current(libc::SIGSEGV), current(libc::SIGBUS)], before);
    }
    install(never).unwrap();
    set_earlier(libc::SA_SIGINFO);
    uninstall();
    assert_eq!(current(libc::SIGSEGV).0, before[0].0, "the program's newer handler stays");
    assert_eq!(current(libc::SIGBUS), before[1]);
}

/// As a compiler's crash handler, which knows nothing of guarded copies. What the program has put there itself stays.
fn what_is_put_over_ours_meanwhile_goes() {
    install(never).unwrap();
    let ours = current(libc::SIGSEGV);
    let (from, to) = (area(BLOCK), area(BLOCK));
    set_prot(from.start(), BLOCK, Prot::None);
    let result = keep(|| {
        set_plain(libc::SIGSEGV, plain as *const () as usize);
        7
    });
    assert_eq!((result, current(libc::SIGSEGV)), (7, ours));
    assert_eq!(copy_guarded(to.start(), from.start(), PAGE), Err(from.start()));
    set_plain(libc::SIGSEGV, plain as *const () as usize);
    let theirs = current(libc::SIGSEGV);
    keep(|| set_plain(libc::SIGSEGV, libc::SIG_DFL));
    assert_eq!(current(libc::SIGSEGV).0, libc::SIG_DFL, "it was not ours before");
    assert_ne!(theirs, ours);
    assert_eq!(current(libc::SIGBUS).0, ours.0);
    // Nor is ours put back where it has been taken away in order.
    uninstall();
    install(never).unwrap();
    keep(uninstall);
    assert_ne!(current(libc::SIGBUS).0, ours.0);
}

fn install_again_exchanges() {
    install(never).unwrap();
    let ours = current(libc::SIGSEGV);
    install(note_and_repair).unwrap();
    assert_eq!(current(libc::SIGSEGV), ours);
    let memory = pages(1);
    set_prot(memory.start(), PAGE, Prot::None);
    poke(memory.start(), 1);
    assert_eq!(ASKED.load(SeqCst), 1);
}

static UFFD: std::sync::OnceLock<Userfaultfd> = std::sync::OnceLock::new();
static SOURCE: AtomicUsize = AtomicUsize::new(0);

fn serve(fault: &FaultInfo) -> bool {
    if fault.signal != libc::SIGBUS {
        return false;
    }
    ASKED.fetch_add(1, SeqCst);
    let at = fault.address / PAGE * PAGE;
    // SAFETY: the test's own memory.
    unsafe { UFFD.get().unwrap().copy(at, SOURCE.load(SeqCst), PAGE, CopyMode::empty()) }.is_ok()
}

/// With the SIGBUS feature, threads bring their pages themselves, on alternate stacks of their own.
fn threads_serve_themselves() {
    install(serve).unwrap();
    let uffd = UFFD.get_or_init(|| open(SIGBUS));
    let (memory, source) = (pages(64), pages(1));
    fill(&source);
    SOURCE.store(source.start(), SeqCst);
    uffd.register(memory.start(), memory.len(), RegisterMode::MISSING).unwrap();
    AT.store(memory.start(), SeqCst);
    unsafe extern "C" fn touch(first: *mut ()) {
        for page in 0..32 {
            let at = AT.load(SeqCst) + (first as usize + page) * PAGE;
            assert_eq!(peek(at + 9), pattern(9));
        }
    }
    let start = |first: usize| {
        // SAFETY: the function takes a number.
        unsafe { thread::spawn(c"touch", 64 << 10, touch, first as *mut ()) }.unwrap()
    };
    let threads = [start(0), start(32)];
    threads.into_iter().for_each(thread::Thread::join);
    assert_eq!(ASKED.load(SeqCst), 64);
}

static GATE: AtomicBool = AtomicBool::new(false);

unsafe extern "C" fn wait_at_gate(_: *mut ()) {
    block_all_but_faults();
    while !GATE.load(SeqCst) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

fn waiting_thread() -> thread::Thread {
    // SAFETY: the function takes nothing.
    unsafe { thread::spawn(c"uhmm-wait", 64 << 10, wait_at_gate, std::ptr::null_mut()) }.unwrap()
}

/// glibc's list of threads on given stacks holds the main thread and ours: the child must be able to walk it.
fn fork_in_the_main_thread() {
    let threads = [waiting_thread(), waiting_thread()];
    for _ in 0..5 {
        // SAFETY: the child makes a thread of its own, and ends.
        unsafe {
            let pid = libc::fork();
            if pid == 0 {
                GATE.store(true, SeqCst);
                waiting_thread().join();
                libc::_exit(7);
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
            assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7, "the child died: {status:#x}");
        }
    }
    GATE.store(true, SeqCst);
    threads.into_iter().for_each(thread::Thread::join);
}

/// glibc's setuid interrupts every thread by a signal and waits until all have answered.
fn setuid_does_not_hang() {
    let thread = waiting_thread();
    // SAFETY: changes nothing.
    unsafe { assert_eq!(libc::setuid(libc::getuid()), 0) };
    GATE.store(true, SeqCst);
    thread.join();
}
