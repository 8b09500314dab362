//! What the tests share: memory, threads that touch it, and descriptors with the best rights that this machine grants.

use core::ffi::CStr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use uhmm_os::mem::{Mapping, Prot, Reserve, map};
use uhmm_os::uffd::{Event, Features, MsgBuf, OpenError, Rights, Userfaultfd, poll, probe};
use uhmm_os::{BLOCK, PAGE};

/// Full, where it is granted.
pub(crate) fn best_rights() -> Rights {
    static BEST: OnceLock<Rights> = OnceLock::new();
    *BEST.get_or_init(|| if probe(Rights::Full).is_ok() { Rights::Full } else { Rights::UserModeOnly })
}

pub(crate) fn open(features: Features) -> Userfaultfd {
    let opened: Result<_, OpenError> = Userfaultfd::open(best_rights(), features);
    opened.unwrap()
}

const NAME: &CStr = c"uhmm-os-test";

/// Untouched memory on a block boundary.
pub(crate) fn area(len: usize) -> Mapping {
    map(&Reserve { hint: 0, len, align: BLOCK, name: NAME, prot: Prot::ReadWrite, exact: false }).unwrap()
}

/// Untouched small pages.
pub(crate) fn pages(count: usize) -> Mapping {
    let memory = area(count * PAGE);
    advise(&memory, uhmm_os::mem::Advice::NoHugepage);
    memory
}

pub(crate) fn advise(memory: &Mapping, advice: uhmm_os::mem::Advice) {
    // SAFETY: memory of the test's own.
    unsafe { uhmm_os::mem::madvise(memory.start(), memory.len(), advice) }.unwrap();
}

/// What byte `i` of a filled page or mapping holds: never 0, and different in neighbouring pages.
pub(crate) fn pattern(i: usize) -> u8 {
    (i / PAGE * 31 + i % 251) as u8 | 1
}

pub(crate) fn fill(memory: &Mapping) {
    for i in 0..memory.len() {
        // SAFETY: within the mapping.
        unsafe { memory.as_ptr().add(i).write(pattern(i)) };
    }
}

/// Whether `len` bytes at `at` are as [`fill`] left them at offset `from`.
pub(crate) fn is_filled(at: usize, from: usize, len: usize) -> bool {
    (0..len).all(|i| peek(at + i) == pattern(from + i))
}

pub(crate) fn peek(at: usize) -> u8 {
    // SAFETY: the tests look at mapped memory only.
    unsafe { (at as *const u8).read_volatile() }
}

pub(crate) fn poke(at: usize, value: u8) {
    // SAFETY: the tests write to mapped memory of their own only.
    unsafe { (at as *mut u8).write_volatile(value) };
}

/// The next event, within ten seconds.
pub(crate) fn next_event(uffd: &Userfaultfd) -> Event {
    let events = next_events(uffd);
    assert_eq!(events.len(), 1, "{events:?}");
    events[0]
}

pub(crate) fn next_events(uffd: &Userfaultfd) -> Vec<Event> {
    assert_eq!(poll(&[uffd.as_fd()], Some(10_000)), Ok(1), "no event came");
    let mut buffer = MsgBuf::new();
    let count = uffd.read(&mut buffer).unwrap();
    let events: Vec<_> = buffer.events().collect();
    assert_eq!(events.len(), count);
    events
}

/// Waits until something holds, at most ten seconds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(10), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
